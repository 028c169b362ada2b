"""Ordinary spectra of a store that others are compared with: drawn at random, of one class, or of one redshift."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Self

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from distspec.config import AnyMethod, ExpectedGradients, Imo
from distspec.errors import ConfigError, DistspecWarning
from distspec.spectra import Spectra
from distspec.store import SpectraStore

__all__ = ["Baselines"]

_CANDIDATES: Final = 4_096
"""Spectra among which those of a class or redshift are looked for."""

_RUNS: Final = 32
"""Places of the store that they come from: each costs a chunk to read."""


@dataclass(frozen=True, eq=False)
class Baselines:
    """Candidates for the ordinary spectra that others are compared with, in an order drawn at random.

    Arguments:
        rows: of the store.
        z: their redshifts.
        kind: their classes; empty texts where the store knows none.
        rare: further spectra of classes of which there are too few candidates.
    """

    rows: Int64[np.ndarray, "n"]
    z: Float64[np.ndarray, "n"]
    kind: Shaped[np.ndarray, "n"]
    rare: dict[str, Int64[np.ndarray, "m"]] = field(default_factory=dict)

    @classmethod
    def of(cls, store: SpectraStore, odd: Int64[np.ndarray, "k"], seed: int, methods: Sequence[AnyMethod]) -> Self:
        """Draw candidates from places spread over the store; spectra set aside are none, and odd ones only where there
        are too few others, which a warning tells.

        Where a method asks for the class of the odd ones, classes that are too rare among candidates are looked for in
        the whole store.

        Arguments:
            store: the spectra.
            odd: rows of those that are explained.
            seed: of the order.
            methods: that compare with ordinary spectra, or do not; where none does there are no candidates.

        Raises:
            ConfigError: there is no second usable spectrum.
        """
        asking = [method for method in methods if isinstance(method, Imo | ExpectedGradients)]
        if not asking:
            nothing = np.zeros(0, np.int64)
            return cls(nothing, nothing.astype(np.float64), nothing.astype(str))
        rng = np.random.default_rng([seed, store.rows])
        most = max(method.baselines for method in asking)
        length = -(-max(_CANDIDATES, 2 * most) // _RUNS)
        firsts = np.unique(np.linspace(0, max(0, store.rows - length), _RUNS).astype(np.int64))
        rows = np.unique((firsts[:, None] + np.arange(length)).ravel())
        rows = rows[rows < store.rows]
        usable = rows[store.column("status", rows) == 0]
        # The order first: which spectra are explained hardly changes which ones they are compared with.
        drawn = rng.permutation(usable)
        ordinary = ~np.isin(drawn, odd)
        chosen = drawn[ordinary]
        if len(chosen) < most:
            # One more, since none is compared with itself.
            chosen = np.concatenate([chosen, drawn[~ordinary][: most + 1 - len(chosen)]])
            if len(chosen) < 2:
                raise ConfigError(f"{asking[0].name} compares spectra with others, and the store has no other to use")
            warnings.warn(
                f"only {int(ordinary.sum())} ordinary spectra are left of the {most} that others are compared with "
                f"(explain.methods); explained ones fill up, {len(chosen) - 1} in all",
                DistspecWarning,
                stacklevel=2,
            )
        kind = _classes(store, chosen)
        wanted = max((method.baselines for method in asking if method.like == "class"), default=0)
        short = {str(one) for one in np.unique(_classes(store, odd)) if (kind == one).sum() < wanted}
        rare = _rare(store, odd, short, wanted) if short else {}
        return cls(chosen, store.column("z", chosen).astype(np.float64), kind, rare)

    def like(
        self, store: SpectraStore, rows: Int64[np.ndarray, "m"], count: int, way: Literal["any", "class", "redshift"]
    ) -> list[Int64[np.ndarray, "count"]]:
        """Choose candidates for each of some rows of the store, never itself.

        Of one class, or at redshifts nearest to its own; where there are too few of the class, others fill up. Small
        stores give fewer.
        """
        ordered = self._ordered(store, rows, way)
        return [own[own != row][:count] for own, row in zip(ordered, rows, strict=True)]

    def _ordered(
        self, store: SpectraStore, rows: Int64[np.ndarray, "m"], way: Literal["any", "class", "redshift"]
    ) -> list[Int64[np.ndarray, "n"]]:
        """Put the candidates in order for each of some rows, the best first."""
        if way == "any":
            return [self.rows] * len(rows)
        if way == "redshift":
            distance = np.abs(self.z - store.column("z", rows).astype(np.float64)[:, None])
            order = np.argsort(np.where(np.isnan(distance), np.inf, distance), axis=1, kind="stable")
        else:
            return [self._of_class(str(kind)) for kind in _classes(store, rows)]
        return list(self.rows[order])

    def _of_class(self, kind: str) -> Int64[np.ndarray, "n"]:
        own = self.kind == kind
        found = np.concatenate([self.rows[own], self.rare.get(kind, self.rows[:0]), self.rows[~own]])
        return found[np.sort(np.unique(found, return_index=True)[1])]

    def near(self, store: SpectraStore, rows: Int64[np.ndarray, "m"], method: AnyMethod) -> list[Spectra]:
        """Read what a method compares each of some rows with, each spectrum once; none where it asks for none."""
        match method:
            case Imo(baselines=count, like=way) | ExpectedGradients(baselines=count, like=way):
                chosen = self.like(store, rows, count, way)
            case _:
                return []
        distinct, place = np.unique(np.concatenate(chosen), return_inverse=True)
        read = store.take(distinct)
        return [read[one] for one in np.split(place, np.cumsum([len(one) for one in chosen])[:-1])]


def _classes(store: SpectraStore, rows: Int64[np.ndarray, "m"]) -> Shaped[np.ndarray, "m"]:
    there = "class" in store.column_names
    return store.column("class", rows).astype(str) if there else np.full(len(rows), "")


def _rare(
    store: SpectraStore, odd: Int64[np.ndarray, "k"], kinds: set[str], wanted: int
) -> dict[str, Int64[np.ndarray, "m"]]:
    """Look for usable spectra of some classes, shard by shard, until there are so many of each."""
    found: dict[str, Int64[np.ndarray, "m"]] = {kind: np.zeros(0, np.int64) for kind in sorted(kinds)}
    for shard in range(store.shards):
        short = [kind for kind, rows in found.items() if len(rows) < wanted]
        if not short:
            break
        rows = np.arange(*store.base.bounds(shard))
        names = _classes(store, rows)
        own = rows[np.isin(names, short)]
        own = own[(store.column("status", own) == 0) & ~np.isin(own, odd)]
        names = names[own - rows[0]]
        for kind in short:
            found[kind] = np.concatenate([found[kind], own[names == kind]])[:wanted]
    return found
