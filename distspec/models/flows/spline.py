"""Monotonic rational-quadratic splines with linear tails: tables of knots, evaluated for many rows at once."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int16, Int64
from torch import Tensor

__all__ = ["Lookup", "Splines", "lookup", "spline_forward", "spline_inverse", "spline_slopes"]

CELLS = 1_024
"""Of a lookup table: about as many knots as cells where data lie, so that one comparison ends most searches."""

DOUBT = 1e-6
"""Of a position among cells, in cells; rounding is far below."""


class Splines(NamedTuple):
    """Knots of many one-dimensional maps; beyond the outermost knots a map goes on in a straight line.

    References:
        Gregory & Delbourgo (1982); Durkan et al. (2019); here as in SINF (Dai & Seljak 2021).
    """

    x: Float[Tensor, "*maps knots"]
    y: Float[Tensor, "*maps knots"]
    slope: Float[Tensor, "*maps knots"]


class Lookup(NamedTuple):
    """Where to begin the search among the knots x of splines: a binary search of all takes half of a flow's time.

    Cells are even in v / (1 + |v|) of the standardized value v: narrow where most knots are, wide in the tails.
    """

    middle: Float[Tensor, "*maps 1"]
    scale: Float[Tensor, "*maps 1"]
    start: Int16[Tensor, "*maps cells"]
    """Number of knots below a cell, but at least 1."""
    last: Float[Tensor, "*maps 1"]
    """Last knot that matters: beyond it the map is a straight line."""
    jumps: tuple[int, ...]
    """Numbers of knots to try to skip, one after the other, from the start."""


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
    mapped, slopes = spline_slopes(values, splines)
    return mapped, slopes.log()


def spline_slopes(
    values: Float[Tensor, "*maps n"], splines: Splines, table: Lookup | None = None
) -> tuple[Float[Tensor, "*maps n"], Float[Tensor, "*maps n"]]:
    """Map values, and give the slope at each. The table of these splines makes it quicker."""
    first = splines.x[..., :1]
    last = splines.x[..., -1:] if table is None else table.last
    # Tails need no branch: at the clamped position the spline has the end's value and slope.
    inside = torch.minimum(torch.maximum(values, first), last)
    upper = _search(inside.detach(), splines.x) if table is None else _look(inside.detach(), splines.x, table)
    bins = _bins(upper, splines)
    share = (inside - bins.x0) / bins.width
    mean = bins.height / bins.width
    cross = share - share * share
    bend = (bins.slope0 + bins.slope1 - 2 * mean) * cross
    bottom = mean + bend
    mapped = bins.y0 + bins.height * (mean * share + (bins.slope0 - mean) * cross) / bottom
    # Both of these are zero between the outermost knots.
    beyond = values - inside
    mapped = mapped + splines.slope[..., :1] * beyond.clamp_max(0) + splines.slope[..., -1:] * beyond.clamp_min(0)
    slopes = (torch.lerp(bins.slope0, bins.slope1, share) - bend) * (mean / bottom).square()
    return mapped, slopes


def spline_inverse(
    values: Float[Tensor, "*maps n"], splines: Splines
) -> tuple[Float[Tensor, "*maps n"], Float[Tensor, "*maps n"]]:
    """Give what `spline_forward` maps to these values, and the logarithm of the forward slope there."""
    inside = torch.minimum(torch.maximum(values, splines.y[..., :1]), splines.y[..., -1:])
    bins = _bins(_search(inside.detach(), splines.y), splines)
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
    top = bins.slope1 * share.square() + 2 * mean * cross + bins.slope0 * (1 - share).square()
    return found, torch.log(top * (mean / (mean + bend * cross)).square())


# --- the search among knots -------------------------------------------------------------------------------------------


def lookup(splines: Splines, cells: int = CELLS) -> Lookup:
    """Make the table that `spline_slopes` searches by."""
    x, knots = splines.x, splines.x.shape[-1]
    end = _end(splines)
    quarters = [x.gather(-1, (end * part) // 4) for part in (1, 2, 3)]
    middle, spread = quarters[1], quarters[2] - quarters[0]
    scale = 1.35 / torch.where(spread > 0, spread, 1.0)
    position = _position(x, middle, scale, cells).contiguous()
    edges = torch.arange(cells).to(x).expand(*x.shape[:-1], cells)
    below, above = (torch.searchsorted(position, edge) for edge in (edges - DOUBT, edges + 1 + DOUBT))
    start, stop = (torch.minimum(part.clamp_min(1), end) for part in (below, above))
    most = int((stop - start).max()) if start.numel() else 0
    jumps = tuple(2**power for power in reversed(range(most.bit_length())))
    assert knots < 2**15
    return Lookup(middle, scale, start.to(torch.int16), x.gather(-1, end), jumps)


def _end(splines: Splines) -> Int64[Tensor, "*maps 1"]:
    """Find the knot from which on the map is as straight as its tail: later ones only fill the table."""
    x, y, slope = splines
    tail = slope[..., -1:]
    secants = y.diff(dim=-1) / x.diff(dim=-1)
    same = (slope[..., 1:] == tail) & (slope[..., :-1] == tail) & ((secants - tail).abs() <= 1e-9 * tail)
    straight = same.flip(-1).cumprod(dim=-1).sum(dim=-1, keepdim=True)
    return (x.shape[-1] - 1 - straight).clamp_min(1)


def _position(x: Tensor, middle: Tensor, scale: Tensor, cells: int) -> Tensor:
    """Give the position of values among the cells."""
    scaled = (x - middle) * scale
    return (scaled / (scaled.abs() + 1)).add_(1).mul_(0.5 * cells)


def _look(inside: Tensor, x: Tensor, table: Lookup) -> Int64[Tensor, "*maps n"]:
    """Find the knot above each value, from where the table says."""
    cells, knots = table.start.shape[-1], x.shape[-1]
    cell = _position(inside, table.middle, table.scale, cells).long().clamp_(0, cells - 1)
    upper = table.start.gather(-1, cell).long()
    for jump in table.jumps:
        ahead = (upper + (jump - 1)).clamp_(max=knots - 1) if jump > 1 else upper
        upper = upper.add((inside > x.gather(-1, ahead)).long(), alpha=jump)
    return upper


def _search(values: Tensor, edges: Tensor) -> Int64[Tensor, "*maps n"]:
    """Find the knot above each value among all."""
    return torch.searchsorted(edges.contiguous(), values.contiguous()).clamp_(1, edges.shape[-1] - 1)


def _bins(upper: Tensor, splines: Splines) -> _Bins:
    x1, y1, slope1 = (table.gather(-1, upper) for table in splines)
    lower = upper - 1
    x0, y0, slope0 = (table.gather(-1, lower) for table in splines)
    return _Bins(x0, y0, x1 - x0, y1 - y0, slope0, slope1)
