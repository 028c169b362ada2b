"""What lists of anomalies lean towards: properties of the spectra, exposures, and parts of the instrument.

A list that prefers a S/N, a plate or a fiber tells of the instrument as much as of the sky. Everything is counted shard
by shard; what is kept is one pair of numbers for each value that a member has, and one count for each label.

References:
    Reis, Rotman, Poznanski, Prochaska & Wolf 2021, Astronomy and Computing: fig. 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from distspec.results.columns import EXPOSURES, PARTS, Columns
from distspec.results.scores import Fold, Scores, fold_here
from distspec.statistics.significance import concentration, holm, uniformity
from distspec.statistics.summaries import ByName
from distspec.store import SpectraStore

__all__ = ["Groups", "Holding", "SharedLabel", "find_groups", "measure_bias"]

Lists = Mapping[str, Int64[np.ndarray, "_"]]
"""Rows of the store by the name of the score that lists them."""

_FEWEST: Final = 5
"""Members of a list whose property must be known for a test."""

_LIMIT: Final = 0.01
"""Chance, corrected for all tests, below which a group is named."""


def _read(store: SpectraStore, name: str, rows: "slice | Int64[np.ndarray, 'n']") -> Shaped[np.ndarray, "n"]:
    """Read a column of a run of rows or of single ones; text as numpy's own."""
    field = f"columns/{name}"
    values = store.base.read(field, rows.start, rows.stop) if isinstance(rows, slice) else store.base.take(field, rows)
    return np.asarray(values if values.dtype.kind in "iufb" else values.astype(np.str_))


def _known(values: Shaped[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Tell which values are known: sources write NaN, -1 in whole numbers and empty text where they know nothing."""
    match values.dtype.kind:
        case "f":
            return np.asarray(np.isfinite(values))
        case "i":
            return np.asarray(values != -1)
        case "U":
            return np.asarray(values != "")
        case _:
            return np.ones(len(values), bool)


def _scored(scores: Scores, shard: int) -> Bool[np.ndarray, "n"]:
    """Tell which rows of a shard are not set aside."""
    return np.asarray(~np.isnan(scores.read(scores.names[0], *scores.bounds(shard))))


# --- properties ------------------------------------------------------------------------------------------------------


def measure_bias(
    store: SpectraStore, scores: Scores, lists: Lists, properties: Sequence[str], fold: Fold = fold_here
) -> dict[str, Any]:
    """Test every list against every property, by the exact ranks of its members among all scored spectra.

    Whole numbers are ranked as such: those that name exposures may have more digits than a float.

    Arguments:
        store: whose columns the properties are.
        scores: NaN for what is set aside.
        lists: rows by score.
        properties: names of columns of numbers.
        fold: adds up over shards.

    Returns:
        Plain values for JSON: `properties`, each with the number of scored spectra of which it is `known`, and `tests`:
        `agreement.Uniformity` of each score and property with at least five `members` of known value, and `corrected`,
        p by Holm over all of these.
    """
    rows = np.unique(np.concatenate(list(lists.values())))
    taken = {name: _read(store, name, rows) for name in properties}
    values = {name: np.unique(column[_known(column)]) for name, column in taken.items()}
    found = fold(_Standing, (store, scores, values), range(scores.shards), "properties") if properties else {}
    total = {name: int(found[name][0, -1]) for name in properties}
    tests: list[dict[str, Any]] = []
    for name in properties:
        for score, members in lists.items():
            column = taken[name][np.searchsorted(rows, members)]
            place = np.searchsorted(values[name], column[_known(column)])
            if len(place) >= _FEWEST:
                ranks, upto = found[name][:, place]
                told = uniformity(ranks, total[name], upto - ranks).to_dict()
                tests.append({"score": score, "property": name, "members": len(place), **told})
    corrected = holm(np.array([test["p"] for test in tests], np.float64)).tolist()
    return {
        "properties": [{"name": name, "known": total[name]} for name in properties],
        "tests": [test | {"corrected": p} for test, p in zip(tests, corrected, strict=True)],
    }


class _Standing:
    """Counts, in a shard, the scored spectra below and up to each of some values of each property, and all of them."""

    def __init__(self, store: SpectraStore, scores: Scores, values: Mapping[str, Shaped[np.ndarray, "_"]]) -> None:
        self._store, self._scores, self._values = store, scores, values

    def __call__(self, shard: int) -> ByName:
        scored, rows = _scored(self._scores, shard), slice(*self._scores.bounds(shard))
        found = ByName()
        for name, distinct in self._values.items():
            column = _read(self._store, name, rows)
            column = np.sort(column[scored & _known(column)])
            below, upto = (np.searchsorted(column, distinct, side) for side in ("left", "right"))
            found[name] = np.array([[*below, len(column)], [*upto, len(column)]], np.int64)
        return found


# --- groups ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Holding:
    """Members of one list that share a label.

    Arguments:
        score: whose list it is.
        rows: of the members, best first.
        expected: number of members that a random list has.
        p: chance of so many, corrected for all labels, lists and kinds of labels.
    """

    score: str
    rows: Int64[np.ndarray, "m"]
    expected: float
    p: float


@dataclass(frozen=True, eq=False)
class SharedLabel:
    """A label, such as an exposure, that lists hold too many spectra of.

    Arguments:
        columns: that make the label.
        label: such as "plate 266, mjd 51630".
        spectra: scored ones of the survey that have it.
        holdings: in the lists where they are too many.
    """

    columns: Columns
    label: str
    spectra: int
    holdings: tuple[Holding, ...]

    @property
    def p(self) -> float:
        """Smallest p of the lists."""
        return min(holding.p for holding in self.holdings)

    @property
    def rows(self) -> Int64[np.ndarray, "m"]:
        """Members in any list, in the order of the store."""
        return np.unique(np.concatenate([holding.rows for holding in self.holdings]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; members are counted, not named."""
        return {
            "columns": list(self.columns),
            "label": self.label,
            "spectra": self.spectra,
            "members": len(self.rows),
            "p": self.p,
            "lists": [
                {"score": held.score, "members": len(held.rows), "expected": held.expected, "p": held.p}
                for held in self.holdings
            ],
        }


@dataclass(frozen=True, eq=False)
class Groups:
    """All labels that lists hold too many spectra of.

    Arguments:
        labels: how many there are in the survey, by the columns that make them.
        tests: lists times kinds of labels, which each p is corrected for beside the number of labels.
        found: groups, smallest p first.
    """

    labels: dict[Columns, int]
    tests: int
    found: tuple[SharedLabel, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "kinds": [{"columns": list(columns), "labels": count} for columns, count in self.labels.items()],
            "tests": self.tests,
            "limit": _LIMIT,
            "found": [group.to_dict() for group in self.found],
        }


def find_groups(
    store: SpectraStore, scores: Scores, lists: Lists, kinds: Sequence[Columns], asked: bool, fold: Fold = fold_here
) -> Groups:
    """Find exposures and parts of the instrument from which lists hold too many spectra.

    Arguments:
        store: whose columns make the labels.
        scores: NaN for what is set aside.
        lists: rows by score.
        kinds: of `exposure_columns`.
        asked: whether the first of these was named in the settings; else the first exposure that most spectra have.
        fold: adds up over shards.

    References:
        `significance.concentration`: exact hypergeometric chances, corrected (Holm) for all labels.
    """
    found_labels = fold(_Labels, (store, scores, tuple(kinds)), range(scores.shards), "exposures")
    counts: dict[Columns, dict[str, int]] = {columns: found_labels[columns] for columns in kinds}
    total = found_labels[()]
    used = _used(counts, total, asked)
    tests = max(1, len(used) * len(lists))
    found: dict[tuple[Columns, str], list[Holding]] = {}
    for columns in used:
        all_labels = np.array(list(counts[columns]), np.str_)
        numbers = np.array(list(counts[columns].values()), np.int64)
        for score, rows_of_list in lists.items():
            labels, place = _labels(store, columns, rows_of_list)
            members = labels[place[place >= 0]]
            for group in concentration(members, all_labels, numbers, _LIMIT / tests).groups:
                mine = rows_of_list[place == np.flatnonzero(labels == group.label)[0]]
                held_by = Holding(score, mine, group.expected, min(1.0, group.p * tests))
                found.setdefault((columns, str(group.label)), []).append(held_by)
    groups = [SharedLabel(*key, counts[key[0]][key[1]], tuple(holdings)) for key, holdings in found.items()]
    ordered = tuple(sorted(groups, key=lambda group: (group.p, group.columns, group.label)))
    return Groups({columns: len(counts[columns]) for columns in used}, tests, ordered)


class _Labels:
    """Counts the scored spectra of a shard by their labels of each kind, and, under no columns, all of them."""

    def __init__(self, store: SpectraStore, scores: Scores, kinds: Sequence[Columns]) -> None:
        self._store, self._scores, self._kinds = store, scores, kinds

    def __call__(self, shard: int) -> ByName:
        scored, rows = _scored(self._scores, shard), slice(*self._scores.bounds(shard))
        found: ByName = ByName({(): int(scored.sum())})
        for columns in self._kinds:
            labels, place = _labels(self._store, columns, rows)
            held = np.bincount(place[scored & (place >= 0)], minlength=len(labels))
            told = zip(labels.tolist(), held.tolist(), strict=True)
            found[columns] = ByName({label: more for label, more in told if more})
        return found


def _used(counts: Mapping[Columns, Mapping[str, int]], total: int, asked: bool) -> list[Columns]:
    """Choose one name of exposures, and the parts that divide the spectra in another way."""
    exposures = [columns for columns in counts if columns in EXPOSURES]
    fit = [columns for columns in exposures if 2 * sum(counts[columns].values()) > total and len(counts[columns]) > 1]
    chosen = list(counts)[:1] if asked else fit[:1]
    for columns in counts:
        if columns in chosen or columns not in PARTS or len(counts[columns]) < 2:
            continue
        # Plates of one exposure each need not be told of twice.
        same = (set(columns) < set(other) and len(counts[other]) == len(counts[columns]) for other in chosen)
        if not any(same):
            chosen.append(columns)
    return chosen


def _labels(
    store: SpectraStore, columns: Columns, rows: "slice | Int64[np.ndarray, 'n']"
) -> tuple[Shaped[np.ndarray, "c"], Int64[np.ndarray, "n"]]:
    """Join columns to labels such as "plate 266, mjd 51630"; give the distinct ones, and which each row has, or -1."""
    values = {name: _read(store, name, rows) for name in columns}
    known = np.logical_and.reduce([_known(column) for column in values.values()])
    place = np.zeros(int(known.sum()), np.int64)
    first = np.zeros(0, np.int64)
    for column in values.values():
        distinct, inverse = np.unique(column[known], return_inverse=True)
        _, first, place = np.unique(place * len(distinct) + inverse, return_index=True, return_inverse=True)
    texts = [np.char.add(f"{name} ", column[known][first].astype(np.str_)) for name, column in values.items()]
    labels = reduce(lambda before, text: np.char.add(np.char.add(before, ", "), text), texts)
    found = np.full(len(known), -1, np.int64)
    found[known] = place
    return labels, found
