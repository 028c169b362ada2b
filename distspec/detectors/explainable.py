"""Scores as explainers ask about them: of spectra, of many versions of one spectrum, and of what changes them.

One object holds all scores that are explained, of a model and of classical detectors, so that one pass serves them all.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from distspec.detectors import ClassicalDetector
from distspec.detectors.neural.differentiable import differentiable
from distspec.detectors.neural.perturbed import PerturbedScores, SegmentInputs
from distspec.detectors.neural.scores import DENSITY, ModelScores
from distspec.errors import ConfigError
from distspec.models.autoencoders.ends import ends_of
from distspec.spectra import Spectra
from distspec.spectra.perturbed import PerturbedSpectra

__all__ = ["Explainable"]

_ROWS: Final = 4_096
"""Versions that pass through a model at once."""


class Explainable:
    """Some scores, of a model and of classical detectors, behind the one contract that explainers know.

    Arguments:
        names: of the scores, in the order of all that is given.
        model: that makes some of them, if any.
        detectors: the classical detector that makes each of the others.
        exact: use the structure of the model where it has one; False always writes every version out.

    Raises:
        ConfigError: a score belongs to nothing that is there.
    """

    def __init__(
        self,
        names: Sequence[str],
        model: ModelScores | None = None,
        detectors: Mapping[str, ClassicalDetector] | None = None,
        *,
        exact: bool = True,
    ) -> None:
        self.names = tuple(names)
        self._model = model
        self._detectors = dict(detectors or {})
        there = () if model is None else model.names
        self._own = tuple(name for name in self.names if name in there)
        missing = [name for name in self.names if name not in there and name not in self._detectors]
        if missing:
            known = ", ".join([*there, *self._detectors])
            raise ConfigError(f"no score {missing[0]!r} to explain, only {known}")
        self._ends = None if model is None or not exact else ends_of(model.model)

    def __call__(self, spectra: Spectra) -> Float32[np.ndarray, "n k"]:
        """Score spectra; higher = odder."""
        columns: dict[str, np.ndarray] = {}
        if self._model is not None and self._own:
            columns |= dict(zip(self._own, self._model.some(spectra, self._own).T, strict=True))
        details: dict[int, dict[str, np.ndarray]] = {}
        for name in self.names:
            if name not in columns:
                detector = self._detectors[name]
                # A detector may give more than one score.
                if id(detector) not in details:
                    details[id(detector)] = detector.details(spectra)
                columns[name] = details[id(detector)][name]
        return np.stack([columns[name] for name in self.names], axis=1).astype(np.float32)

    def versions(self, mixture: PerturbedSpectra) -> Callable[[int, int], Float32[np.ndarray, "m part k"]]:
        """Give what scores versions `start` to `stop` of each of a mixture's spectra."""
        spread = mixture.base.ivar
        if len(spread) > 1 and (spread != spread[0]).any():
            raise ValueError("the spectra of a mixture have different masks")
        fast = self._mixed(mixture)

        def score(start: int, stop: int) -> Float32[np.ndarray, "m part k"]:
            return np.stack([self._one(mixture, fast, which, start, stop) for which in range(len(mixture.base))])

        return score

    def _one(
        self, mixture: PerturbedSpectra, fast: PerturbedScores | None, which: int, start: int, stop: int
    ) -> Float32[np.ndarray, "part k"]:
        parts = [np.zeros((0, len(self.names)), np.float32)]
        for first in range(start, stop, _ROWS):
            last = min(first + _ROWS, stop)
            found = self._fast(fast, which, first, last)
            if found is None:
                found = np.concatenate(
                    [self(mixture.spectra(which, place, min(place + 512, last))) for place in range(first, last, 512)]
                )
            parts.append(found)
        return np.concatenate(parts)

    @torch.no_grad()
    def _fast(
        self, fast: PerturbedScores | None, which: int, start: int, stop: int
    ) -> Float32[np.ndarray, "part k"] | None:
        """Score by the structure of the model; None where there is none, or numbers leave the range of a float32."""
        if fast is None:
            return None
        found: Float32[np.ndarray, "part k"] = fast(which, start, stop).cpu().numpy()
        return found if np.isfinite(found).all() else None

    @torch.no_grad()
    def _mixed(self, mixture: PerturbedSpectra) -> PerturbedScores | None:
        # With a classical detector the versions are written out anyway.
        if self._model is None or self._ends is None or self._own != self.names:
            return None
        flux, ivar, _ = self._model.bring(mixture.base)
        away = self._model.away(mixture.base)[0]
        other = torch.from_numpy(mixture.other).to(flux.device)
        inputs = SegmentInputs(flux, ivar[0], torch.where(ivar[0] > 0, other, 0.0), away, mixture)
        density = self._model.density if DENSITY in self.names else None
        return PerturbedScores(self._ends, density, self._model.names, self.names, self._model.settings, inputs)

    # --- what a model adds ---

    @property
    def has_model(self) -> bool:
        """Whether there is a model that reconstructs."""
        return self._model is not None

    def reconstruct(self, spectra: Spectra) -> Float32[np.ndarray, "n pixels"]:
        """Give the model's reconstruction.

        Raises:
            ConfigError: there is no model.
        """
        return self._require("a reconstruction").reconstruct(spectra)

    def ordinary(self, others: Spectra, spectrum: Spectra) -> Float32[np.ndarray, "m pixels"]:
        """Give other spectra as the model would decode them at the redshift of one spectrum: R = g(f(B), z).

        References:
            Shen & Melchior (IMO), §2.2.
        """
        model = self._require("baselines")
        latents = model.latents_of(others)
        like = spectrum[np.zeros(len(others), np.int64)]
        decoded: Float32[np.ndarray, "m pixels"] = model.decoder(like)(latents).cpu().numpy()
        return decoded

    def gradient_of(
        self, name: str, spectra: Spectra
    ) -> tuple[Callable[..., Float[Tensor, "n"]], tuple[Tensor, Bool[Tensor, "n pixels"], Tensor | None], Tensor]:
        """Give a score as a function that torch can differentiate, what else it takes, and the flux to start from.

        Raises:
            ConfigError: the score has no gradient.
        """
        if self._model is None or name not in self._own:
            raise ConfigError(f"score {name!r} has no gradient: only those of a model have; explain it by lime or imo")
        flux, ivar, redshift = self._model.bring(spectra)
        away = self._model.away(spectra).expand_as(flux)
        return differentiable(self._model, name), (ivar, away, redshift), flux

    def _require(self, what: str) -> ModelScores:
        if self._model is None:
            raise ConfigError(f"{what} needs a trained model; run `distspec train` and `distspec score` first")
        return self._model
