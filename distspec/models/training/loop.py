"""Fitting a network by gradient descent: one loop for every network, alone or in a group of workers.

The state after each epoch is a folder that appears whole; a fit that was killed goes on from the newest one and ends
with the same weights. What a worker does here is plain torch; who starts the workers is not its business.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor, nn

from distspec.addresses import Place
from distspec.config import Fit
from distspec.errors import BucketError, ConfigError
from distspec.files import read_tensors, remove, write_folder
from distspec.models.autoencoders.dense import Batch, Loss, Progress, TwoStage
from distspec.models.training.steps import Batches, ByShares, Steps, steps_of

__all__ = [
    "Epoch",
    "FitState",
    "Reconstruction",
    "best_weights",
    "fit",
    "keep_state",
    "newest_epochs",
    "newest_state",
]

Epoch = dict[str, float]
"""Numbers of one epoch: train_loss, validation_loss, learning_rate; and two that a repetition changes: seconds since
the epoch before was measured (of training, validation, keeping and telling), and waiting, the share of the training
steps' time in which there was no data."""

_ONE_CYCLE_RISE = 0.3

_ONE_CYCLE_START = 25.0


class Reconstruction(nn.Module):
    """The loss of an autoencoder, as `fit` wants it; with a chain, that of its second stage.

    Arguments:
        model: whose weights are fitted.
        kind: of the loss.
        chain: whose first stage makes what the model is to reconstruct.
    """

    def __init__(self, model: nn.Module, kind: Loss, chain: TwoStage | None = None) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        # In a list, so that the first stage is no part of this module: its weights stand still.
        self._chain = [chain]

    def forward(self, flux: Tensor, ivar: Tensor, redshift: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        """Give (total, count) of a batch."""
        chain = self._chain[0]
        if chain is not None:
            with torch.no_grad():
                chain.first.eval()
                flux, ivar = chain.clean(flux, ivar, redshift)
        loss: tuple[Tensor, Tensor] = self.model.loss(  # type: ignore[operator]
            Batch(flux, ivar, redshift), kind=self.kind, progress=progress
        )
        return loss


def fit(
    model: nn.Module,
    objective: nn.Module,
    feed: Batches | ByShares,
    settings: Fit,
    state: Place,
    seed: int,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    section: str = "train",
) -> list[Epoch]:
    """Fit a network, or go on with it; afterwards the model holds its best weights.

    Arguments:
        model: whose weights are fitted and kept.
        objective: holds the model; called with a batch and `progress`, it gives (total, count), whose sums over
            batches and workers divide to the loss.
        feed: training and validation batches of this worker, or of its shares.
        settings: optimizer, schedule, patience, precision.
        state: folder of the states.
        seed: of dropout and of what else is random; each worker, or share, draws its own.
        on_epoch: called on every worker when an epoch is done and kept.
        section: where these settings stand, for messages.

    Returns:
        The numbers of all epochs.

    Raises:
        ConfigError: the loss is not finite.
        CheckpointError: the state cannot be written.
    """
    driven = steps_of(objective, feed, _device(model))
    known = FitState.newest(state, model, _optimizer(model, settings))
    measured = time.perf_counter()
    for epoch in range(len(known.epochs), settings.epochs):
        if _stale(settings, known.epochs):
            break
        driven.begin(seed, epoch)
        numbers = _train_epoch(driven, objective, known, feed.steps, settings)
        sums = driven.add_up(driven.validate(Progress(epoch, settings.epochs), _device(model)))
        numbers["validation_loss"] = float(sums[0] / sums[1].clamp_min(1))
        before, measured = measured, time.perf_counter()
        numbers["seconds"] = measured - before
        if not all(map(math.isfinite, numbers.values())):
            rate = settings.learning_rate
            raise ConfigError(
                f"the loss is not finite in epoch {epoch}; lower {section}.learning_rate (now {rate:g}), or set "
                f"{section}.clip"
            )
        known.add(numbers, settings)
        if driven.rank == 0:
            known.keep()
        on_epoch(numbers)
    if known.best:
        model.load_state_dict(known.best)
    return known.epochs


@dataclass
class FitState:
    """A fit as it stands: what is kept after every epoch, and what a fit that was killed goes on from.

    Arguments:
        folder: of the states.
        model: whose weights are fitted.
        optimizer: with its moments.
        epochs: numbers of those that are done.
        best: weights of the best of them; empty before the first.
    """

    folder: Place
    model: nn.Module
    optimizer: torch.optim.Optimizer
    epochs: list[Epoch] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def newest(cls, folder: Place, model: nn.Module, optimizer: torch.optim.Optimizer) -> Self:
        """Load the newest whole state, if there is one, into model and optimizer."""
        found, epochs = newest_state(folder)
        if found is None:
            return cls(folder, model, optimizer)
        parts = {name: best_weights(folder, name) for name in ("model", "best", "optimizer")}
        model.load_state_dict(parts["model"])
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in parts["optimizer"].items():
            index, _, name = key.partition(".")
            slots.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
        return cls(folder, model, optimizer, epochs, parts["best"])

    def add(self, numbers: Epoch, settings: Fit) -> None:
        """Take note of one more epoch, and of its weights if they are the best."""
        self.epochs.append(numbers)
        if _since_best(settings, self.epochs) == 0:
            self.best = _weights(self.model)

    def keep(self) -> None:
        """Write the state of the newest epoch."""
        moments = {
            f"{index}.{name}": value.detach().cpu().clone()
            for index, slot in self.optimizer.state_dict()["state"].items()
            for name, value in slot.items()
            if isinstance(value, Tensor)
        }
        parts = {"model": _weights(self.model), "best": self.best, "optimizer": moments}
        keep_state(self.folder, len(self.epochs) - 1, parts, self.epochs)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _optimizer(model: nn.Module, settings: Fit) -> torch.optim.Optimizer:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    kinds: dict[str, Any] = {"adam": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop, "sgd": torch.optim.SGD}
    made: torch.optim.Optimizer = kinds[settings.optimizer](
        weights, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    return made


def _train_epoch(driven: Steps, objective: nn.Module, known: FitState, steps: int, settings: Fit) -> Epoch:
    """Do one pass; the loss is the mean over all workers' batches."""
    optimizer, device = known.optimizer, _device(known.model)
    epoch, rate = len(known.epochs), 0.0
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    begun, waited = time.perf_counter(), 0.0
    with closing(driven.batches(epoch)) as batches:
        for step in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            rate = learning_rate(settings, epoch * steps + step, steps * settings.epochs, known.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            own = driven.backward(batch, Progress(epoch, settings.epochs), sixteen=settings.precision == "bfloat16")
            if settings.clip is not None:
                nn.utils.clip_grad_norm_(objective.parameters(), settings.clip)
            optimizer.step()
            sums = sums + own
    sums = driven.add_up(sums)
    loss = float(sums[0] / sums[1].clamp_min(1))
    return {"train_loss": loss, "learning_rate": rate, "waiting": waited / (time.perf_counter() - begun)}


def learning_rate(settings: Fit, step: int, steps: int, epochs: Iterable[Epoch]) -> float:
    """Give the learning rate of a step; a function of the past alone, so that a resumed fit takes the same.

    Arguments:
        settings: schedule and rates.
        step: number of this step since the first epoch.
        steps: of all epochs.
        epochs: numbers of the epochs that are done.
    """
    first, last = settings.learning_rate, settings.final_learning_rate
    if settings.schedule == "polynomial":
        return first + (last - first) * min(1.0, step / (settings.decay_steps or steps))
    if settings.schedule == "plateau":
        # A rate that falls below the final one would stand still.
        return max(last, first * 0.1 ** _plateaus(settings, epochs))
    if settings.schedule == "one_cycle":
        rise = _ONE_CYCLE_RISE * steps
        if step < rise:
            return _cosine(first / _ONE_CYCLE_START, first, step / rise)
        return _cosine(first, last, (step - rise) / max(steps - rise, 1))
    return first


def _cosine(start: float, stop: float, share: float) -> float:
    return stop + (start - stop) * (1 + math.cos(math.pi * share)) / 2


def _plateaus(settings: Fit, epochs: Iterable[Epoch]) -> int:
    """Count how often the validation loss has stood still for `plateau` epochs."""
    best, since, count = math.inf, 0, 0
    for epoch in epochs:
        better = epoch["validation_loss"] < best - settings.min_delta
        best, since = (epoch["validation_loss"], 0) if better else (best, since + 1)
        if since == settings.plateau:
            since, count = 0, count + 1
    return count


def _since_best(settings: Fit, epochs: Iterable[Epoch]) -> int:
    """Count the epochs since the last one that was the best by more than `min_delta`; 0 if it is the newest."""
    best, since = math.inf, 0
    for epoch in epochs:
        better = epoch["validation_loss"] < best - settings.min_delta
        best, since = (epoch["validation_loss"], 0) if better else (best, since + 1)
    return since


def _stale(settings: Fit, epochs: Sequence[Epoch]) -> bool:
    return bool(epochs) and _since_best(settings, epochs) >= settings.patience


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def keep_state(state: Place, number: int, parts: dict[str, dict[str, Tensor]], epochs: Sequence[Epoch]) -> None:
    """Write a state; the two newest stay, so that a damaged one costs an epoch and not the run."""
    files = {f"{name}.safetensors": save(tensors) for name, tensors in parts.items()}
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files["state.json"] = json.dumps({"epochs": list(epochs), "sha256": sha256}).encode()
    write_folder(state / f"epoch-{number:05d}", files)
    for old in _states(state)[:-2]:
        remove(old)


def _states(state: Place) -> list[Place]:
    """List the states, the newest last."""
    return sorted(state.glob("epoch-*"), key=lambda folder: folder.name)


def newest_state(state: Place) -> tuple[Place | None, list[Epoch]]:
    """Find the last whole state: its folder and the numbers of all epochs up to it."""
    for folder in reversed(_states(state)):
        try:
            text = json.loads((folder / "state.json").read_bytes())
            # A truncated file from a failing disk must not stop a training that has an older whole state.
            for name, sha256 in text["sha256"].items():
                if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
                    raise ValueError(f"{name} is damaged")
            epochs = [dict(epoch) for epoch in text["epochs"]]
        except BucketError:
            raise  # what cannot be reached is not damaged
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        return folder, epochs
    return None, []


def newest_epochs(state: Place) -> list[Epoch]:
    """Read the numbers of the epochs so far, for who only looks on: what a state holds beside is not verified."""
    for folder in reversed(_states(state)):
        try:
            return [dict(epoch) for epoch in json.loads((folder / "state.json").read_bytes())["epochs"]]
        except BucketError:
            raise
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return []


def best_weights(state: Place, name: str = "best") -> dict[str, Tensor]:
    """Read one part of the newest state; empty if there is no state."""
    folder, _ = newest_state(state)
    if folder is None:
        return {}
    sha256 = json.loads((folder / "state.json").read_bytes())["sha256"][f"{name}.safetensors"]
    return read_tensors(folder / f"{name}.safetensors", sha256)
