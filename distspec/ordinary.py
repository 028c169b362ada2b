"""Ordinary spectra of a store that others are compared with: drawn at random, of one class, or of one redshift."""

from dataclasses import dataclass
from typing import Final, Literal, Self

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from distspec.config import AnyMethod, ExpectedGradients, Imo
from distspec.errors import ConfigError
from distspec.spectra import Spectra
from distspec.store import SpectraStore

__all__ = ["Ordinary"]

_CANDIDATES: Final = 4_096
"""Spectra among which those of a class or redshift are looked for."""

_RUNS: Final = 32
"""Places of the store that they come from: each costs a chunk to read."""


@dataclass(frozen=True, eq=False)
class Ordinary:
    """Candidates, in an order drawn at random.

    Arguments:
        rows: of the store.
        z: their redshifts.
        kind: their classes; empty texts where the store knows none.
    """

    rows: Int64[np.ndarray, "n"]
    z: Float64[np.ndarray, "n"]
    kind: Shaped[np.ndarray, "n"]

    @classmethod
    def of(cls, store: SpectraStore, odd: Int64[np.ndarray, "k"], seed: int) -> Self:
        """Draw candidates from places spread over the store; spectra set aside and odd ones are none.

        Raises:
            ConfigError: all usable spectra are odd.
        """
        rng = np.random.default_rng([seed, store.rows])
        length = -(-_CANDIDATES // _RUNS)
        firsts = np.unique(np.linspace(0, max(0, store.rows - length), _RUNS).astype(np.int64))
        rows = np.unique((firsts[:, None] + np.arange(length)).ravel())
        rows = rows[rows < store.rows]
        usable = rows[store.column("status", rows) == 0]
        ordinary = usable[~np.isin(usable, odd)]
        if not len(ordinary):
            raise ConfigError(
                "no ordinary spectrum is left to compare with: all usable ones are explained; lower explain.fraction"
            )
        chosen = rng.permutation(ordinary)
        there = "class" in store.column_names
        kind = store.column("class", chosen) if there else np.full(len(chosen), "")
        return cls(chosen, store.column("z", chosen).astype(np.float64), kind)

    def like(
        self, store: SpectraStore, rows: Int64[np.ndarray, "m"], count: int, way: Literal["any", "class", "redshift"]
    ) -> list[Int64[np.ndarray, "count"]]:
        """Choose candidates for each of some rows of the store.

        Of one class, or at redshifts nearest to its own; where there are too few of the class, others fill up. Small
        stores give fewer.
        """
        if way == "any":
            return [self.rows[:count]] * len(rows)
        if way == "redshift":
            distance = np.abs(self.z - store.column("z", rows).astype(np.float64)[:, None])
            order = np.argsort(np.where(np.isnan(distance), np.inf, distance), axis=1, kind="stable")
        else:
            kinds = store.column("class", rows) if "class" in store.column_names else np.full(len(rows), "")
            order = np.argsort(self.kind != kinds[:, None], axis=1, kind="stable")
        return list(self.rows[order[:, :count]])

    def baselines(self, store: SpectraStore, rows: Int64[np.ndarray, "m"], method: AnyMethod) -> list[Spectra]:
        """Read what a method compares each of some rows with, each spectrum once; none where it asks for none."""
        match method:
            case Imo(baselines=count, like=way) | ExpectedGradients(baselines=count, like=way):
                chosen = self.like(store, rows, count, way)
            case _:
                return []
        distinct, place = np.unique(np.stack(chosen), return_inverse=True)
        read = store.take(distinct)
        return [read[one] for one in place.reshape(len(rows), -1)]
