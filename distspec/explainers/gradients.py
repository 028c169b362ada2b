"""Explanations that follow gradients, from captum: for the scores of a model, which torch can differentiate."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from distspec.config import ExpectedGradients, Gradient, GradientInput, IntegratedGradients
from distspec.explainers import Explanation, Fields, Scores
from distspec.spectra import Spectra, WaveGrid

__all__ = ["GradientExplainer"]

_ROWS: Final = 2_048
"""Places on the way from a baseline whose gradients are taken at once."""


class GradientExplainer:
    """Gradient, gradient times input, integrated and expected gradients. A masked pixel has weight 0.

    Integrated gradients add up to s(x) - s(baseline); by how much they miss it is kept as `missing`. Expected gradients
    are their mean over ordinary spectra at the redshift of x.

    References:
        Sundararajan, Taly & Yan 2017, arXiv 1703.01365; Erion et al. 2021, arXiv 1906.10670; pae_sinf_imo_spender §C.4.

    Arguments:
        settings: which of them, its steps and baselines.
        grid: of the spectra.
    """

    def __init__(
        self, settings: Gradient | GradientInput | IntegratedGradients | ExpectedGradients, grid: WaveGrid
    ) -> None:
        self.settings, self.grid = settings, grid
        self.segment_of: Int64[np.ndarray, "pixels"] = np.arange(grid.pixels)
        self._integrates = isinstance(settings, IntegratedGradients | ExpectedGradients)

    def fields(self, scores: int) -> Fields:
        """Name what is kept: `weights`, and where they should add up to something what is `missing`."""
        kept: Fields = {"weights": ("f4", (scores, self.grid.pixels))}
        return kept | ({"missing": ("f4", (scores,))} if self._integrates else {})

    def explain(self, scores: Scores, spectra: Spectra, baselines: Sequence[Spectra] = ()) -> Explanation:
        """Explain why scores are high.

        Raises:
            ConfigError: a score has no gradient.
        """
        k, count = len(scores.names), len(spectra)
        weights, missing = np.zeros((count, k, self.grid.pixels), np.float32), np.zeros((count, k), np.float32)
        starts = self._starts(scores, spectra, baselines)
        for place, name in enumerate(scores.names):
            function, others, flux = scores.gradient_of(name, spectra)
            if not self._integrates:
                weights[:, place] = _array(self._local(function, flux, others))
                continue
            for index in range(count):
                own = tuple(None if other is None else other[index : index + 1] for other in others)
                start = torch.from_numpy(starts[index]).to(flux)
                found, left = self._along(function, flux[index : index + 1].expand_as(start), start, own)
                weights[index, place], missing[index, place] = _array(found.mean(dim=0)), float(left.mean())
        weights[~np.broadcast_to(spectra.good[:, None], weights.shape)] = 0.0
        return Explanation(spectra.rows, weights, self.segment_of, {"missing": missing} if self._integrates else {})

    def _starts(
        self, scores: Scores, spectra: Spectra, baselines: Sequence[Spectra]
    ) -> list[Float32[np.ndarray, "m pixels"]]:
        """Give the flux that the ways begin at, one or more for each spectrum."""
        match self.settings:
            case ExpectedGradients():
                return [scores.ordinary(near, spectra[[i]]) for i, near in enumerate(baselines)]
            case IntegratedGradients(baseline="reconstruction"):
                return list(scores.reconstruct(spectra)[:, None])
            case _:
                return list(np.zeros((len(spectra), 1, self.grid.pixels), np.float32))

    def _local(self, function: Callable[..., Tensor], flux: Tensor, others: tuple[Any, ...]) -> Tensor:
        from captum.attr import InputXGradient, Saliency

        start = flux.detach().clone().requires_grad_()
        if isinstance(self.settings, Gradient):
            # Signed: whether more flux raises or lowers the score is half of what a gradient tells.
            found: Tensor = Saliency(function).attribute(start, abs=False, additional_forward_args=others)
        else:
            found = InputXGradient(function).attribute(start, additional_forward_args=others)
        return found

    def _along(
        self, function: Callable[..., Tensor], flux: Tensor, start: Tensor, others: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        from captum.attr import IntegratedGradients as Integrated

        steps = self.settings.steps  # type: ignore[union-attr]
        repeated = tuple(None if other is None else other.expand(len(flux), *other.shape[1:]) for other in others)
        found, left = Integrated(function).attribute(
            flux.contiguous().requires_grad_(),
            start,
            additional_forward_args=repeated,
            n_steps=steps,
            internal_batch_size=max(_ROWS, len(flux)),
            return_convergence_delta=True,
        )
        return found, left


def _array(values: Tensor) -> np.ndarray:
    return np.asarray(values.detach().float().cpu().numpy())
