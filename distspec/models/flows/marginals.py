"""One-dimensional maps to a Gaussian, from weighted samples or from their merged histograms.

A histogram is a weighted sample whose values are its nodes. With cells much narrower than the kernel nothing else is
lost, so the maps of a survey spread over workers follow from sums of histograms.

References:
    Dai & Seljak (2021), SINF, §3.2, and its public code (`estimate_knots_gaussian`).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distspec.config import Sliced
from distspec.models.flows.spline import Splines

__all__ = ["Marginal", "Rules", "fit_splines", "knot_fractions", "linear_histogram", "mix"]

CELLS_IN_BANDWIDTH = 16

MOST_CELLS = 2**17

FEWEST_CELLS = 2**12

SMALLEST_GAP = 1e-5

REACH = 8.3
"""Bandwidths beyond which a Gaussian kernel's tail is below the rounding of 1."""

TAIL = 20
"""Nodes beyond an end knot that are looked at one by one."""

BLOCK = 2**21
"""Kernel values computed at once."""


@dataclass(frozen=True)
class Rules:
    """How fine and how bold a map may be, by the effective number of objects (SINF, rules of `GIS()`).

    The default settings give a regularization; the rule holds where they unset it.
    """

    knots: int
    edge: int
    """Extra knots in each tail."""
    alpha: tuple[float, float]
    """Shares of the identity in the map and in the slopes of its tails."""
    bandwidth: float
    """Of the kernel density estimate, in units of Scott's rule."""
    clip: bool
    """Whether the tails have slope 1."""

    @classmethod
    def of(cls, settings: Sliced, n: float) -> "Rules":
        """Fill in what the settings leave open."""
        digits = math.log10(max(n, 1.0))
        knots = settings.knots or max(min(200, int(math.sqrt(n))), 50)
        edge = max(int(digits) - 1, 0)
        alpha = settings.regularization or (1 - 0.02 * digits, 1 - 0.001 * digits)
        # At least two knots are a spline, and at least one lies between the edges.
        knots = max(knots, 2)
        return cls(knots, min(edge, (knots - 1) // 2), alpha, settings.bandwidth, settings.slopes == "one")


class Marginal(NamedTuple):
    """Weighted samples of some axes, sorted; where an axis has fewer nodes, its last is repeated without mass."""

    nodes: Float[Tensor, "axes nodes"]
    masses: Float[Tensor, "axes nodes"]
    """Of sum 1."""
    spread: Float[Tensor, "axes"]
    """Standard deviation, corrected for n."""
    n: float
    """Effective number of objects."""

    @classmethod
    def of(cls, nodes: Tensor, masses: Tensor, spread: Tensor, n: float) -> "Marginal":
        """Sort nodes, normalize masses and drop nodes without any."""
        order = torch.where(masses > 0, nodes, math.inf).argsort(dim=1, stable=True)
        nodes, masses = nodes.gather(1, order), masses.gather(1, order)
        longest = int((masses > 0).sum(dim=1).max())
        nodes, masses = nodes[:, :longest], masses[:, :longest]
        last = torch.where(masses > 0, nodes, -math.inf).amax(dim=1, keepdim=True)
        return cls(torch.where(masses > 0, nodes, last), masses / masses.sum(dim=1, keepdim=True), spread, n)


def linear_histogram(
    values: Float[Tensor, "axes n"],
    weights: Float[Tensor, "n"] | None,
    low: Float[Tensor, "axes"],
    cell: Float[Tensor, "axes"],
    cells: int,
) -> Float[Tensor, "axes nodes"]:
    """Share each value's weight between the two nodes around it, so that the mean is kept.

    The kernel estimate changes by at most 0.242 (cell / bandwidth)² / 8.
    """
    axes, n = values.shape
    position = (values - low[:, None]) / cell[:, None]
    left = position.floor().clamp_(0, cells - 1)
    position = (position - left).clamp_(0, 1)
    index = left.long() + torch.arange(axes, device=values.device)[:, None] * (cells + 1)
    if weights is None:
        total = torch.bincount(index.flatten(), minlength=axes * (cells + 1)).to(values)
    else:
        position = position * weights
        total = torch.bincount(index.flatten(), weights.expand(axes, n).flatten(), axes * (cells + 1))
    right = torch.bincount(index.flatten(), position.flatten(), axes * (cells + 1))
    total = total - right
    total[1:] += right[:-1]
    return total.reshape(axes, cells + 1).clamp_min(0)


def mix(own: Marginal, pooled: Marginal, share: float, n: float, spread: Float[Tensor, "axes"]) -> Marginal:
    """Mix a share of the pooled data into a small class; `n` and `spread` are the mixture's."""
    nodes = torch.cat([own.nodes, pooled.nodes], dim=1)
    masses = torch.cat([(1 - share) * own.masses, share * pooled.masses], dim=1)
    return Marginal.of(nodes, masses, spread, n)


def knot_fractions(knots: int, edge: int) -> Float[Tensor, "knots"]:
    """Give the quantiles at which knots lie: evenly spaced, and `edge` more in each tail."""
    gap = 1 / (knots - 2 * edge + 1)
    inner = torch.arange(1, knots - 2 * edge + 1, dtype=torch.float64) * gap
    outer = torch.arange(1, edge + 1, dtype=torch.float64) * gap / (edge + 1)
    return torch.cat([outer, inner, 1 - gap + outer])


def fit_splines(marginal: Marginal, rules: Rules) -> Splines:
    """Map each axis to a Gaussian: knots at quantiles, heights from a kernel estimate of the distribution function.

    y = c Φ⁻¹(F(x)) with c² = 1 + h², so that kernels of width h leave a unit Gaussian as it is. An axis without spread
    keeps the identity.
    """
    spread = marginal.spread
    flat = ~(spread > 1e-12 * marginal.nodes.abs().amax(dim=1).clamp_min(1e-290)) | (marginal.n < 2)
    width = torch.where(flat, 1.0, rules.bandwidth * max(marginal.n, 1.0) ** -0.2 * spread)[:, None]
    scale = (width.square() + 1).sqrt()
    fractions = knot_fractions(rules.knots, rules.edge).to(width).expand(len(width), -1)
    x = quantiles(marginal, fractions, scale)
    u, tail_weights = _tails(marginal, x, rules.knots, scale)
    heights = scale * torch.special.ndtri(kernel_distribution(marginal, torch.cat([x, u], dim=1), width))
    y, v = heights[:, : x.shape[1]], heights[:, x.shape[1] :]
    x, y, kept = _separate(x, y)
    slopes = _inner_slopes(x, y)
    below, above = (torch.ones_like(spread) for _ in range(2))
    if not rules.clip:
        first, last = slice(0, TAIL), slice(TAIL, None)
        below = _end_slope(u[:, first] - x[:, :1], v[:, first] - y[:, :1], tail_weights[:, first], -1)
        above = _end_slope(u[:, last] - x[:, -1:], v[:, last] - y[:, -1:], tail_weights[:, last], 1)
    return _regularize(Splines(x, y, slopes), below, above, kept, flat | (kept < 2), rules)


def quantiles(
    marginal: Marginal, fractions: Float[Tensor, "axes q"], margin: Float[Tensor, "axes 1"]
) -> Float[Tensor, "axes q"]:
    """Interpolate linearly between nodes at the middle of their share of the cumulative mass.

    The distribution ends `margin` beyond the outermost nodes.
    """
    nodes, masses = marginal.nodes, marginal.masses
    middle = masses.cumsum(dim=1) - 0.5 * masses
    positions = torch.cat([torch.where(masses > 0, middle, 2.0), torch.full_like(margin, 3.0)], dim=1)
    # Node number `count` is the end of the distribution, whatever the padding holds.
    count = (masses > 0).sum(dim=1, keepdim=True)
    right = torch.minimum(torch.searchsorted(positions, fractions.contiguous()), count)
    left = (right - 1).clamp_min(0)
    last = nodes.shape[1] - 1
    x0 = torch.where(right > 0, nodes.gather(1, left), nodes[:, :1] - margin)
    p0 = torch.where(right > 0, positions.gather(1, left), 0.0)
    x1 = torch.where(right < count, nodes.gather(1, right.clamp_max(last)), nodes[:, -1:] + margin)
    p1 = torch.where(right < count, positions.gather(1, right), 1.0)
    return x0 + (x1 - x0) * ((fractions - p0) / (p1 - p0)).clamp(0, 1)


def kernel_distribution(
    marginal: Marginal, points: Float[Tensor, "axes q"], width: Float[Tensor, "axes 1"]
) -> Float[Tensor, "axes q"]:
    """Give the kernel estimate of the distribution function: Σ m_j Φ((x - t_j) / h)."""
    nodes, masses = marginal.nodes.contiguous(), marginal.masses
    axes, count = nodes.shape
    start = torch.searchsorted(nodes, points - REACH * width)
    stop = torch.searchsorted(nodes, points + REACH * width)
    cumulative = torch.cat([torch.zeros_like(width), masses.cumsum(dim=1)], dim=1)
    total = cumulative.gather(1, start)
    window = torch.arange(max(int((stop - start).max()), 1), device=nodes.device)
    step = max(BLOCK // (axes * len(window)), 1)
    for first in range(0, points.shape[1], step):
        part = slice(first, first + step)
        index = start[:, part, None] + window
        near = index < stop[:, part, None]
        index = index.clamp_max(count - 1).flatten(1)
        shape = (axes, -1, len(window))
        mass = torch.where(near, masses.gather(1, index).reshape(shape), 0.0)
        offset = (points[:, part, None] - nodes.gather(1, index).reshape(shape)) / width[:, :, None]
        total[:, part] += (mass * torch.special.ndtr(offset)).sum(dim=2)
    return total


def _tails(marginal: Marginal, x: Tensor, knots: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the points that the end slopes are fitted to: nine inner deciles of each tail, or its few nodes."""
    nodes, masses = marginal.nodes, marginal.masses
    deciles = torch.arange(1, 10).to(x) / 10
    points, weights = [], []
    for side in (-1, 1):
        end = x[:, :1] if side < 0 else x[:, -1:]
        beyond = torch.where((nodes - end) * side > 0, masses, 0.0)
        mass = beyond.sum(dim=1, keepdim=True)
        many = mass * marginal.n > 10
        fraction = mass * deciles if side < 0 else 1 - mass * deciles
        at_deciles = quantiles(marginal, fraction.clamp(0, 1), scale)
        few_masses, few = beyond.topk(min(TAIL, beyond.shape[1]), dim=1)
        u = x.new_zeros(len(x), TAIL) + end
        weight = torch.zeros_like(u)
        u[:, : few.shape[1]] = nodes.gather(1, few)
        weight[:, : few.shape[1]] = few_masses
        by_decile = torch.where(many, at_deciles, u[:, :9])
        points.append(torch.cat([by_decile, u[:, 9:]], dim=1))
        weights.append(torch.where(many, (torch.arange(TAIL).to(x) < 9).to(x), weight))
    return torch.cat(points, dim=1), torch.cat(weights, dim=1)


def _end_slope(u: Tensor, v: Tensor, weights: Tensor, side: int) -> Float[Tensor, "axes"]:
    """Fit a line through the end knot to the points beyond it; 1 where there is none."""
    use = (weights > 0) & v.isfinite() & (u * side > 0) & (v * side > 0)
    products = torch.where(use, weights * u * v, 0.0).sum(dim=1)
    squares = torch.where(use, weights * u.square(), 0.0).sum(dim=1)
    return torch.where(squares > 0, products / squares.clamp_min(1e-290), 1.0)


def _separate(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Int[Tensor, "axes"]]:
    """Drop knots that are not finite or too near to the one before; those left come first, then copies of the last."""
    axes, knots = x.shape
    good = y.isfinite() & x.isfinite()
    near = (x.diff(dim=1) <= SMALLEST_GAP) | (y.diff(dim=1) <= SMALLEST_GAP)
    if bool(good.all()) and not bool(near.any()):
        return x, y, torch.full((axes,), knots, device=x.device)
    last_x, last_y = (torch.full_like(x[:, 0], -math.inf) for _ in range(2))
    for knot in range(knots):
        keep = good[:, knot] & (x[:, knot] - last_x > SMALLEST_GAP) & (y[:, knot] - last_y > SMALLEST_GAP)
        good[:, knot] = keep
        last_x, last_y = torch.where(keep, x[:, knot], last_x), torch.where(keep, y[:, knot], last_y)
    kept = good.sum(dim=1)
    order = torch.argsort((~good).to(torch.int8), dim=1, stable=True)
    place = torch.minimum(torch.arange(knots, device=x.device)[None], (kept[:, None] - 1).clamp_min(0))
    order = order.gather(1, place)
    return x.gather(1, order), y.gather(1, order), kept


def _inner_slopes(x: Tensor, y: Tensor) -> Tensor:
    """Weigh the secants on both sides by each other's width; ends are set later."""
    widths, slopes = x.diff(dim=1), torch.ones_like(x)
    secants = y.diff(dim=1) / widths.clamp_min(1e-290)
    inner = (secants[:, :-1] * widths[:, 1:] + secants[:, 1:] * widths[:, :-1]) / (widths[:, 1:] + widths[:, :-1])
    slopes[:, 1:-1] = inner
    return slopes


def _regularize(splines: Splines, below: Tensor, above: Tensor, kept: Tensor, flat: Tensor, rules: Rules) -> Splines:
    """Mix in the identity, set the ends' slopes, and fill dropped knots on the upper tail, which changes nothing."""
    first, second = rules.alpha
    x, knots = splines.x, splines.x.shape[1]
    y = (1 - first) * splines.y + first * x
    slopes = (1 - first) * splines.slope + first
    place = torch.arange(knots, device=x.device)[None]
    end = (1 - second) * above[:, None] + second
    slopes = torch.where(place >= kept[:, None] - 1, end, slopes)
    slopes[:, 0] = (1 - second) * below + second
    more = (place - kept[:, None] + 1).clamp_min(0)
    x, y = x + more, y + more * end
    ladder = torch.linspace(-1, 1, knots).to(x).expand_as(x)
    away = flat[:, None]
    return Splines(
        torch.where(away, ladder, x), torch.where(away, ladder, y), torch.where(away, torch.ones_like(x), slopes)
    )


def pad(splines: Splines, knots: int) -> Splines:
    """Add knots on the upper tail, a straight line, until there are so many."""
    missing = knots - splines.x.shape[-1]
    steps = torch.arange(1, missing + 1).to(splines.x)
    end = splines.slope[..., -1:]
    return Splines(
        torch.cat([splines.x, splines.x[..., -1:] + steps], dim=-1),
        torch.cat([splines.y, splines.y[..., -1:] + steps * end], dim=-1),
        torch.cat([splines.slope, end.expand(*end.shape[:-1], missing)], dim=-1),
    )
