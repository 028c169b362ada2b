"""What a worker of `distspec tune` does: it trains with the settings of one trial and reports every epoch.

A trial that was killed goes on from its last epoch. The spectra are opened once for all trials of a worker.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import ray
import ray.tune
import torch
from torch import Tensor

from distspec import models
from distspec.addresses import Place
from distspec.config import Train
from distspec.errors import ConfigError, DistspecError
from distspec.models.training.feed import Feed
from distspec.models.training.loop import Epoch, Reconstruction, fit, newest_state
from distspec.runtime.threads import one_thread
from distspec.store import limit_threads

_WORST = 1e300
"""What successive halving sees of a loss that is not finite: it interpolates between losses."""


@dataclass(frozen=True)
class TrialJob:
    """What the worker of a trial needs; small and picklable.

    Arguments:
        store: address.
        state: folder of the states of all trials.
        settings: of training, without a trial's own values.
        seed: of weights, order and validation set, the same in every trial.
        limit: largest number of training spectra.
        variables: of the environment; printed nowhere.
    """

    store: str
    state: Place
    settings: Train
    seed: int
    limit: int | None
    variables: tuple[tuple[str, str], ...] = field(default=(), repr=False)


@one_thread()
def run_trial(config: dict[str, Any], job: TrialJob) -> None:
    """Train with a trial's settings and report every epoch; a failure is a result too, so that the search learns."""
    os.environ.update(job.variables)
    limit_threads(1)
    best = math.inf

    def report(epoch: Epoch) -> None:
        nonlocal best
        best = min(best, epoch["validation_loss"])
        ray.tune.report({**epoch, "recorded": list(epoch), "loss": best, "halving": best})

    try:
        _fit(Train.model_validate_json(config["settings"]), job, job.state / f"{config['trial']:05d}", report)
    except Exception as error:
        # A loss that is not finite, or a network that does not fit in memory, is the trial's own; other errors of ours
        # (a damaged store, a full disk) are not.
        fatal = isinstance(error, DistspecError) and not isinstance(error, ConfigError)
        said = str(error) if isinstance(error, DistspecError) else f"{type(error).__name__}: {error}"
        told = {"failure": " ".join(said.split()), "fatal": fatal}
        ray.tune.report({**told, "loss": math.inf, "halving": _WORST})


def _fit(settings: Train, job: TrialJob, state: Place, report: Callable[[Epoch], None]) -> None:
    feed, mean = _spectra(job)
    torch.manual_seed(job.seed)
    model = models.build(settings.model, feed.store.grid).to(feed.device)
    model.settle(mean.to(feed.device))  # type: ignore[operator]
    for epoch in newest_state(state)[1]:
        report(epoch)
    objective = Reconstruction(model, settings.loss)
    fit(model, objective, feed.with_batch(settings.batch), settings, state, job.seed, report, "tune")


@lru_cache(maxsize=1)
def _spectra(job: TrialJob) -> tuple[Feed, Tensor]:
    """Open the spectra and take their mean, once for all trials of a worker."""
    device = "cuda" if job.settings.gpu else "cpu"
    feed = Feed(job.store, job.settings, job.seed, device=device, limit=job.limit)
    return feed, feed.mean()
