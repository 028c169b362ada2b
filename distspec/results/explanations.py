"""Explanations of single rows, read back: which regions of the spectrum make a score what it is, method by method."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float32, Float64, Int64

from distspec.errors import LayoutError
from distspec.spectra import WaveGrid
from distspec.spectra.segments import edges_of, run_around
from distspec.store import Layer, SpectraStore

__all__ = ["Explanations", "RowExplanation", "region_of_pixel"]


@dataclass(frozen=True)
class RowExplanation:
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


def region_of_pixel(grid: WaveGrid, explanation: Layer) -> Int64[np.ndarray, "pixels"]:
    """Give the region that each pixel belongs to in an explanation.

    Raises:
        LayoutError: the layer explains spectra of another length.
    """
    segment_of = np.asarray(explanation.attributes["segment_of"], dtype=np.int64)
    if len(segment_of) != grid.pixels:
        raise LayoutError(
            f"{explanation.name} explains spectra of {len(segment_of)} pixels; the store keeps {grid.pixels}; "
            "explain this store"
        )
    return segment_of


class Explanations:
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
        self._edges = {name: edges_of(store.grid, region_of_pixel(store.grid, layer)) for name, layer in layers.items()}
        self._places = {name: {int(row): i for i, row in enumerate(rows)} for name, rows in self._rows.items()}
        self.longest = 0
        self.rows = np.unique(np.concatenate([np.zeros(0, np.int64), *self._rows.values()]))
        """Of the store, in its order, all that any method explains."""
        for name, layer in layers.items():
            if chosen in layer.attributes["names"]:
                rank = self._ranks[name][:, layer.attributes["names"].index(chosen)]
                self.longest = max(self.longest, int((rank >= 0).sum()))
        self._shard = lru_cache(maxsize=8)(self._read_shard)

    def find(self, row: int) -> RowExplanation | None:
        """Give the first method's explanation of a row of the store, of the ranking score if there is one."""
        return next(iter(self.all(row)), None)

    def all(self, row: int) -> list[RowExplanation]:
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

    def _one(self, name: str, place: int, number: int, *, listed: bool) -> RowExplanation:
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
        return RowExplanation(
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
