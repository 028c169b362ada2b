"""The latents of a store's training spectra, and the fit of their density.

Every worker encodes its own share and keeps it: ten numbers a spectrum, so that fifty million take 2 GB over all
workers. The sliced flow merges sums over workers; the spline flow averages gradients. Where the number of workers may
change (`train.workers` is a range) one of them gets all latents and fits alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float32, Int64
from torch import Tensor, nn

from distspec.addresses import Place
from distspec.config import Density, Sliced, Spline
from distspec.models.autoencoders.dense import Progress
from distspec.models.flows.density import Flow, Labelled, LatentDensity, classes_of, fit_classes
from distspec.models.flows.sliced import Layers, Sample, fit_sliced
from distspec.models.flows.sliced_flow import SlicedFlow
from distspec.models.training.feed import Feed
from distspec.models.training.group import Group, OnlyHere, Shares
from distspec.models.training.loop import Epoch, best_weights, fit, keep_state, newest_state
from distspec.models.training.steps import ByShares

if TYPE_CHECKING:
    from distspec.models.flows.spline_flow import SplineFlow

__all__ = ["PASSES", "Latents", "collect", "fit_density", "labels_of"]

PASSES = ("density", "relabelled")
"""Names of the first fit and of the one after the relabelling."""

_KEPT = 10
"""Layers after which the state of a sliced flow is kept; a kill costs no more."""


@dataclass(frozen=True)
class Latents:
    """Latents of one worker's spectra.

    Arguments:
        rows: in the store.
        values: the latents.
        labels: class of each.
    """

    rows: Int64[Tensor, "n"]
    values: Float32[Tensor, "n latents"]
    labels: Int64[Tensor, "n"]


@torch.no_grad()
def collect(
    model: nn.Module, feed: Feed, chosen: Bool[np.ndarray, "rows"], labels: Int64[np.ndarray, "rows"]
) -> Latents:
    """Encode the chosen spectra of this worker's share.

    Arguments:
        model: the autoencoder.
        feed: gives the spectra.
        chosen: rows of the training or of the validation set.
        labels: class of every row of the store.
    """
    model.eval()
    rows, values = [np.zeros(0, np.int64)], [torch.zeros(0, int(model.latents), device=feed.device)]  # type: ignore[arg-type]
    for part, batch in feed.in_order(chosen):
        rows.append(part)
        values.append(model.encode(*batch).float())  # type: ignore[operator]
    joined = np.concatenate(rows)
    place = torch.from_numpy(joined).to(feed.device)
    return Latents(place, torch.cat(values), torch.from_numpy(labels[joined]).to(feed.device))


def labels_of(settings: Density, feed: Feed) -> tuple[Int64[np.ndarray, "rows"], tuple[str, ...]]:
    """Give every row its class by the catalogue columns that the settings name; -1 where it is not used."""
    labels = np.full(feed.store.rows, -1)
    used = np.flatnonzero(feed.training | feed.validation)
    if not settings.labels:
        labels[used] = 0
        return labels, ("all",)
    labels[used], names = classes_of([feed.store.column(name, used) for name in settings.labels])
    return labels, names


def fit_density(
    settings: Sliced | Spline,
    training: Latents,
    validation: Latents,
    names: tuple[str, ...],
    *,
    state: Place,
    seed: int,
    group: Group,
    on_epoch: Callable[[Epoch], None],
) -> tuple[LatentDensity, dict[str, Any], dict[str, list[Epoch]]]:
    """Fit the density of latents; with labels one for each class, and again after relabelling.

    Arguments:
        settings: of the flow.
        training: this worker's share.
        validation: this worker's share.
        names: of the classes.
        state: folder under which each fit keeps its state.
        seed: of what is random.
        group: merges over workers.
        on_epoch: called when an epoch or a layer is done and kept.

    Returns:
        The density, what the relabelling did, and the numbers of the epochs or layers of each fit.
    """
    histories: dict[str, list[Epoch]] = {}

    def one_fit(labels: Tensor, held: Tensor, name: str) -> Flow:
        phase = PASSES[name != "catalogue"]
        parts = _known(training, labels), _known(validation, held)
        rest = (*parts, len(names), state / phase, seed, group, on_epoch)
        flow: Flow
        if isinstance(settings, Sliced):
            flow, histories[phase] = _fit_sliced(settings, *rest)
        else:
            flow, histories[phase] = _fit_spline(settings, *rest)
        return flow

    relabel = settings.relabel and bool(settings.labels)
    if isinstance(settings, Sliced) and not settings.labels:
        # Imported here, as the other flow is below: scikit-learn takes a second, and most trainings do without.
        from distspec.models.flows.components import find_components

        first, held, count = find_components(
            training.values, validation.values, training.rows, settings.components, seed, group
        )
        training, validation = replace(training, labels=first), replace(validation, labels=held)
        names = tuple(f"component {number}" for number in range(1, count + 1)) if count > 1 else names
    known, judged = (Labelled(part.values, part.labels) for part in (training, validation))
    density, facts = fit_classes(one_fit, known, judged, names, relabel=relabel, group=group)
    return density, facts, histories


def _known(part: Latents, labels: Tensor) -> Latents:
    """Give the rows that have a class (not -1)."""
    known = labels >= 0
    return Latents(part.rows[known], part.values[known], labels[known])


def _fit_sliced(
    settings: Sliced,
    training: Latents,
    validation: Latents,
    classes: int,
    state: Place,
    seed: int,
    group: Group,
    on_epoch: Callable[[Epoch], None],
) -> tuple[SlicedFlow, list[Epoch]]:
    begun = None
    folder, history = newest_state(state)
    if folder is not None:
        tensors = best_weights(state, "flow")
        start = SlicedFlow(**_shape(tensors))
        start.load_state_dict(tensors)
        begun = Layers(start.to(training.values.device), history)
    done = list(history)

    newest: list[SlicedFlow] = []

    def kept(flow: SlicedFlow, layers: list[Epoch]) -> None:
        done[:], newest[:] = layers, [flow]
        # A state holds all layers: to write each time would grow with their square.
        if len(layers) % _KEPT == 0:
            keep()
        on_epoch(layers[-1])

    def keep() -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            keep_state(state, len(done) - 1, {"flow": newest[0].state_dict()}, done)

    first, held = (Sample(part.values, part.labels, part.rows, None) for part in (training, validation))
    flow = fit_sliced(settings, first, held, classes, seed, group, begun, kept)
    if newest and len(done) % _KEPT:
        keep()
    return flow, done


class _Batches:
    """Latents in batches for gradient descent; a new order every epoch."""

    def __init__(self, training: Latents, validation: Latents, batch: int, seed: int, group: Group) -> None:
        self._training, self._validation, self._seed = training, validation, seed
        device = training.values.device
        self._workers = int(group.sum(torch.ones(1, device=device)))
        rows = int(group.sum(torch.tensor([len(training.rows)], device=device)))
        self._batch = max(1, min(batch, rows) // self._workers)
        self.steps = max(1, rows // (self._batch * self._workers))

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        count = len(self._training.rows)
        random = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=random)
        # A worker with a short share begins it again.
        order = order.repeat(-(-self.steps * self._batch // max(count, 1)))
        for start in range(0, self.steps * self._batch, self._batch):
            index = order[start : start + self._batch].to(self._training.values.device)
            yield self._training.values[index], self._training.labels[index]

    def validation_batches(self) -> Iterator[tuple[Tensor, ...]]:
        for start in range(0, len(self._validation.rows), 8192):
            part = slice(start, start + 8192)
            yield self._validation.values[part], self._validation.labels[part]


class _NegativeLogLikelihood(nn.Module):
    """The loss of a flow, as `loop.fit` wants it."""

    def __init__(self, flow: "SplineFlow") -> None:
        super().__init__()
        self.flow = flow

    def forward(self, values: Tensor, labels: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        """Give (sum of -log p, number) of a batch."""
        if not len(values):
            # A worker whose share is empty has part in every step all the same, with gradients of zero.
            nothing = sum((weight.sum() * 0.0 for weight in self.flow.parameters()), torch.zeros(()).to(values.device))
            return nothing, torch.zeros_like(nothing).detach()
        return self.flow.loss(values, labels if self.flow.classes > 1 else None)


def _fit_spline(
    settings: Spline,
    training: Latents,
    validation: Latents,
    classes: int,
    state: Place,
    seed: int,
    group: Group,
    on_epoch: Callable[[Epoch], None],
) -> tuple["SplineFlow", list[Epoch]]:
    from distspec.models.flows.spline_flow import SplineFlow

    values = training.values.double()
    torch.manual_seed(seed)
    flow = SplineFlow(settings, values.shape[1], classes).to(values.device)
    count = group.sum(torch.tensor([float(len(values))], dtype=torch.float64, device=values.device))
    mean = group.sum(values.sum(dim=0)) / count
    spread = values - mean
    flow.settle(mean, group.sum(spread.T @ spread) / (count - 1).clamp_min(1))
    feed = _Batches(training, validation, settings.fit.batch, seed, group)
    objective = _NegativeLogLikelihood(flow)
    driven = ByShares((feed,), Shares(1)) if isinstance(group, OnlyHere) else feed
    epochs = fit(flow, objective, driven, settings.fit, state, seed, on_epoch, "train.density.fit")
    return flow.eval(), epochs


def _shape(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Read the shape of a sliced flow off its tensors."""
    layers, classes, directions, knots = tensors["x"].shape
    latents = tensors["mean"].shape[1]
    return {"latents": latents, "classes": classes, "layers": layers, "directions": directions, "knots": knots}
