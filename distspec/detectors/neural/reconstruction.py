"""Scores from what an autoencoder fails to reconstruct: eight variants, and chi-squared, from one pass.

The same eight with absolute residuals (MAD) and with their power 0.33 (Lp) are made where the settings ask for them.
The eight are {plain, filtered, trimmed, filtered and trimmed} x {squared error, weighted by inverse flux}. As in the
public code of Ortiz & Boquien, a score is the *root of the sum* of the kept terms, not their mean; ranks are the same
for one variant, magnitudes are not comparable between variants or between spectra of very different coverage.
"""

from typing import Final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from distspec.config import METRICS, RECONSTRUCTION, Score, metric_scores

__all__ = ["SCORES", "reconstruction_scores", "scores_of"]

SCORES: Final[tuple[str, ...]] = RECONSTRUCTION
"""Names of the scores that are always made. `chi2` is the masked chi-squared per good pixel."""

_BLOCK: Final = 128
"""Spectra scored at once on a processor: the temporaries then stay in a core's cache."""

_GROUP: Final = 4
"""Pixels of a group in the search for the largest residuals."""


def scores_of(settings: Score) -> tuple[str, ...]:
    """Name the scores of `reconstruction_scores`, in their order: `SCORES`, then eight for each further metric."""
    return (*SCORES, *(name for metric in settings.metrics for name in metric_scores(metric)))


def reconstruction_scores(
    flux: Float[Tensor, "n pixels"],
    ivar: Float[Tensor, "n pixels"],
    reconstruction: Float[Tensor, "n pixels"],
    away: Bool[Tensor, "#n pixels"],
    settings: Score,
) -> Float[Tensor, "n k"]:
    """Compute all scores of a batch.

    With r = |x̂ - x|, the order is: leave out masked and (filtered) line pixels; of the N' that remain keep the
    K = int(0.01 · percentage · N') smallest r (trimmed); sum r^p, or r^p/(max(x, 0) + ε) (relative), over the kept;
    take the power 1/p. For `mse` and `relative` p = 2; `METRICS` has the others. The observed flux is clipped at zero
    in the weight, since surveys without the cut σ < x hold negative fluxes.

    References:
        Ortiz & Boquien 2025, arXiv 2510.05235, and its public code; Böhm, Kim & Juneau for chi-squared.

    Arguments:
        flux: observed, normalised flux x.
        ivar: its inverse variance, 0 = masked.
        reconstruction: x̂.
        away: True for pixels away from the filtered lines; one row serves all spectra.
        settings: trimming percentage, ε, and further metrics.

    Returns:
        Scores in the order of `scores_of` the settings; NaN for a spectrum without a good pixel.
    """
    if not len(flux):
        return flux.new_zeros((0, len(scores_of(settings))))
    rows = _BLOCK if flux.device.type == "cpu" else len(flux)
    parts = []
    for start in range(0, len(flux), rows):
        part = slice(start, start + rows)
        nearby = away if len(away) == 1 else away[part]
        block = (flux[part], ivar[part], reconstruction[part], nearby, settings)
        scores = [_block_scores(*block), *(_metric_scores(*block, METRICS[metric]) for metric in settings.metrics)]
        parts.append(torch.cat(scores, dim=1))
    return torch.cat(parts)


def _block_scores(
    flux: Float[Tensor, "n pixels"],
    ivar: Float[Tensor, "n pixels"],
    reconstruction: Float[Tensor, "n pixels"],
    away: Bool[Tensor, "#n pixels"],
    settings: Score,
) -> Float[Tensor, "n 9"]:
    """Compute all scores of a few spectra.

    Trimming drops few pixels, and few lie near lines. Each row's sums are made of two parts: over a short list of these
    pixels, in double precision, where a spike of 1e30 neither overflows when squared nor drowns the others; and over
    the rest, which no score drops, in single precision and in units of a residual that none of them exceeds. Each sum
    holds a listed residual of at least that unit, so nothing is lost, and what is filtered touches no filtered sum.
    """
    pixels = flux.shape[1]
    share = 0.01 * settings.trim_percentage
    good = ivar > 0
    zero = flux.new_zeros(())
    flux, ivar, residual = (torch.where(good, x, zero) for x in (flux, ivar, reconstruction - flux))
    residual.abs_()
    floor = flux.clamp_min(0.0).add_(settings.epsilon)
    weight = away.to(residual.dtype).expand_as(residual)
    seen = good.to(residual.dtype)
    count, count_away = seen.sum(dim=1, keepdim=True), _dot(seen, weight)
    dropped, dropped_away = (n.long() - (n.double() * share).long() for n in (count, count_away))

    near, is_near = _marked(~away)
    near = near.expand(len(flux), -1)
    rest = residual * weight
    largest = _largest(rest, min(pixels - int(pixels * share) + 1, pixels))
    listed = torch.cat([near, largest], dim=1)
    lengths = torch.cat([residual.gather(1, near) * is_near, rest.gather(1, largest)], dim=1)
    # Of equal residuals the first pixels are dropped; the bits of a float that is not negative order as its value.
    keys = (lengths.float().view(torch.int32).long() << 32) + (pixels - listed)
    level = keys.sort(dim=1, descending=True).values.gather(1, (dropped - 1).clamp_min(0))
    kept = ((keys < level) | (dropped == 0)).double()
    ranks = torch.arange(largest.shape[1], device=flux.device)
    kept_away = (ranks >= dropped_away).double()

    unit = rest.gather(1, largest[:, -1:]).clamp_min_(torch.finfo(rest.dtype).tiny)
    rest.scatter_(1, largest, 0.0).div_(unit)
    unit = unit.double().square_()
    square = lengths.double().square_()
    columns = []
    for divisor in (None, floor):
        terms = square if divisor is None else square / divisor.gather(1, listed)
        total = _dot(rest, rest if divisor is None else rest / divisor).double() * unit
        terms_away = terms[:, near.shape[1] :]
        columns += [total + terms.sum(dim=1, keepdim=True), total + terms_away.sum(dim=1, keepdim=True)]
        columns += [total + _dot(terms, kept), total + _dot(terms_away, kept_away)]
    pull = rest.mul_(ivar.sqrt()).double()
    chi2 = (_dot(pull, pull) * unit + _dot(square, ivar.gather(1, listed).double())) / count
    scores = torch.cat([torch.cat(columns, dim=1).sqrt_(), chi2], dim=1)
    # A score beyond the range of the output stays the largest number there is.
    scores = scores.clamp_max(torch.finfo(flux.dtype).max).to(flux.dtype)
    return torch.where(count > 0, scores, torch.nan)


def _metric_scores(
    flux: Float[Tensor, "n pixels"],
    ivar: Float[Tensor, "n pixels"],
    reconstruction: Float[Tensor, "n pixels"],
    away: Bool[Tensor, "#n pixels"],
    settings: Score,
    power: float,
) -> Float[Tensor, "n 8"]:
    """Compute the eight scores of a few spectra with another exponent of the residuals, in double precision.

    Powers of one and less neither overflow nor let one pixel drown the others, so plain sums will do.
    """
    good = ivar > 0
    zero = flux.new_zeros(())
    residual = torch.where(good, reconstruction - flux, zero).double().abs_()
    floor = torch.where(good, flux, zero).double().clamp_min_(0.0).add_(settings.epsilon)
    share = 0.01 * settings.trim_percentage
    columns = []
    for considered in (good, good & away):
        count = considered.sum(dim=1, keepdim=True)
        dropped = count - (count.double() * share).long()
        # Pixels that are not considered come last; of equal residuals the first pixels are dropped.
        order = torch.where(considered, residual, -1.0).sort(dim=1, descending=True, stable=True).indices
        ranks = torch.empty_like(order).scatter_(
            1, order, torch.arange(flux.shape[1], device=flux.device).expand_as(order)
        )
        terms = residual.pow(power) * considered
        for kept in (torch.ones_like(considered), ranks >= dropped):
            columns += [_dot(terms, kept.double()), _dot(terms / floor, kept.double())]
    # From (all, trimmed) x (plain, relative), unfiltered and filtered, to the order of the names.
    scores = torch.cat([columns[index] for index in (0, 4, 2, 6, 1, 5, 3, 7)], dim=1).pow(1 / power)
    scores = scores.clamp_max(torch.finfo(flux.dtype).max).to(flux.dtype)
    return torch.where(good.any(dim=1, keepdim=True), scores, torch.nan)


def _dot(a: Float[Tensor, "n m"], b: Float[Tensor, "n m"]) -> Float[Tensor, "n 1"]:
    products: Tensor = torch.linalg.vecdot(a, b)
    return products.unsqueeze(1)


def _marked(mask: Bool[Tensor, "n pixels"]) -> tuple[Int64[Tensor, "n most"], Bool[Tensor, "n most"]]:
    """Give the columns that each row marks, in order, filled up with unmarked ones; and which of them are marked."""
    most = int(mask.sum(dim=1).max())
    steps = torch.arange(mask.shape[1], 0, -1, device=mask.device)
    keys, columns = (mask * steps).topk(most, dim=1)
    return columns, keys > 0


def _largest(values: Float[Tensor, "n pixels"], most: int) -> Int64[Tensor, "n most"]:
    """Give the columns of each row's `most` largest values, largest first and of equal ones the first column first.

    The m largest of a row lie in the m groups of largest maxima, so most of the row need not be searched.
    """
    pixels = values.shape[1]
    width = pixels // _GROUP
    # One more than is asked for: if all are different, there was nothing to choose.
    if most + 1 < width:
        # What is left over makes no group: all of it is searched.
        whole = _GROUP * width
        grouped = values[:, :whole].view(len(values), _GROUP, width).amax(dim=1)
        groups = grouped.topk(most + 1, dim=1, sorted=False).indices
        firsts = torch.arange(0, whole, width, device=values.device)
        left = torch.arange(whole, pixels, device=values.device).expand(len(values), -1)
        columns = torch.cat([(groups.unsqueeze(1) + firsts[:, None]).flatten(1), left], dim=1)
        found, order = values.gather(1, columns).topk(most + 1, dim=1)
        columns = columns.gather(1, order)
    else:
        found, columns = values.topk(min(most + 1, pixels), dim=1)
    columns = columns[:, :most].contiguous()
    tied = ((found[:, 1:] == found[:, :-1]) & (found[:, 1:] > 0)).any(dim=1).nonzero()[:, 0]
    if len(tied):
        columns[tied] = values[tied].sort(dim=1, descending=True, stable=True).indices[:, :most]
    return columns
