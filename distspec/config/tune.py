"""Settings of `tune`: how many trials, and between which values."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distspec.config.base import Count, Off, Positive, Settings

__all__ = ["Tune"]


Counts = tuple[Count, Count]
Rates = tuple[Positive, Positive]


class Tune(Settings):
    """Store -> settings for training that give a small validation loss.

    The ranges are those of Böhm, Kim & Juneau (PAE): (least, largest), or the least where the largest follows from what
    else is drawn. Equal ends fix a value; none leaves that of `train`.
    """

    trials: Count = 50
    """Trainings that are tried; the paper took about 1,500."""
    epochs: Count = 10
    """Epochs of a trial, at most."""
    concurrent: Annotated[int, Field(ge=0)] = 0
    """Trials at a time, each on a core (and a GPU with `train.gpu`); 0 takes one for each."""
    spectra: Annotated[Count | None, Off] = 40_000
    """Largest number of training spectra in a trial, in chunks drawn from the whole store; none takes all."""
    grace_epochs: Count = 2
    """Epochs that every trial gets."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """After the grace, and whenever its epochs have grown by this factor, a trial goes on if it is among the best
    1/reduction of all that have come so far (successive halving)."""
    depth: Annotated[Counts | None, Off] = (2, 5)
    """Hidden layers, or convolutions: (least, largest)."""
    units: Annotated[Count | None, Off] = None
    """Widest layer; none takes the number of pixels. Every layer has from `latents` to the units of the one before."""
    latents: Annotated[Counts | None, Off] = (2, 14)
    """Latents: (least, largest); the convolutional kind has as many as its channels leave."""
    channels: Annotated[Counts | None, Off] = (2, 64)
    """Channels of convolutions: (least, largest); the first has at most the largest and every other at most those of
    the one before."""
    dropout: Annotated[Rates | None, Off] = (1e-3, 0.5)
    """Dropout of the dense kind: (least, largest), below 1; drawn from its logarithm."""
    learning_rate: Annotated[Rates | None, Off] = (1e-4, 2e-3)
    """Learning rate at the start: (least, largest)."""
    final_learning_rate: Annotated[Positive | None, Off] = 5e-6
    """Least learning rate at the end; the largest is `learning_rate`. Drawn from its logarithm."""
    decay_steps: Annotated[Count | None, Off] = 2_000
    """Least steps of the fall, for the `polynomial` schedule; the largest is all steps of a trial. Drawn from their
    logarithm."""
    optimizer: Annotated[tuple[Literal["adam", "rmsprop", "sgd"], ...] | None, Off] = ("adam", "rmsprop", "sgd")
    """Optimizers to choose from."""
    batch: Annotated[Counts | None, Off] = (16, 256)
    """Rows in a step: (least, largest)."""

    @model_validator(mode="after")
    def _ordered(self) -> "Tune":
        for name in ("depth", "latents", "channels", "dropout", "learning_rate", "batch"):
            ends = getattr(self, name)
            if ends is not None and ends[0] > ends[1]:
                raise ValueError(f"{name} goes from its least to its largest value, got {list(ends)}")
        if self.dropout is not None and self.dropout[1] >= 1:
            raise ValueError(f"dropout must be below 1, got {self.dropout[1]:g}")
        if self.optimizer == ():
            raise ValueError("optimizer names none; set it to false to keep that of train")
        return self
