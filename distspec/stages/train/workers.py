"""What a worker of `distspec train` does: up to three fits, one after the other.

An autoencoder; with `train.second` another one on what the first makes of the spectra; with `train.density` the density
of the latents. Each keeps its state, so that a training that was killed goes on and ends with the same weights. Nothing
here writes to MLflow: the driver follows the states. With `train.workers = { min, max }` the work is cut into `max`
shares, and a worker does those that fall to it.
"""

import faulthandler
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import nn

from distspec import models
from distspec.addresses import Place
from distspec.config import Sliced, Train
from distspec.models.autoencoders.dense import TwoStage
from distspec.models.checkpoint import Checkpoint
from distspec.models.training.feed import Feed
from distspec.models.training.group import Alone, Group, OnlyHere, Shares, Together
from distspec.models.training.loop import Epoch, Reconstruction, fit
from distspec.models.training.steps import Batches, ByShares
from distspec.runtime.threads import one_thread
from distspec.stages.train.accuracy import measure
from distspec.stages.train.density import PASSES, Latents, collect, fit_density, labels_of

_PASSING = ("seconds", "waiting")
"""Numbers of an epoch that depend on the machine: they go to MLflow and not into the checkpoint."""


@dataclass(frozen=True)
class TrainingJob:
    """What a training worker needs; small and picklable."""

    store: str
    state: Place
    settings: Train
    seed: int
    """Of the validation set."""
    seconds: float = 0.0
    """In which an epoch has to end, or the worker is ended; 0 waits for ever."""
    variables: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Of the environment; printed nowhere."""

    @property
    def random(self) -> int:
        """Seed of everything else."""
        return self.seed if self.settings.seed is None else self.settings.seed


def phases_of(settings: Train) -> dict[str, tuple[int, str]]:
    """Name the fits in their order, each with the largest number of its epochs and what these are called."""
    phases = {"first": (settings.epochs, "epoch")}
    if settings.second is not None:
        phases["second"] = (settings.second.epochs, "epoch")
    if settings.density is not None:
        density = settings.density
        passes = PASSES if density.labels and density.relabel else PASSES[:1]
        steps = (density.layers, "layer") if isinstance(density, Sliced) else (density.fit.epochs, "epoch")
        phases |= dict.fromkeys(passes, steps)
    return phases


def train_loop(config: dict[str, Any]) -> None:
    """Do all fits in one worker; rank 0 keeps the states and writes the model."""
    job: TrainingJob = config["job"]
    settings, state = job.settings, job.state
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), max(context.get_world_size(), 1)
    device = ray.train.torch.get_device()
    shares = Shares(settings.shares, rank, world) if settings.shares else None
    parts, count = (range(rank, rank + 1), world) if shares is None else (shares.mine, shares.count)
    feeds = tuple(Feed(job.store, settings, job.seed, part, count, device, feeds=len(parts)) for part in parts)
    feed = feeds[0]
    group: Group | Shares = shares or (Together() if world > 1 else Alone())
    phases: dict[str, list[Epoch]] = {}
    model = _autoencoder(job, feeds, shares, device, phases)
    accuracy = measure(model, feeds, group)
    density, density_facts = None, dict[str, Any]()
    if settings.density is not None:
        labels, names = labels_of(settings.density, feed)
        training, validation = (
            _collected([collect(model, one, chosen, labels) for one in feeds], shares)
            for chosen in (feed.training, feed.validation)
        )
        if shares is None or rank == 0:
            one = OnlyHere() if isinstance(group, Shares) else group
            density, density_facts, fits = fit_density(
                settings.density,
                training,
                validation,
                names,
                state=state,
                seed=job.random,
                group=one,
                on_epoch=_reporting(job),
            )
            phases |= fits
    if rank == 0:
        told = {
            phase: [{k: v for k, v in epoch.items() if k not in _PASSING} for epoch in epochs]
            for phase, epochs in phases.items()
        }
        facts = {"phases": told, "accuracy": accuracy.table(), "store": feed.store.digest, "torch": torch.__version__}
        facts |= {"density": density_facts} if density_facts else {}
        Checkpoint(
            model.eval(),
            settings.model,
            feed.store.grid,
            feed.store.recipe,
            facts,
            settings.second is not None,
            density,
            settings.density,
        ).save(state / "model")
    if shares is None:
        ray.train.report({"done": 1.0})


@one_thread()
def train_loop_of_worker(config: dict[str, Any]) -> None:
    """Do all fits in a worker, which has one core; the driver, which trains alone, has all."""
    job: TrainingJob = config["job"]
    os.environ.update(job.variables)
    _watch(job)
    try:
        train_loop(config)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _watch(job: TrainingJob) -> None:
    """End this worker if it does not come back here in time, whatever it hangs in."""
    if job.seconds:
        faulthandler.dump_traceback_later(job.seconds, exit=True, file=2)


def _reporting(job: TrainingJob) -> Callable[[Epoch], None]:
    """Give what tells Ray and the watch of an epoch.

    By shares the workers are not of equal work at the end, and Ray would let them wait for each other's reports; the
    driver follows the states anyway.
    """

    def report(epoch: Epoch) -> None:
        _watch(job)
        if not job.settings.shares:
            ray.train.report(dict(epoch))

    return report


def _collected(parts: list[Latents], shares: Shares | None) -> Latents:
    """Give the latents of this worker or, by shares, of all of them."""
    if shares is None:
        return parts[0]
    rows, values, labels = ([getattr(part, name) for part in parts] for name in ("rows", "values", "labels"))
    return Latents(shares.gather(rows), shares.gather(values), shares.gather(labels))


def _autoencoder(
    job: TrainingJob,
    feeds: tuple[Feed, ...],
    shares: Shares | None,
    device: torch.device,
    phases: dict[str, list[Epoch]],
) -> nn.Module:
    """Fit the autoencoder, and the second one behind it if the settings ask for it."""
    settings, state, report = job.settings, job.state, _reporting(job)

    def driven(feeds: tuple[Batches, ...]) -> Batches | ByShares:
        return feeds[0] if shares is None else ByShares(feeds, shares)

    torch.manual_seed(job.random)
    first = models.build(settings.model, feeds[0].store.grid).to(device)
    first.settle(feeds[0].mean().to(device))  # type: ignore[operator]
    objective = Reconstruction(first, settings.loss)
    phases["first"] = fit(first, objective, driven(feeds), settings, state / "first", job.random, report)
    if settings.second is None:
        return first
    second = models.build(settings.model, feeds[0].store.grid).to(device)
    second.load_state_dict(first.state_dict())
    model = TwoStage(first.requires_grad_(False).eval(), second)
    objective = Reconstruction(second, "mse", model)
    batch = settings.second.batch
    again = driven(tuple(feed.with_batch(batch) for feed in feeds))
    where, section = state / "second", "train.second"
    phases["second"] = fit(second, objective, again, settings.second, where, job.random, report, section)
    return model
