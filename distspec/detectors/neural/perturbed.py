"""Scores of many versions of a spectrum without writing them out: exact, from the linear ends of a model.

With x' = x + s δ (s marks switched pixels, δ is what their flux changes by), Δh what the last hidden layer changes by,
L the last layer and r = x̂ - x the residual of the spectrum itself, all per pixel with weights w:

    first layer        W x' = W x + Σ_switched segments W δ_segment
    squared residuals  Σ w (x̂' - x')² = Σ w (r - s δ)² + 2 Δh · Lᵀ w (r - s δ) + Δhᵀ (Lᵀ w L) Δh

Each segment's part of W δ, of the first sum and of Lᵀ w δ is made once; a version then costs a few products of the size
of segments and hidden layers, and no row of pixels. Since all is counted from the spectrum itself, no large numbers
cancel. Scores that weigh by flux or leave out the largest residuals need the residuals: for them the last layer is
multiplied out, still without the first.
"""

from typing import Final

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from distspec.config import Score
from distspec.detectors.neural.reconstruction import reconstruction_scores
from distspec.models.autoencoders.ends import Ends
from distspec.models.flows.density import LatentDensity
from distspec.spectra.perturbed import PerturbedSpectra

__all__ = ["QUADRATIC", "PerturbedScores", "SegmentInputs"]

QUADRATIC: Final = ("mse", "mse_filtered", "chi2")
"""Scores that are roots or means of weighted sums of squares."""

_BLOCKS: Final = 4
"""Parts of the last hidden layer by which a product with a symmetric matrix is halved."""

_ROWS: Final = 1_024
"""Versions whose residuals are written out at once."""


class SegmentInputs:
    """A mixture as tensors: m spectra, one mask, and what stands in their place.

    Arguments:
        flux: of the spectra, 0 where masked.
        ivar: one row, since it is that of all.
        other: flux that takes their place, 0 where masked.
        away: pixels away from the filtered lines.
        mixture: where it takes their place.
    """

    def __init__(
        self,
        flux: Float32[Tensor, "m pixels"],
        ivar: Float32[Tensor, "pixels"],
        other: Float32[Tensor, "pixels"],
        away: Bool[Tensor, "pixels"],
        mixture: PerturbedSpectra,
    ) -> None:
        self.flux, self.ivar, self.other, self.away, self.mixture = flux, ivar, other, away, mixture
        self.good = (ivar > 0).to(flux.dtype)
        self.cuts: Int64[Tensor, "k pixels"] = torch.from_numpy(mixture.segment_of).to(flux.device)
        switched = mixture.switched
        self.switched = None if switched is None else torch.from_numpy(switched).to(flux)

    def by_segment(self, values: Float[Tensor, "pixels c"]) -> Float[Tensor, "segments c"]:
        """Add up the pixels of each segment."""
        total = values.new_zeros(self.mixture.segments + 1, values.shape[1])
        for cut in self.cuts:
            # The last row takes what is in no segment.
            total.index_add_(0, torch.where(cut < 0, self.mixture.segments, cut), values)
        return total[:-1]

    def take(
        self, whole: Float[Tensor, "versions c"], parts: Float[Tensor, "segments c"], start: int, stop: int
    ) -> Float[Tensor, "versions c"]:
        """Take twice what the switched segments give from something else, in its place."""
        if self.switched is None:
            return whole.sub_(parts[start:stop], alpha=2)
        return whole.addmm_(self.switched[start:stop, : len(parts)], parts, alpha=-2)

    def add(self, parts: Float[Tensor, "segments c"], start: int, stop: int) -> Float[Tensor, "versions c"]:
        """Add up what the switched segments of some versions give."""
        return parts[start:stop] if self.switched is None else self.switched[start:stop, : len(parts)] @ parts


class PerturbedScores:
    """Scores of one mixture by a model with linear ends.

    Arguments:
        ends: of the model.
        density: of its latents, if a score needs it.
        names: all scores of the model, in the order of `reconstruction_scores`.
        wanted: the scores that are asked for.
        settings: of the scores.
        inputs: the mixture.
    """

    def __init__(
        self,
        ends: Ends,
        density: LatentDensity | None,
        names: tuple[str, ...],
        wanted: tuple[str, ...],
        settings: Score,
        inputs: SegmentInputs,
    ) -> None:
        self._ends, self._density, self._settings, self._inputs = ends, density, settings, inputs
        self._names, self._wanted = names, wanted
        residuals = [name for name in wanted if name != "density"]
        self._quadratic = bool(residuals) and set(residuals) <= set(QUADRATIC)
        self._whole = bool(residuals) and not self._quadratic
        self._first = ends.by_pixel
        self._weights = self._pixel_weights(residuals) if self._quadratic else {}
        self._grams = {name: ends.gram(weight) for name, weight in self._weights.items()}
        self._of: int | None = None

    def _pixel_weights(self, wanted: list[str]) -> dict[str, Float32[Tensor, "pixels"]]:
        good, inputs = self._inputs.good, self._inputs
        weights = {"mse": good, "mse_filtered": good * inputs.away, "chi2": inputs.ivar / good.sum()}
        return {name: weights[name] for name in wanted}

    def _take(self, which: int) -> None:
        """Prepare one of the spectra."""
        if self._of == which:
            return
        ends, inputs = self._ends, self._inputs
        flux = inputs.flux[which]
        self._change = (inputs.other - flux) * inputs.good
        self._before = self._first.T @ ((flux - ends.center) * inputs.good) + ends.bias
        self._parts = inputs.by_segment(self._first * self._change[:, None])
        if self._quadratic or self._whole:
            self._deep = ends.hidden(ends.encode(self._before[None]))[0]
            self._made = ends.last @ self._deep + ends.offset
        if self._quadratic:
            residual = (self._made - flux) * inputs.good
            self._sums = {name: self._quadratic_parts(residual, weight) for name, weight in self._weights.items()}
        self._of = which

    def _quadratic_parts(self, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give what does not depend on the version: sum of squares, its change and cross products by segment."""
        last, change = self._ends.last, self._change
        square = (residual.double().square() * weight).sum()
        moved = (((residual - change).double().square() - residual.double().square()) * weight)[:, None]
        return (
            square,
            self._inputs.by_segment(moved)[:, 0],
            last.T @ (weight * residual),
            self._inputs.by_segment(last * (weight * change)[:, None]),
        )

    def __call__(self, which: int, start: int, stop: int) -> Float32[Tensor, "versions k"]:
        """Score versions `start` to `stop` of one of the spectra."""
        self._take(which)
        latents = self._ends.encode(self._before + self._inputs.add(self._parts, start, stop))
        columns: dict[str, Tensor] = {}
        if self._density is not None and "density" in self._wanted:
            columns["density"] = self._density.score(latents)
        if self._quadratic or self._whole:
            deep = self._ends.hidden(latents) - self._deep
            columns |= self._squares(deep, start, stop) if self._quadratic else self._written(which, deep, start, stop)
        return torch.stack([columns[name].float() for name in self._wanted], dim=1)

    def _squares(self, deep: Float32[Tensor, "versions L"], start: int, stop: int) -> dict[str, Tensor]:
        inputs, columns = self._inputs, {}
        for name, (square, moved, cross, parts) in self._sums.items():
            fixed = square + inputs.add(moved[:, None].to(deep), start, stop)[:, 0].double()
            # Δh · (2 Lᵀ w (r - s δ) + Lᵀ w L Δh)
            pull = _halved(deep, self._grams[name], 2 * cross)
            total = fixed + torch.linalg.vecdot(inputs.take(pull, parts, start, stop), deep).double()
            total = total.clamp_min(0.0)
            columns[name] = total if name == "chi2" else total.sqrt()
        return columns

    def _written(self, which: int, deep: Float32[Tensor, "versions L"], start: int, stop: int) -> dict[str, Tensor]:
        inputs, parts = self._inputs, []
        for first in range(0, len(deep), _ROWS):
            last = min(first + _ROWS, len(deep))
            covers = torch.from_numpy(inputs.mixture.covers(start + first, start + last)).to(deep.device)
            flux = torch.where(covers, inputs.other, inputs.flux[which])
            made = torch.addmm(self._made, deep[first:last], self._ends.last.T)
            ivar, away = inputs.ivar.expand_as(flux), inputs.away[None]
            parts.append(reconstruction_scores(flux, ivar, made, away, self._settings))
        scores = torch.cat(parts)
        return {name: scores[:, self._names.index(name)] for name in self._wanted if name != "density"}


def _halved(
    deep: Float32[Tensor, "versions L"], gram: Float32[Tensor, "L L"], offset: Float32[Tensor, "L"]
) -> Float32[Tensor, "versions L"]:
    """Give offset + Δh U with Δh U Δhᵀ = Δh G Δhᵀ: since G is symmetric, blocks above its diagonal count twice."""
    pull, width = torch.empty_like(deep), -(-len(gram) // _BLOCKS)
    for first in range(0, len(gram), width):
        last = min(first + width, len(gram))
        upper = torch.cat([2 * gram[:first, first:last], gram[first:last, first:last]])
        torch.addmm(offset[first:last], deep[:, :last], upper, out=pull[:, first:last])
    return pull
