"""Fit of the sliced iterative normalizing flow: layer by layer, without gradient descent, over many workers.

References:
    Dai & Seljak (2021), SINF (GIS); Böhm, Kim & Juneau (PAE), §4, for classes.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from distspec.config import Sliced
from distspec.models.flows.directions import MOST_ROWS, find_directions
from distspec.models.flows.marginals import (
    CELLS_IN_BANDWIDTH,
    FEWEST_CELLS,
    MOST_CELLS,
    Marginal,
    Rules,
    fit_splines,
    linear_histogram,
    mix,
    pad,
)
from distspec.models.flows.sliced_flow import SlicedFlow, apply_layer, chunks, log_normal, of_classes, sorted_by_class
from distspec.models.flows.spline import Splines, lookup
from distspec.models.training.group import ALONE, Group

__all__ = ["Layers", "Sample", "fit_sliced", "hash_keys"]

MOST_DIRECTIONS = 16
"""Directions of a layer where the public rule takes all dimensions: hundreds of latents would take hundreds."""


@dataclass(frozen=True)
class Sample:
    """One worker's rows.

    Attributes:
        latents: any float; the fit is in float64.
        labels: class of each row; rows of -1 are left out.
        keys: number of each spectrum in the survey, unique over all workers: draws go by it, so that they do not
            depend on how rows are spread.
        weights: none is 1 each.
    """

    latents: Float[Tensor, "n D"]
    labels: Int64[Tensor, "n"]
    keys: Int64[Tensor, "n"]
    weights: Float[Tensor, "n"] | None = None


class Layers(NamedTuple):
    """A fit on its way: the flow of all layers so far, and what is known of each."""

    flow: SlicedFlow
    history: Sequence[dict[str, float]]


class _Rows:
    """A worker's rows on their way through the layers, sorted by class."""

    def __init__(self, sample: Sample, classes: int) -> None:
        # Rows without weight must not stretch the histograms.
        use = sample.labels >= 0 if sample.weights is None else (sample.labels >= 0) & (sample.weights > 0)
        weights = None if sample.weights is None else sample.weights[use]
        sample = Sample(sample.latents[use], sample.labels[use], sample.keys[use], weights)
        order, self.bounds = sorted_by_class(sample.labels, classes)
        self.x = sample.latents[order].double().T.contiguous()
        self.labels, self.keys = sample.labels[order], sample.keys[order]
        self.weights = None if sample.weights is None else sample.weights[order].double()
        self.volume = torch.zeros_like(self.x[0])

    def slices(self) -> list[slice]:
        """Rows of each class."""
        return [slice(*pair) for pair in itertools.pairwise(self.bounds)]

    def begin(self, flow: SlicedFlow) -> None:
        """Apply the whole flow."""
        for part, tables in chunks(self.bounds, self.x.device):
            x, volume = flow.forward_columns(self.x[None, :, part], tables)
            self.x[:, part], self.volume[part] = x[0], volume[0]

    def apply(self, A: Tensor, splines: Splines) -> None:
        """Apply one more layer."""
        table = lookup(splines)
        for part, tables in chunks(self.bounds, self.x.device):
            own = Splines(*(knots[tables] for knots in splines))
            x, more = apply_layer(self.x[None, :, part], A, own, of_classes(table, tables))
            self.x[:, part] = x[0]
            self.volume[part] += more[0]

    def mean_log_prob(self, group: Group) -> float:
        """Mean of log p over all workers' rows; NaN where there is none."""
        values = log_normal(self.x) + self.volume
        weights = torch.ones_like(values) if self.weights is None else self.weights
        total = group.sum(torch.stack([(weights * values).sum(), weights.sum()]))
        return float((total[0] / total[1]).item())


class _Counts:
    """Number of rows, effective number and sum of weights of each class, over all workers."""

    def __init__(self, rows: _Rows, group: Group) -> None:
        ones = torch.ones_like(rows.volume)
        weights = ones if rows.weights is None else rows.weights
        parts = [torch.stack([ones[s].sum(), weights[s].sum(), weights[s].square().sum()]) for s in rows.slices()]
        merged = group.sum(torch.stack(parts))
        self.rows = int(merged[:, 0].sum())
        self.weight: list[float] = merged[:, 1].tolist()
        total = merged.sum(dim=0)
        self.effective: list[float] = (merged[:, 1].square() / merged[:, 2].clamp_min(1e-300)).tolist()
        self.total_weight = float(total[1])
        self.total_effective = float(total[1].square() / total[2])


@torch.no_grad()
def fit_sliced(
    settings: Sliced,
    training: Sample,
    validation: Sample,
    classes: int,
    seed: int,
    group: Group = ALONE,
    begun: Layers | None = None,
    on_layer: Callable[[SlicedFlow, list[dict[str, float]]], None] | None = None,
) -> SlicedFlow:
    """Add layers until the validation set's mean log p no longer grows, and keep the best number of them.

    Each row is mapped with its own class alone. Without validation rows the training rows decide.

    Arguments:
        settings: what is none there follows the rules of the public code.
        training: this worker's rows.
        validation: this worker's rows.
        classes: labels are less than this.
        seed: of draws of rows and of random starts.
        group: who sums over workers.
        begun: what `on_layer` was given: the fit goes on from it, to the same result.
        on_layer: called on every worker after every layer, with all layers so far and what is known of each.

    Returns:
        The flow, on the device of the training rows.
    """
    return _Fit(settings, training, validation, classes, seed, group).run(begun, on_layer)


class _Fit:
    """What stays the same from layer to layer."""

    def __init__(
        self, settings: Sliced, training: Sample, validation: Sample, classes: int, seed: int, group: Group
    ) -> None:
        self.settings, self.classes, self.seed, self.group = settings, classes, seed, group
        self.training, self.validation = _Rows(training, classes), _Rows(validation, classes)
        self.counts = _Counts(self.training, group)
        bad = sum(rows.x.isfinite().logical_not().any(dim=0).sum() for rows in (self.training, self.validation))
        if found := int(group.sum(torch.as_tensor(bad))):
            raise ValueError(f"latents of {found} rows are not finite; leave these rows out")
        if not self.counts.total_weight > 0:
            raise ValueError("there are no training rows; a density needs some")
        self.D = training.latents.shape[1]
        n = self.counts.total_effective
        few = min(self.D, MOST_DIRECTIONS) if self.D <= 8 or n / self.D < 20 else 8
        self.K = min(settings.directions or few, self.D)
        self.iterations = min(round(n) // self.D, 200)
        self.shares = [
            max(0.0, 1 - count / settings.shrink_below) if settings.shrink_below else float(count == 0)
            for count in self.counts.effective
        ]
        self.sizes = [self._size(label) for label in range(classes)]
        self.rules = [Rules.of(settings, size) for size in self.sizes]

    def run(
        self,
        begun: Layers | None,
        on_layer: Callable[[SlicedFlow, list[dict[str, float]]], None] | None,
    ) -> SlicedFlow:
        """Add layers."""
        device = self.training.x.device
        flow = self._whitening() if begun is None else self._checked(begun.flow).to(device)
        history = [] if begun is None else list(begun.history)
        if len(history) != len(flow.directions):
            raise ValueError(f"the history of {len(history)} layers is not that of a start of {len(flow.directions)}")
        first = flow.with_layers([])
        layers = [(flow.directions[layer], flow.splines(layer)) for layer in range(len(flow.directions))]
        judge = _Judge(self.settings.patience)
        for rows in (self.training, self.validation):
            rows.begin(first)
        judge.see(self._measure()["validation_log_prob"])
        for entry in history:
            judge.see(entry["validation_log_prob"])
        for layer in layers:
            for rows in (self.training, self.validation):
                rows.apply(*layer)
        while len(layers) < self.settings.layers and not judge.tired:
            layer, distances = self._layer(len(layers))
            for rows in (self.training, self.validation):
                rows.apply(*layer)
            layers.append(layer)
            ends = {"wasserstein_first": float(distances[0]), "wasserstein_last": float(distances[-1])}
            history.append(self._measure() | ends)
            judge.see(history[-1]["validation_log_prob"])
            if on_layer is not None:
                on_layer(first.with_layers(layers), list(history))
        return first.with_layers(layers[: judge.best])

    def _checked(self, start: SlicedFlow) -> SlicedFlow:
        """Refuse a flow of other latents or classes."""
        if (start.latents, start.classes) != (self.D, self.classes):
            raise ValueError(
                f"the start maps {start.latents} latents of {start.classes} classes, not {self.D} of {self.classes}"
            )
        return start

    def _measure(self) -> dict[str, float]:
        training = self.training.mean_log_prob(self.group)
        validation = self.validation.mean_log_prob(self.group)
        return {"train_log_prob": training, "validation_log_prob": training if math.isnan(validation) else validation}

    def _whitening(self) -> SlicedFlow:
        """Give zero mean and unit covariance: to each class, or to the pooled data."""
        flow = SlicedFlow(self.D, self.classes).to(self.training.x.device)
        if not self.settings.whiten:
            return flow
        pooled = self._linear(slice(0, self.training.x.shape[1]), self.counts.total_weight, self.counts.total_effective)
        for label, part in enumerate(self.training.slices()):
            mean, covariance = pooled
            share = self.shares[label] if self.settings.whiten_each else 1.0
            if share < 1:
                own = self._linear(part, self.counts.weight[label], self.counts.effective[label])
                apart = own[0] - mean
                # The mixture of own and pooled data: within and between the two parts.
                covariance = (1 - share) * own[1] + share * covariance + share * (1 - share) * apart.outer(apart)
                mean = (1 - share) * own[0] + share * mean
            # The symmetric map, which does not turn with nearly equal eigenvalues.
            values, basis = torch.linalg.eigh(self.group.broadcast(covariance))
            top = values[-1]
            values = torch.where(top > 0, values.clamp_min(1e-12 * top), 1.0)
            flow.whiten[label] = self.group.broadcast(basis @ (values.rsqrt()[:, None] * basis.T))
            flow.unwhiten[label] = self.group.broadcast(basis @ (values.sqrt()[:, None] * basis.T))
            flow.mean[label] = self.group.broadcast(mean)
        return flow

    def _linear(self, part: slice, weight: float, effective: float) -> tuple[Tensor, Tensor]:
        """Give mean and covariance of some rows, over all workers."""
        x = self.training.x[:, part]
        weights = torch.ones_like(x[0]) if self.training.weights is None else self.training.weights[part]
        mean = self.group.sum(x @ weights) / weight
        centered = x - mean[:, None]
        # Of weighted rows the unbiased estimate divides by 1 - Σw².
        correction = 1 - 1 / max(effective, 2.0)
        return mean, self.group.sum(centered * weights @ centered.T) / weight / correction

    def _layer(self, number: int) -> tuple[tuple[Tensor, Splines], Tensor]:
        """Find directions, then the splines of every class along them."""
        drawn = self._draw(number)
        A, distances = find_directions(
            drawn.latents,
            self.K,
            torch.Generator().manual_seed(self.seed * 1_000_003 + number),
            self.iterations,
            weights=drawn.weights,
            labels=drawn.labels if self.settings.balance else None,
        )
        A = self.group.broadcast(A)
        splines = [
            fit_splines(marginal, rules)
            for marginal, rules in zip(self._marginals(A.T @ self.training.x), self.rules, strict=True)
        ]
        # Rounding may drop a knot on one machine and not on another.
        longest = torch.tensor([max(spline.x.shape[-1] for spline in splines)], device=self.training.x.device)
        most = int(self.group.maximum(longest))
        parts = [pad(spline, most) for spline in splines]
        tables = [torch.stack(tables) for tables in zip(*parts, strict=True)]
        device = self.training.x.device
        return (A, Splines(*(self.group.broadcast(table.to(device)) for table in tables))), distances

    def _draw(self, number: int) -> Sample:
        """Draw at most n_A rows by a hash of their keys, and gather them in the order of the hash."""
        rows = self.training
        most = min(int(1e5 * math.log10(self.D)), MOST_ROWS) if self.D > 1 else MOST_ROWS
        ticket = hash_keys(rows.keys, self.seed * 1_000_003 + number)
        chosen = ticket <= int(min(most / self.counts.rows, 1.0) * (2**62 - 1))
        keys, labels = self.group.gather(rows.keys[chosen]), self.group.gather(rows.labels[chosen])
        latents = self.group.gather(rows.x[:, chosen].T.contiguous())
        weights = None if rows.weights is None else self.group.gather(rows.weights[chosen])
        order = self.group.gather(ticket[chosen]).argsort(stable=True)
        return Sample(latents[order], labels[order], keys[order], None if weights is None else weights[order])

    def _size(self, label: int) -> float:
        """Effective number of objects behind a class's splines, with what it borrows."""
        own, share, counts = self.counts.effective[label], self.shares[label], self.counts
        if share == 0:
            return own
        part = counts.weight[label] / counts.total_weight
        # Weights of own and of all other rows, squared and summed.
        inside = (1 - share + share * part) ** 2 / own if own > 0 else 0.0
        rest = counts.total_effective - own
        outside = (share * (1 - part)) ** 2 / rest if rest > 0 else 0.0
        return 1 / (inside + outside)

    def _marginals(self, projections: Float[Tensor, "K n"]) -> list[Marginal]:
        """Summarize every class along every direction, over all workers, on the CPU."""
        slices, weights = self.training.slices(), self.training.weights
        if any(self.shares):
            slices = [*slices, slice(0, projections.shape[1])]
        sizes = [*self.counts.effective, self.counts.total_effective]
        low, high, mean, variance = self._moments(projections, slices)
        grids, parts = [], []
        for part, size, bottom, top, square in zip(slices, sizes, low, high, variance, strict=False):
            reach, spread = top - bottom, square.sqrt()
            width = self.settings.bandwidth * max(size, 1.0) ** -0.2 * spread
            wanted = (reach * CELLS_IN_BANDWIDTH / width.clamp_min(1e-290)).nan_to_num().max()
            cells = int(min(max(float(wanted) + 1, FEWEST_CELLS), MOST_CELLS))
            cell = torch.where(reach > 0, reach / cells, 1.0)
            own = None if weights is None else weights[part]
            parts.append(linear_histogram(projections[:, part], own, bottom, cell, cells))
            grids.append(bottom[:, None] + cell[:, None] * torch.arange(cells + 1).to(cell))
        merged = self.group.sum(torch.cat([part.flatten() for part in parts])).cpu()
        masses = torch.split(merged, [part.numel() for part in parts])
        marginals = [
            _marginal(grid.cpu(), mass.reshape(grid.shape), square.cpu(), size)
            for grid, mass, square, size in zip(grids, masses, variance, sizes, strict=False)
        ]
        if not any(self.shares):
            return [marginal for marginal in marginals if marginal is not None]
        pooled = marginals[-1]
        assert pooled is not None
        return [
            self._shrunk(own, pooled, label, mean[[label, -1]].cpu(), variance[[label, -1]].cpu())
            for label, own in enumerate(marginals[:-1])
        ]

    def _shrunk(
        self, own: Marginal | None, pooled: Marginal, label: int, mean: Float[Tensor, "2 K"], variance: Tensor
    ) -> Marginal:
        """Let a small class lean on the pooled data."""
        share = self.shares[label]
        if own is None or share == 1:
            return pooled
        if share == 0:
            return own
        # Of the mixture: within and between the two parts.
        within = (1 - share) * variance[0] + share * variance[1]
        between = share * (1 - share) * (mean[0] - mean[1]).square()
        return mix(own, pooled, share, self.sizes[label], (within + between).sqrt())

    def _moments(self, projections: Tensor, slices: list[slice]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Least, greatest, mean and unbiased variance of each class along each direction."""
        axes = len(projections)
        low = projections.new_full((len(slices), axes), math.inf)
        high = -low
        first, second = torch.zeros_like(low), torch.zeros_like(low)
        total = torch.zeros_like(low[:, :1])
        for index, part in enumerate(slices):
            values = projections[:, part]
            if values.shape[1] == 0:
                continue
            own = None if self.training.weights is None else self.training.weights[part]
            low[index], high[index] = values.amin(dim=1), values.amax(dim=1)
            # Data are near zero mean and unit variance, so that these sums do not cancel.
            weighted = values if own is None else values * own
            total[index] = values.shape[1] if own is None else own.sum()
            first[index], second[index] = weighted.sum(dim=1), (weighted * values).sum(dim=1)
        low, high = self.group.minimum(low), self.group.maximum(high)
        merged = self.group.sum(torch.cat([first, second, total], dim=1))
        first, second, total = merged[:, :axes], merged[:, axes:-1], merged[:, -1:].clamp_min(1e-300)
        mean = first / total
        sizes = [*self.counts.effective, self.counts.total_effective][: len(slices)]
        correction = 1 - 1 / torch.tensor(sizes).to(mean).clamp_min(2.0)[:, None]
        variance = (second / total - mean.square()).clamp_min(0) / correction
        empty = ~low.isfinite()
        return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0), mean, variance


def _marginal(grid: Tensor, masses: Tensor, variance: Tensor, n: float) -> Marginal | None:
    return Marginal.of(grid, masses, variance.sqrt(), n) if bool((masses > 0).any()) else None


class _Judge:
    """Remembers the best number of layers, and how long ago that was."""

    def __init__(self, patience: int) -> None:
        self.patience, self.seen, self.best, self.value = patience, -1, 0, -math.inf

    def see(self, log_prob: float) -> None:
        """Take note of the validation set's mean log p after one more layer."""
        self.seen += 1
        if log_prob > self.value:
            self.best, self.value = self.seen, log_prob

    @property
    def tired(self) -> bool:
        """Whether patience has run out."""
        return self.seen - self.best >= self.patience


def hash_keys(keys: Int64[Tensor, "n"], salt: int) -> Int64[Tensor, "n"]:
    """Mix keys to numbers uniform in [0, 2^62) (splitmix64; integers wrap)."""
    mixed = keys * -7046029254386353131 + (salt * 6364136223846793005 + 1442695040888963407) % 2**62
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ ((mixed >> shift) & (2 ** (64 - shift) - 1))) * factor
    return (mixed ^ (mixed >> 31)) & (2**62 - 1)
