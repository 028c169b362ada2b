"""Explainers: which wavelengths make a spectrum odd. They know scores as functions, never a model.

Every method gives each score of each spectrum a weight per region, positive where the region makes the spectrum odder
than what the method compares it with.

- `lime`: segments switched off at random, and a local linear model.
- `occlusion`: windows of one spectrum in another: Inverse Multiscale Occlusion, ablation, occlusion.
- `gradients`: gradients of scores, integrated or expected.
- `ascent`: which changes lead to a spectrum of higher probability.
- `segmentation`: ways to cut a spectrum into segments.
- `perturbations`: what stands where a segment is switched off.
- `baselines`: the ordinary spectra that others are compared with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Int64, Shaped

from distspec.config import Ablation, AnyMethod, Imo, Lime, Occlusion
from distspec.spectra import Spectra, WaveGrid
from distspec.spectra.perturbed import PerturbedSpectra

__all__ = ["Explainer", "Explanation", "Fields", "Scores", "build"]

Fields = dict[str, tuple[str, tuple[int, ...]]]
"""dtype and shape of what is kept for each spectrum."""


class Scores(Protocol):
    """What explainers may ask about k scores, higher = odder."""

    names: tuple[str, ...]

    def __call__(self, spectra: Spectra) -> Float32[np.ndarray, "n k"]:
        """Score spectra."""
        ...

    def versions(self, mixture: PerturbedSpectra) -> Callable[[int, int], Float32[np.ndarray, "m part k"]]:
        """Give what scores versions `start` to `stop` of each of a mixture's spectra."""
        ...

    def reconstruct(self, spectra: Spectra) -> Float32[np.ndarray, "n pixels"]:
        """Give the model's reconstruction; ConfigError where there is no model."""
        ...

    def ordinary(self, others: Spectra, spectrum: Spectra) -> Float32[np.ndarray, "m pixels"]:
        """Give the model's reconstruction of other spectra at the redshift of one; ConfigError as above."""
        ...

    def gradient_of(self, name: str, spectra: Spectra) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
        """Give a score as a function for torch, what else it takes, and flux; ConfigError where it has no gradient."""
        ...


@dataclass(frozen=True)
class Explanation:
    """Weights per region of each spectrum.

    Arguments:
        rows: of the spectra in the store.
        weights: for each of k scores, positive where the region raises the score.
        segment_of: region that each pixel belongs to.
        more: what else a method tells, by the names of its `fields`.
    """

    rows: Int64[np.ndarray, "n"]
    weights: Float32[np.ndarray, "n k regions"]
    segment_of: Int64[np.ndarray, "pixels"]
    more: dict[str, Shaped[np.ndarray, "n ..."]] = field(default_factory=dict)

    @property
    def pixel_weights(self) -> Float32[np.ndarray, "n k pixels"]:
        """Each pixel's weight: that of its region."""
        return self.weights[:, :, self.segment_of]


class Explainer(Protocol):
    """A method for spectra on one grid."""

    segment_of: Int64[np.ndarray, "pixels"]
    """Region of each pixel. Regions that differ from spectrum to spectrum are told pixel by pixel."""

    def fields(self, scores: int) -> Fields:
        """Name what is kept for each spectrum of so many scores: `weights`, and what else the method tells."""
        ...

    def explain(self, scores: Scores, spectra: Spectra, baselines: Sequence[Spectra] = ()) -> Explanation:
        """Explain n spectra with at least one good pixel each.

        Arguments:
            scores: k scores.
            spectra: n of them.
            baselines: for each spectrum the ordinary ones, where the method needs some.
        """
        ...


def build(settings: AnyMethod, grid: WaveGrid, seed: int, *, rest: bool) -> Explainer:
    """Make a method for spectra on a grid.

    Arguments:
        settings: of the method.
        grid: of the spectra.
        seed: of whatever it draws.
        rest: whether the grid is at rest.
    """
    # Imported here so that who explains by one method does not import the others' libraries.
    match settings:
        case Lime():
            from distspec.explainers.lime import LimeExplainer

            return LimeExplainer(settings, grid, seed, rest=rest)
        case Imo():
            from distspec.explainers.occlusion import ImoExplainer

            return ImoExplainer(settings, grid)
        case Ablation() | Occlusion():
            from distspec.explainers.occlusion import AblationExplainer

            return AblationExplainer(settings, grid)
        case _:
            from distspec.explainers.gradients import GradientExplainer

            return GradientExplainer(settings, grid)
