"""Ascents of single rows, read back: the way of a spectrum's latents to higher probability, and what it changes."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from distspec.store import Layer

__all__ = ["Ascent", "Ascents"]


@dataclass(frozen=True)
class Ascent:
    """The ascent of one row to higher probability.

    Arguments:
        log_prob: at start and end, nats.
        steps: taken.
        unfinished: whether the steps ran out before log p stopped to rise.
        slope: mean gain in nats per standard deviation of ordinary latents.
        growth: of the decoded flux from start to end.
        classes: likeliest class at start and end, each with its probability; None where there is one class only.
    """

    log_prob: tuple[float, float]
    steps: int
    unfinished: bool
    slope: float
    growth: Float32[np.ndarray, "pixels"]
    classes: tuple[tuple[str, float], tuple[str, float]] | None


class Ascents:
    """Finds the ascent of a row; none has one where there is no layer of ascents.

    Arguments:
        layer: of `stages.explain.follow`.
    """

    def __init__(self, layer: Layer | None) -> None:
        self._layer = layer
        self._places: dict[int, int] = {}
        self.median_slope = float("nan")
        if layer is not None:
            self._places = {int(row): place for place, row in enumerate(layer.read("row"))}
            self._log_prob, arc = layer.read("log_prob"), layer.read("arc")
            self._taken, self._most = layer.read("taken"), arc.shape[1] - 1
            self._slope = _slopes(self._log_prob, arc)
            self.median_slope = float(np.median(self._slope))

    def __len__(self) -> int:
        return len(self._places)

    def find(self, row: int) -> Ascent | None:
        """Give the ascent of a row of the store; None where there is none."""
        if self._layer is None or row not in self._places:
            return None
        layer, place = self._layer, self._places[row]
        classes = None
        if "class" in layer.fields:
            names = layer.attributes["classes"]
            numbers, shares = (
                layer.read(name, place, place + 1)[0].tolist() for name in ("class", "class_probability")
            )
            start, end = ((str(names[number]), float(share)) for number, share in zip(numbers, shares, strict=True))
            classes = (start, end)
        ends, steps = self._log_prob[place, [0, -1]].tolist(), int(self._taken[place])
        growth = layer.read("growth", place, place + 1)[0]
        return Ascent((ends[0], ends[1]), steps, steps == self._most, float(self._slope[place]), growth, classes)

    def decoded(self, row: int) -> Float32[np.ndarray, "points pixels"] | None:
        """Give the spectra along the ascent of a row, evenly from start to end; None where there is none."""
        if self._layer is None or row not in self._places:
            return None
        place = self._places[row]
        return np.asarray(self._layer.read("spectra", place, place + 1)[0])


def _slopes(log_prob: Float32[np.ndarray, "n points"], arc: Float32[np.ndarray, "n points"]) -> np.ndarray:
    """Give the mean gain per length of each ascent; 0 for one that takes no step."""
    gain, length = log_prob[:, -1] - log_prob[:, 0], arc[:, -1]
    return np.asarray(np.divide(gain, length, out=np.zeros(len(gain)), where=length > 0))
