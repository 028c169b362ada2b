"""What became of every spectrum and every file: scored, or set aside with a reason, and the counts add up."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from jaxtyping import Bool, Int32, Int64

from distspec.errors import LayoutError, ShardError, StoreError
from distspec.results.scores import Fold, Scores, fold_here
from distspec.spectra import Status, first_reasons
from distspec.store import SpectraStore

__all__ = ["GIVEN_UP", "Aside", "Census", "take_census"]

GIVEN_UP: Final = "ended the workers that scored it"
"""Reason of a spectrum that is usable as far as ingest could tell."""


@dataclass(frozen=True)
class Aside:
    """One spectrum that is set aside: its place, its id as text, and why."""

    row: int
    id: str
    file: str
    reasons: list[str]
    note: str


@dataclass
class Census:
    """Counts over a store and its score layer.

    Arguments:
        spectra: rows of the store.
        scored: rows with scores.
        set_aside: rows without; `spectra` is the sum of the two.
        reasons: first reason of each spectrum set aside, as a sentence -> count; these add up to `set_aside`.
        files: files (or blocks of a simulation) that the rows came from.
        scored_files: those with at least one scored spectrum.
        unreadable: spectra of files that could not be read, the first few.
        others: other spectra that are set aside, the first few.
        keep: how many these are, at most.
        first, last: name of the first and of the last file, and whether some of it is scored.
    """

    spectra: int
    scored: int = 0
    set_aside: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    files: int = 0
    scored_files: int = 0
    unreadable: list[Aside] = field(default_factory=list)
    others: list[Aside] = field(default_factory=list)
    keep: int = 100
    first: tuple[str, bool] = ("", False)
    last: tuple[str, bool] = ("", False)

    def __add__(self, other: "Census") -> "Census":
        """Join the census of the shards that follow; a file that goes on in them is one."""
        (name, before), (following, after) = self.last, other.first
        same = name == following
        return Census(
            self.spectra + other.spectra,
            self.scored + other.scored,
            self.set_aside + other.set_aside,
            self.reasons + other.reasons,
            self.files + other.files - same,
            self.scored_files + other.scored_files - (same and before and after),
            (self.unreadable + other.unreadable)[: self.keep],
            (self.others + other.others)[: self.keep],
            self.keep,
            (self.first[0], self.first[1] or (same and self.files == 1 and after)),
            (other.last[0], other.last[1] or (same and other.files == 1 and before)),
        )

    @property
    def unreadable_count(self) -> int:
        """Number of all spectra whose file could not be read."""
        return self.reasons[Status.UNREADABLE.reasons[0]]


def take_census(store: SpectraStore, scores: Scores, keep: int = 100, fold: Fold = fold_here) -> Census:
    """Count a store against its scores, shard by shard.

    Rows of one file lie one behind the other, as ingest writes them; files are counted by where the name changes.

    Arguments:
        store: the spectra.
        scores: their scores.
        keep: how many spectra set aside are named, of the unreadable and of the others.
        fold: adds up over shards.

    Raises:
        LayoutError: the scores are those of another store.
        ShardError: a spectrum is neither scored nor set aside, or both.
        StoreError: the counts do not add up.
    """
    if scores.rows != store.rows:
        raise LayoutError(f"{scores.key[0]} has {scores.rows} rows, the store {store.rows}; score this store")
    census: Census = fold(_CensusTaker, (store, scores, keep), range(store.shards), "census") or Census(0)
    if census.scored + census.set_aside != store.rows or sum(census.reasons.values()) != census.set_aside:
        raise StoreError(
            f"{census.scored} scored + {census.set_aside} set aside (reasons: {sum(census.reasons.values())}); "
            f"the store has {store.rows} rows; run `distspec score` again"
        )
    return census


class _CensusTaker:
    """Counts the spectra and files of a shard."""

    def __init__(self, store: SpectraStore, scores: Scores, keep: int) -> None:
        self._store, self._scores, self._keep = store, scores, keep
        self._given_up = scores.given_up()

    def __call__(self, shard: int) -> Census:
        store, (start, stop) = self._store, self._store.base.bounds(shard)
        status = store.status(start, stop)
        usable = status == 0
        lost = {row: why for row, why in self._given_up.items() if start <= row < stop and usable[row - start]}
        usable[[row - start for row in lost]] = False
        _require_agreement(self._scores, start, stop, usable)
        scored = int(usable.sum())
        census = Census(stop - start, scored, stop - start - scored, keep=self._keep)
        census.reasons.update({GIVEN_UP: len(lost)} if lost else {})
        _name_given_up(census, store, lost)
        for reason, count in first_reasons(status).items():
            census.reasons[Status[reason].reasons[0]] += count
        _count_files(census, store, start, stop, usable)
        _name_aside(census, store, np.arange(start, stop), status)
        return census


def _require_agreement(scores: Scores, start: int, stop: int, usable: Bool[np.ndarray, "n"]) -> None:
    """Refuse a row that is both or neither of scored and set aside."""
    for name in scores.names:
        odd = np.flatnonzero(~np.isnan(scores.read(name, start, stop)) != usable)
        if odd.size:
            row = int(odd[0])
            state = "is not set aside but has no" if usable[row] else "is set aside but has a"
            error = ShardError(
                f"row {start + row} (and {odd.size - 1} more of rows {start}-{stop}) {state} score {name}; "
                f"remove layer {scores.layer(name).name} and run its stage again"
            )
            error.rows = (start, stop)
            raise error


def _count_files(census: Census, store: SpectraStore, start: int, stop: int, usable: Bool[np.ndarray, "n"]) -> None:
    """Count the files of a shard; the first and the last may go on in its neighbours."""
    names = store.base.read("columns/file", start, stop)
    begins = np.append(0, np.flatnonzero(names[1:] != names[:-1]) + 1)
    any_scored = np.logical_or.reduceat(usable, begins)
    census.files, census.scored_files = len(begins), int(any_scored.sum())
    census.first, census.last = (str(names[0]), bool(any_scored[0])), (str(names[-1]), bool(any_scored[-1]))


def _name_aside(
    census: Census, store: SpectraStore, rows: Int64[np.ndarray, "n"], status: Int32[np.ndarray, "n"]
) -> None:
    """Name the spectra set aside, as long as there is room in the lists."""
    unreadable = (status & Status.UNREADABLE) != 0
    for named, chosen in ((census.unreadable, unreadable), (census.others, (status != 0) & ~unreadable)):
        picked = np.flatnonzero(chosen)[: census.keep - len(named)]
        if not picked.size:
            continue
        ids, files, notes = (store.column(name, rows[picked]) for name in ("id", "file", "note"))
        for index, position in enumerate(picked):
            reasons = Status(int(status[position])).reasons
            named.append(Aside(int(rows[position]), str(ids[index]), str(files[index]), reasons, str(notes[index])))


def _name_given_up(census: Census, store: SpectraStore, lost: Mapping[int, str]) -> None:
    rows = np.array(list(lost)[: census.keep - len(census.others)], np.int64)
    if rows.size:
        ids, files = (store.column(name, rows) for name in ("id", "file"))
        for row, survey_id, file in zip(rows.tolist(), ids, files, strict=True):
            census.others.append(Aside(row, str(survey_id), str(file), [GIVEN_UP], lost[row]))
