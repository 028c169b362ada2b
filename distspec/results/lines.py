"""Lines of explained spectra, read back: what those of a spectrum or a cluster suggest, and their classes by ratios."""

from collections import Counter
from dataclasses import fields
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float64, Int64

from distspec.results.explanations import RowExplanation
from distspec.spectra.lines.diagnosis import Diagnosis, cluster_sentence, sentence
from distspec.spectra.lines.ratios import Bpt, bpt
from distspec.spectra.lines.tables import Indices, LineTable, Ratios, ratios
from distspec.store import Layer, SpectraStore

__all__ = ["LineResults"]


class LineResults:
    """Lines and indices of the spectra that were explained.

    Arguments:
        store: the spectra.
        layer: of `stages.explain.measure_lines`.
    """

    def __init__(self, store: SpectraStore, layer: Layer) -> None:
        self._store = store
        self.rows: Int64[np.ndarray, "n"] = layer.read("row")
        self._places = {int(row): place for place, row in enumerate(self.rows)}
        self.table = LineTable(*(layer.read(one.name).astype(np.float64) for one in fields(LineTable)))
        self._indices = Indices(*(layer.read(one.name).astype(np.float64) for one in fields(Indices)))

    @cached_property
    def ratios(self) -> Ratios:
        """Of the lines of each spectrum."""
        return ratios(self.table)

    @cached_property
    def bpt(self) -> Bpt:
        """Classes by these ratios."""
        return bpt(self.ratios)

    def one(
        self, row: int, explanation: RowExplanation, good: Bool[np.ndarray, "pixels"], z: float
    ) -> Diagnosis | None:
        """Say what an explanation points at and what the lines suggest; None of a spectrum that was not measured."""
        place = self._places.get(row)
        if place is None:
            return None
        grid, part = self._store.grid, slice(place, place + 1)
        region = np.clip(
            np.searchsorted(explanation.edges, grid.wave, side="right") - 1, 0, len(explanation.weights) - 1
        )
        # A region's weight is that of all its pixels together, so that shares are the regions' own.
        per_pixel = explanation.weights[region].astype(np.float64) / np.bincount(region)[region]
        redshift = None if self._store.frame == "rest" else z
        tables = (self.table[part], self._indices[part], self.ratios[part])
        return sentence(per_pixel, grid, redshift, z, *tables, good)

    def cluster(
        self,
        rows: Int64[np.ndarray, "m"],
        weights: Float64[np.ndarray, "pixels"],
        z: Float64[np.ndarray, "m"],
        peaks: Float64[np.ndarray, "m"],
    ) -> Diagnosis:
        """Say what members of a cluster have in common.

        Arguments:
            rows: of the members, which were measured.
            weights: mean of their explanations.
            z: their redshifts.
            peaks: where each explanation is heaviest, Å on the store's axis.
        """
        places = np.array([self._places[int(row)] for row in rows], dtype=np.int64)
        tables = self.table[places], self._indices[places], self.ratios[places]
        return cluster_sentence(weights, self._store.grid, *tables, z, peaks, self._store.frame == "rest")

    def classes(self, rows: Int64[np.ndarray, "m"]) -> dict[str, int]:
        """Count the classes by line ratios among some rows, the most frequent first; those without one are left out."""
        places = np.array([self._places[int(row)] for row in rows], dtype=np.int64)
        counts = Counter(str(name) for name in self.bpt.names[places] if name)
        return dict(counts.most_common())
