"""What the explain stage found for single rows, read back for the reader: weights of segments, ways up the density.

And what changes along a way, as lines and regions with names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from jaxtyping import Bool, Float32, Float64
from scipy.ndimage import median_filter

from distspec.lines import nearest_line
from distspec.segments import edges_of, run_around
from distspec.spectra import LIGHT_SPEED, WaveGrid
from distspec.store import Layer, SpectraStore
from distspec.truth import segments_of

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
    """Weights of one row by one method, and the score that they explain.

    Arguments:
        method: its name.
        score: whose weights they are.
        edges: wavelengths between which the regions lie, Å.
        weights: of the regions.
        r2: of the local model, where the method has one.
        error: standard errors of the weights, where the method tells them.
        listed: whether the row is in the score's own list.
        by_pixel: whether the regions are pixels.
        floor: what a weight is made of where nothing is changed, where the method tells it.
        missing: by how much the weights miss what they should add up to, as a share of it.
        other: where the other combination of windows is heaviest, Å, where the method has one.
    """

    method: str
    score: str
    edges: Float64[np.ndarray, "regions+1"]
    weights: Float32[np.ndarray, "regions"]
    r2: float | None = None
    error: Float32[np.ndarray, "regions"] | None = None
    listed: bool = True
    by_pixel: bool = False
    floor: float | None = None
    missing: float | None = None
    other: tuple[float, float] | None = None

    @property
    def heaviest(self) -> tuple[float, float, float]:
        """Wavelengths and weight of the region of largest |weight|; of pixels, those around it with half of that."""
        return _heaviest(self.weights, self.edges, self.by_pixel)


def _heaviest(
    weights: Float32[np.ndarray, "regions"], edges: Float64[np.ndarray, "regions+1"], by_pixel: bool
) -> tuple[float, float, float]:
    size = np.abs(weights)
    peak = int(size.argmax())
    start, stop = run_around(size >= 0.5 * size[peak], peak) if by_pixel else (peak, peak + 1)
    return float(edges[start]), float(edges[stop]), float(weights[peak])


class Explained:
    """Finds the explanations of a row; weights are read when they are asked for.

    Arguments:
        store: the spectra.
        layers: of the explain stage, by method.
        chosen: the ranking score, whose explanation comes first.
    """

    def __init__(self, store: SpectraStore, layers: Mapping[str, Layer], chosen: str) -> None:
        self._layers, self._chosen = dict(layers), chosen
        self._rows = {name: layer.read("row") for name, layer in layers.items()}
        self._ranks = {name: layer.read("rank") for name, layer in layers.items()}
        self._edges = {name: edges_of(store.grid, segments_of(store.grid, layer)) for name, layer in layers.items()}
        self._places = {name: {int(row): i for i, row in enumerate(rows)} for name, rows in self._rows.items()}
        self.longest = 0
        self.rows = np.unique(np.concatenate([np.zeros(0, np.int64), *self._rows.values()]))
        """Of the store, in its order, all that any method explains."""
        for name, layer in layers.items():
            if chosen in layer.attributes["names"]:
                rank = self._ranks[name][:, layer.attributes["names"].index(chosen)]
                self.longest = max(self.longest, int((rank >= 0).sum()))
        self._shard = lru_cache(maxsize=8)(self._read_shard)

    def find(self, row: int) -> Explanation | None:
        """Give the first method's explanation of a row of the store, of the ranking score if there is one."""
        return next(iter(self.all(row)), None)

    def all(self, row: int) -> list[Explanation]:
        """Give every explanation of a row, method by method: of the ranking score, else of the first whose list has it;
        none that failed.
        """
        found = []
        for name, layer in self._layers.items():
            place = self._places[name].get(row)
            if place is None:
                continue
            names, rank = layer.attributes["names"], self._ranks[name][place]
            listed = [number for number in range(len(names)) if rank[number] >= 0]
            number = names.index(self._chosen) if self._chosen in names else (listed or [0])[0]
            one = self._one(name, place, number, listed=number in listed)
            if np.isfinite(one.weights).all():
                found.append(one)
        return found

    def _one(self, name: str, place: int, number: int, *, listed: bool) -> Explanation:
        layer = self._layers[name]
        shard, place = divmod(place, layer.shard_rows)
        told = self._shard(name, shard)
        one = {field: values[place, number] for field, values in told.items()}
        weights, edges = one["weights"], self._edges[name]
        by_pixel = len(weights) == len(layer.attributes["segment_of"])
        missing = None
        if "missing" in one:
            change = float(weights.sum(dtype=np.float64)) - float(one["missing"])
            missing = abs(float(one["missing"]) / change) if change else 0.0
        return Explanation(
            name,
            layer.attributes["names"][number],
            edges,
            weights,
            float(one["r2"]) if "r2" in one else None,
            one.get("error"),
            listed,
            by_pixel,
            float(one["floor"]) if "floor" in one else None,
            missing,
            _heaviest(one["other"], edges, by_pixel)[:2] if "other" in one else None,
        )

    def _read_shard(self, name: str, shard: int) -> dict[str, np.ndarray]:
        layer = self._layers[name]
        wanted = ("weights", "error", "r2", "floor", "missing", "other")
        fields = [field for field in wanted if field in layer.fields]
        return dict(zip(fields, layer.read_shard(shard, *fields), strict=True))

    def windows(self, row: int) -> list[tuple[str, list[int], Float32[np.ndarray, "windows pixels"]]]:
        """Give what each window size by itself says of a row, of methods that have several: name, widths, weights of
        the ranking score, or of the first.
        """
        found = []
        for name, layer in self._layers.items():
            place, widths = self._places[name].get(row), list(layer.attributes.get("windows", []))
            if place is None or not widths:
                continue
            names = layer.attributes["names"]
            number = names.index(self._chosen) if self._chosen in names else 0
            values = layer.read("windows", place, place + 1)[0, number]
            if np.isfinite(values).all():
                found.append((name, widths, values))
        return found


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
    start, stop = run_around(level > 0.5 * level[peak], peak)
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
        start, stop = run_around(detail > _EDGE * detail[peak], peak)
        wave = float(grid.wave[peak])
        ends = float(grid.edges[start]), float(grid.edges[stop])
        amount = sign * float(detail[peak])
        found.append(Change(*ends, wave, amount, nearest_line(wave, redshift), seen=bool(seen[start:stop].any())))
        left[start:stop] = 0.0
    return found
