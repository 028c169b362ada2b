"""What the explain stage found for single rows, read back for the reader: weights of segments, ways up the density.

And what changes along a way, as lines and regions with names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float32, Float64
from scipy.ndimage import median_filter

from distspec.lines import nearest_line
from distspec.spectra import LIGHT_SPEED, WaveGrid
from distspec.store import Layer, SpectraStore
from distspec.truth import segment_edges

__all__ = ["Change", "Explained", "Explanation", "Way", "Ways", "changes"]

_LISTED: Final = 3
"""Changes of each sign that are named."""

_SHARE: Final = 0.25
"""Of the strongest change; weaker ones are not named."""

_BROAD: Final = 30_000.0
"""km/s; what varies more slowly is continuum. Broad lines of quasars are a third of it."""

_EDGE: Final = 0.2
"""Of its peak; there a line ends."""


@dataclass(frozen=True)
class Explanation:
    """Weights of one row, and the score that they explain."""

    score: str
    edges: Float64[np.ndarray, "segments+1"]
    weights: Float32[np.ndarray, "segments"]
    r2: float

    @property
    def heaviest(self) -> tuple[float, float, float]:
        """Wavelengths and weight of the segment of largest |weight|."""
        segment = int(np.abs(self.weights).argmax())
        return float(self.edges[segment]), float(self.edges[segment + 1]), float(self.weights[segment])


class Explained:
    """Finds the explanation of a row: that of the ranking score, else the first that holds the row.

    Arguments:
        store: the spectra.
        layers: of the explain stage, by score.
        chosen: the ranking score.
    """

    def __init__(self, store: SpectraStore, layers: Mapping[str, Layer], chosen: str) -> None:
        ordered = sorted(layers, key=lambda name: name != chosen)
        self._rows = {name: layers[name].read("row") for name in ordered}
        self._weights = {name: layers[name].read("weights") for name in ordered}
        self._r2 = {name: layers[name].read("r2") for name in ordered}
        self._edges = {name: segment_edges(store.grid, layers[name]) for name in ordered}
        self._places = {name: {int(row): i for i, row in enumerate(rows)} for name, rows in self._rows.items()}
        self.longest = len(self._rows[chosen]) if chosen in self._rows else 0

    def find(self, row: int) -> Explanation | None:
        """Give the explanation of a row of the store; None where there is none."""
        for name, places in self._places.items():
            if row in places:
                place = places[row]
                return Explanation(name, self._edges[name], self._weights[name][place], float(self._r2[name][place]))
        return None


@dataclass(frozen=True)
class Change:
    """A line or region whose flux changes along a way.

    Arguments:
        low, high: where it begins and ends, Å on the store's axis.
        peak: where it is strongest, Å.
        amount: change of flux at the peak, of a line less that of the continuum; positive where it grows.
        line: the line nearest to the peak, if any is near; None for a region of the continuum, too.
        broad: whether it is a region of the continuum.
        seen: whether the spectrum has a good pixel there.
    """

    low: float
    high: float
    peak: float
    amount: float
    line: str | None = None
    broad: bool = False
    seen: bool = True

    @property
    def label(self) -> str:
        """Where it is, in words."""
        place = f"{self.low:.0f}–{self.high:.0f} Å" if self.broad else f"{self.peak:.0f} Å"
        return f"{self.line} ({place})" if self.line else place


@dataclass(frozen=True)
class Way:
    """The way of one row to higher probability.

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


class Ways:
    """Finds the way of a row; none has one where there is no layer of ways.

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

    def find(self, row: int) -> Way | None:
        """Give the way of a row of the store; None where there is none."""
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
        return Way((ends[0], ends[1]), steps, steps == self._most, float(self._slope[place]), growth, classes)

    def decoded(self, row: int) -> Float32[np.ndarray, "points pixels"] | None:
        """Give the spectra along the way of a row of the store, evenly from start to end; None where there is none."""
        if self._layer is None or row not in self._places:
            return None
        place = self._places[row]
        return np.asarray(self._layer.read("spectra", place, place + 1)[0])


def _slopes(log_prob: Float32[np.ndarray, "n points"], arc: Float32[np.ndarray, "n points"]) -> np.ndarray:
    """Give the mean gain per length of each way; 0 for one that takes no step."""
    gain, length = log_prob[:, -1] - log_prob[:, 0], arc[:, -1]
    return np.asarray(np.divide(gain, length, out=np.zeros(len(gain)), where=length > 0))


def changes(
    growth: Float32[np.ndarray, "pixels"],
    grid: WaveGrid,
    redshift: float | None = None,
    good: Bool[np.ndarray, "pixels"] | None = None,
) -> list[Change]:
    """Name the lines and regions that change most, strongest first.

    What varies slowly along wavelength (a running median over 30,000 km/s) is continuum: of it the part around the
    strongest growth and that around the strongest fading count as a region each. What is left are lines.

    Arguments:
        growth: of flux.
        grid: wavelengths.
        redshift: of lines on this grid; None for the rest frame.
        good: pixels where the spectrum has data; none takes all.
    """
    change = growth.astype(np.float64)
    strongest = float(np.abs(change).max())
    if not 0 < strongest < np.inf:
        return []
    middle = grid.pixels // 2
    pixel = LIGHT_SPEED * (grid.edges[middle + 1] / grid.edges[middle] - 1)
    continuum = median_filter(change, size=min(grid.pixels, 2 * int(_BROAD / pixel / 2) + 1), mode="nearest")
    seen = np.ones(grid.pixels, bool) if good is None else good
    found = []
    for sign in (1.0, -1.0):
        found += _region(sign * continuum, strongest, sign, grid, seen)
        found += _lines(sign * (change - continuum), change, strongest, sign, grid, redshift, seen)
    return sorted(found, key=lambda one: -abs(one.amount))


def _region(
    level: Float64[np.ndarray, "pixels"],
    strongest: float,
    sign: float,
    grid: WaveGrid,
    seen: Bool[np.ndarray, "pixels"],
) -> list[Change]:
    """Find the run of the continuum around its largest value in which it is above half of this."""
    peak = int(level.argmax())
    if level[peak] < _SHARE * strongest:
        return []
    start, stop = _run(level > 0.5 * level[peak], peak)
    low, high, top = float(grid.edges[start]), float(grid.edges[stop]), float(grid.wave[peak])
    return [Change(low, high, top, sign * float(level[peak]), broad=True, seen=bool(seen[start:stop].any()))]


def _lines(
    detail: Float64[np.ndarray, "pixels"],
    change: Float64[np.ndarray, "pixels"],
    strongest: float,
    sign: float,
    grid: WaveGrid,
    redshift: float | None,
    seen: Bool[np.ndarray, "pixels"],
) -> list[Change]:
    """Find the peaks over the continuum that change in its own direction, strongest first; each ends where it has
    fallen to a fifth.
    """
    found: list[Change] = []
    left = np.where(sign * change > 0, detail, 0.0)
    for _ in range(_LISTED):
        peak = int(left.argmax())
        if left[peak] < _SHARE * strongest:
            break
        start, stop = _run(detail > _EDGE * detail[peak], peak)
        wave = float(grid.wave[peak])
        ends = float(grid.edges[start]), float(grid.edges[stop])
        amount = sign * float(detail[peak])
        found.append(Change(*ends, wave, amount, nearest_line(wave, redshift), seen=bool(seen[start:stop].any())))
        left[start:stop] = 0.0
    return found


def _run(inside: Bool[np.ndarray, "pixels"], place: int) -> tuple[int, int]:
    """Give first and one-past-last pixel of the run of True around a place."""
    outside = np.flatnonzero(~inside)
    before, after = outside[outside < place], outside[outside > place]
    return (int(before[-1]) + 1 if len(before) else 0), (int(after[0]) if len(after) else len(inside))
