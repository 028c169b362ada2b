"""What became of every spectrum and every file: scored, or set aside with a reason, and the counts add up."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from jaxtyping import Bool, Int32, Int64

from distspec.errors import LayoutError, ShardError, StoreError
from distspec.results.scores import Scores
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
    """

    spectra: int
    scored: int = 0
    set_aside: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    files: int = 0
    scored_files: int = 0
    unreadable: list[Aside] = field(default_factory=list)
    others: list[Aside] = field(default_factory=list)

    @property
    def unreadable_count(self) -> int:
        """Number of all spectra whose file could not be read."""
        return self.reasons[Status.UNREADABLE.reasons[0]]


def take_census(store: SpectraStore, scores: Scores, keep: int = 100) -> Census:
    """Count a store against its scores, shard by shard.

    Rows of one file lie one behind the other, as ingest writes them; files are counted by where the name changes.

    Arguments:
        store: the spectra.
        scores: their scores.
        keep: how many spectra set aside are named, of the unreadable and of the others.

    Raises:
        LayoutError: the scores are those of another store.
        ShardError: a spectrum is neither scored nor set aside, or both.
        StoreError: the counts do not add up.
    """
    if scores.rows != store.rows:
        raise LayoutError(f"{scores.key[0]} has {scores.rows} rows, the store {store.rows}; score this store")
    census = Census(store.rows)
    given_up = scores.given_up()
    last, last_scored = "", False
    for shard in range(store.shards):
        start, stop = store.base.bounds(shard)
        status = store.status(start, stop)
        usable = status == 0
        lost = {row: why for row, why in given_up.items() if start <= row < stop and usable[row - start]}
        usable[[row - start for row in lost]] = False
        _require_agreement(scores, start, stop, usable)
        census.reasons.update({GIVEN_UP: len(lost)} if lost else {})
        _name_given_up(census, store, lost, keep)
        census.scored += int(usable.sum())
        census.set_aside += int((~usable).sum())
        for reason, count in first_reasons(status).items():
            census.reasons[Status[reason].reasons[0]] += count
        last, last_scored = _count_files(census, store, start, stop, usable, last, last_scored)
        _name_aside(census, store, np.arange(start, stop), status, keep)
    if census.scored + census.set_aside != census.spectra or sum(census.reasons.values()) != census.set_aside:
        raise StoreError(
            f"{census.scored} scored + {census.set_aside} set aside (reasons: {sum(census.reasons.values())}); "
            f"the store has {census.spectra} rows; run `distspec score` again"
        )
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


def _count_files(
    census: Census, store: SpectraStore, start: int, stop: int, usable: Bool[np.ndarray, "n"], last: str, scored: bool
) -> tuple[str, bool]:
    """Count the files of a shard; the last one may go on in the next shard."""
    names = store.base.read("columns/file", start, stop)
    begins = np.append(0, np.flatnonzero(names[1:] != names[:-1]) + 1)
    any_scored = np.logical_or.reduceat(usable, begins)
    fresh = np.ones(len(begins), dtype=bool)
    if start > 0 and names[0] == last:
        fresh[0] = False
        # Counted as scored already where an earlier shard scored some of it.
        census.scored_files += int(any_scored[0] and not scored)
        scored = scored or bool(any_scored[0])
    census.files += int(fresh.sum())
    census.scored_files += int((any_scored & fresh).sum())
    return str(names[-1]), scored if len(begins) == 1 and not fresh[0] else bool(any_scored[-1])


def _name_aside(
    census: Census, store: SpectraStore, rows: Int64[np.ndarray, "n"], status: Int32[np.ndarray, "n"], keep: int
) -> None:
    """Name the spectra set aside, as long as there is room in the lists."""
    unreadable = (status & Status.UNREADABLE) != 0
    for named, chosen in ((census.unreadable, unreadable), (census.others, (status != 0) & ~unreadable)):
        picked = np.flatnonzero(chosen)[: keep - len(named)]
        if not picked.size:
            continue
        ids, files, notes = (store.column(name, rows[picked]) for name in ("id", "file", "note"))
        for index, position in enumerate(picked):
            reasons = Status(int(status[position])).reasons
            named.append(Aside(int(rows[position]), str(ids[index]), str(files[index]), reasons, str(notes[index])))


def _name_given_up(census: Census, store: SpectraStore, lost: Mapping[int, str], keep: int) -> None:
    rows = np.array(list(lost)[: keep - len(census.others)], np.int64)
    if rows.size:
        ids, files = (store.column(name, rows) for name in ("id", "file"))
        for row, survey_id, file in zip(rows.tolist(), ids, files, strict=True):
            census.others.append(Aside(row, str(survey_id), str(file), [GIVEN_UP], lost[row]))
