"""What a search for settings may try: every trial is a `Train`, drawn value by value.

Some ranges depend on what was drawn before (a layer is no wider than the one before it), so the space is a function of
a trial and not a table. It knows no optimizer: whatever has Optuna's three `suggest` methods can draw from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from distspec.config import Architecture, Convolutional, Dense, Train, Tune

__all__ = ["Chooser", "Least", "Space"]

Range = tuple[int, int]


class Chooser(Protocol):
    """Who draws the values of a trial: an Optuna trial, or what behaves like one."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Draw from low ... high, both included."""
        ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Draw from [low, high]."""
        ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Draw one of several."""
        ...


class Least:
    """Takes the least of every range: the smallest model that a search may try."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Give the lower end."""
        return low

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Give the lower end."""
        return low

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Give the first."""
        return choices[0]


@dataclass(frozen=True)
class Space:
    """The search space of Böhm et al. (Table 2), laid over the settings of one training.

    Arguments:
        tune: the ranges.
        train: what the ranges do not touch.
        pixels: of a spectrum; no layer is wider.
        spectra: that a trial is trained on.
    """

    tune: Tune
    train: Train
    pixels: int
    spectra: int

    def __call__(self, trial: Chooser) -> Train:
        """Draw the settings of a trial: those of `train`, with its own values in the place of all that is searched."""
        values: dict[str, Any] = {"model": self._model(trial)}
        if self.tune.optimizer is not None:
            values["optimizer"] = trial.suggest_categorical("optimizer", self.tune.optimizer)
        if self.tune.batch is not None:
            values["batch"] = trial.suggest_int("batch", *self.tune.batch)
        if self.tune.learning_rate is not None:
            values["learning_rate"] = trial.suggest_float("learning_rate", *self.tune.learning_rate)
        now = self.train.model_copy(update=values)
        if self.tune.final_learning_rate is not None and now.schedule != "constant":
            low = min(self.tune.final_learning_rate, now.learning_rate)
            values["final_learning_rate"] = trial.suggest_float("final_learning_rate", low, now.learning_rate, log=True)
        if self.tune.decay_steps is not None and now.schedule == "polynomial":
            # Of few spectra in large batches all steps together are fewer than the paper's least.
            steps = max(1, self.spectra // min(now.batch, self.spectra) * self.tune.epochs)
            low = min(self.tune.decay_steps, steps)
            values["decay_steps"] = trial.suggest_int("decay_steps", low, steps, log=True)
        return self.train.model_copy(update=values)

    def _model(self, trial: Chooser) -> Architecture:
        model = self.train.model
        if isinstance(model, Convolutional):
            return self._convolutional(trial, model)
        values: dict[str, Any] = {}
        if self.tune.latents is not None:
            values["latents"] = trial.suggest_int("latents", *_below(self.tune.latents, self.pixels))
        if self.tune.depth is not None:
            widest = min(self.pixels, self.tune.units or self.pixels)
            least = min(values.get("latents", model.latents), widest)
            hidden = _narrowing(trial, "units", self.tune.depth, (least, widest))
            # The decoder of the redshifted kind is what the others call an encoder, the other way round.
            values["hidden"] = hidden[::-1] if model.kind == "redshifted" else hidden
        if self.tune.dropout is not None and isinstance(model, Dense):
            values["dropout"] = trial.suggest_float("dropout", *self.tune.dropout, log=True)
        return model.model_copy(update=values)

    def _convolutional(self, trial: Chooser, model: Convolutional) -> Convolutional:
        if self.tune.depth is None or self.tune.channels is None:
            return model
        halvings = (self.pixels & -self.pixels).bit_length() - 1
        # At least one: a grid of an odd number of pixels is then refused by the model itself.
        depth = _below(self.tune.depth, max(halvings, 1))
        return model.model_copy(update={"channels": _narrowing(trial, "channels", depth, self.tune.channels)})


def _narrowing(trial: Chooser, name: str, depth: Range, widths: Range) -> tuple[int, ...]:
    """Draw layers of which none is wider than the one before it."""
    least, widest = widths
    layers: list[int] = []
    for layer in range(trial.suggest_int("depth", *depth)):
        layers.append(trial.suggest_int(f"{name}_{layer + 1}", least, layers[-1] if layers else widest))
    return tuple(layers)


def _below(wanted: Range, largest: int) -> Range:
    return min(wanted[0], largest), min(wanted[1], largest)
