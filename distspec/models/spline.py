"""Monotonic rational-quadratic splines with linear tails: tables of knots, evaluated for many rows at once."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Splines", "spline_forward", "spline_inverse"]


class Splines(NamedTuple):
    """Knots of many one-dimensional maps; beyond the outermost knots a map goes on in a straight line.

    References:
        Gregory & Delbourgo (1982); Durkan et al. (2019); here as in SINF (Dai & Seljak 2021).
    """

    x: Float[Tensor, "*maps knots"]
    y: Float[Tensor, "*maps knots"]
    slope: Float[Tensor, "*maps knots"]


class _Bins(NamedTuple):
    """The knots around each value."""

    x0: Float[Tensor, "*maps n"]
    y0: Float[Tensor, "*maps n"]
    width: Float[Tensor, "*maps n"]
    height: Float[Tensor, "*maps n"]
    slope0: Float[Tensor, "*maps n"]
    slope1: Float[Tensor, "*maps n"]


def spline_forward(
    values: Float[Tensor, "*maps n"], splines: Splines
) -> tuple[Float[Tensor, "*maps n"], Float[Tensor, "*maps n"]]:
    """Map values, and give the logarithm of the slope at each."""
    bins, first, last = _locate(values, splines.x.contiguous(), splines)
    # Tails need no branch: at the clamped position the spline has the end's value and slope.
    inside = torch.minimum(torch.maximum(values, first), last)
    share = (inside - bins.x0) / bins.width
    mean = bins.height / bins.width
    cross = share * (1 - share)
    bottom = mean + (bins.slope1 + bins.slope0 - 2 * mean) * cross
    mapped = bins.y0 + bins.height * (mean * share.square() + bins.slope0 * cross) / bottom
    beyond = values - inside
    mapped = mapped + torch.where(beyond < 0, splines.slope[..., :1], splines.slope[..., -1:]) * beyond
    return mapped, _log_slope(bins, share, mean, cross, bottom)


def spline_inverse(
    values: Float[Tensor, "*maps n"], splines: Splines
) -> tuple[Float[Tensor, "*maps n"], Float[Tensor, "*maps n"]]:
    """Give what `spline_forward` maps to these values, and the logarithm of the forward slope there."""
    bins, first, last = _locate(values, splines.y.contiguous(), splines)
    inside = torch.minimum(torch.maximum(values, first), last)
    mean = bins.height / bins.width
    bend = bins.slope1 + bins.slope0 - 2 * mean
    above = inside - bins.y0
    a = bins.height * (mean - bins.slope0) + above * bend
    b = bins.height * bins.slope0 - above * bend
    # Rounding may bring the discriminant below zero where it vanishes.
    root = (b.square() + 4 * a * mean * above).clamp_min(0).sqrt()
    share = (2 * mean * above / (b + root)).clamp(0, 1)
    cross = share * (1 - share)
    beyond = values - inside
    found = bins.x0 + share * bins.width
    found = found + beyond / torch.where(beyond < 0, splines.slope[..., :1], splines.slope[..., -1:])
    return found, _log_slope(bins, share, mean, cross, mean + bend * cross)


def _log_slope(bins: _Bins, share: Tensor, mean: Tensor, cross: Tensor, bottom: Tensor) -> Tensor:
    top = bins.slope1 * share.square() + 2 * mean * cross + bins.slope0 * (1 - share).square()
    return torch.log(top * (mean / bottom).square())


def _locate(values: Tensor, edges: Tensor, splines: Splines) -> tuple[_Bins, Tensor, Tensor]:
    """Find the bin of each value among `edges`; values beyond fall in the first or last."""
    knots = edges.shape[-1]
    index = (torch.searchsorted(edges, values.detach().contiguous()) - 1).clamp_(0, knots - 2)
    x0, y0, slope0 = (table.gather(-1, index) for table in splines)
    index += 1
    x1, y1, slope1 = (table.gather(-1, index) for table in splines)
    return _Bins(x0, y0, x1 - x0, y1 - y0, slope0, slope1), edges[..., :1], edges[..., -1:]
