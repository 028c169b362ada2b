"""What a worker of `distspec train` does: up to three fits, one after the other.

An autoencoder; with `train.second` another one on what the first makes of the spectra; with `train.density` the density
of the latents. Each keeps its state, so that a training that was killed goes on and ends with the same weights. Nothing
here writes to MLflow: the driver follows the states.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import nn

from distspec import models
from distspec.config import Sliced, Train
from distspec.models.autoencoders.dense import TwoStage
from distspec.models.checkpoint import Checkpoint
from distspec.models.training.feed import Feed
from distspec.models.training.group import Alone, Group, Together
from distspec.models.training.loop import Epoch, Reconstruction, fit
from distspec.runtime.threads import one_thread
from distspec.stages.train.accuracy import measure
from distspec.stages.train.density import PASSES, collect, fit_density, labels_of

_PASSING = ("seconds", "waiting")
"""Numbers of an epoch that depend on the machine: they go to MLflow and not into the checkpoint."""


@dataclass(frozen=True)
class Job:
    """What a training worker needs; small and picklable."""

    store: str
    state: str
    settings: Train
    seed: int
    """Of the validation set."""

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
    job: Job = config["job"]
    settings, state = job.settings, Path(job.state)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), max(context.get_world_size(), 1)
    device = ray.train.torch.get_device()
    group: Group = Together() if world > 1 else Alone()
    feed = Feed(job.store, settings, job.seed, rank, world, device)
    phases: dict[str, list[Epoch]] = {}
    model = _autoencoder(job, feed, device, phases)
    accuracy = measure(model, feed, group)
    density, density_facts = None, dict[str, Any]()
    if settings.density is not None:
        labels, names = labels_of(settings.density, feed)
        latents = [collect(model, feed, chosen, labels) for chosen in (feed.training, feed.validation)]
        density, density_facts, fits = fit_density(
            settings.density, latents[0], latents[1], names, state=state, seed=job.random, group=group, on_epoch=_report
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
    ray.train.report({"done": 1.0})


@one_thread()
def train_loop_of_worker(config: dict[str, Any]) -> None:
    """Do all fits in a worker, which has one core; the driver, which trains alone, has all."""
    train_loop(config)


def _report(epoch: Epoch) -> None:
    ray.train.report(dict(epoch))


def _autoencoder(job: Job, feed: Feed, device: torch.device, phases: dict[str, list[Epoch]]) -> nn.Module:
    """Fit the autoencoder, and the second one behind it if the settings ask for it."""
    settings, state = job.settings, Path(job.state)
    torch.manual_seed(job.random)
    first = models.build(settings.model, feed.store.grid).to(device)
    first.settle(feed.mean().to(device))  # type: ignore[operator]
    objective = Reconstruction(first, settings.loss)
    phases["first"] = fit(first, objective, feed, settings, state / "first", job.random, _report)
    if settings.second is None:
        return first
    second = models.build(settings.model, feed.store.grid).to(device)
    second.load_state_dict(first.state_dict())
    model = TwoStage(first.requires_grad_(False).eval(), second)
    objective = Reconstruction(second, "mse", model)
    again = feed.with_batch(settings.second.batch)
    where, section = state / "second", "train.second"
    phases["second"] = fit(second, objective, again, settings.second, where, job.random, _report, section)
    return model
