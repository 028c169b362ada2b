"""Which spectra are explained: the top lists of scores, or those of a list of ids."""

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped

from distspec.errors import ConfigError, DistspecWarning, SourceError
from distspec.results.scores import Fold, Scores, distributions, fold_here
from distspec.results.scores import top_lists as largest
from distspec.store import SpectraStore

__all__ = ["SelectedRows", "by_ids", "name_of", "top_lists", "top_rows"]


@dataclass(frozen=True, eq=False)
class SelectedRows:
    """Spectra to explain, those of the first list first.

    Arguments:
        rows: of the store, each once.
        rank: place of each in the list of each of k scores, from 0; -1 where it is not in it.
    """

    rows: Int64[np.ndarray, "n"]
    rank: Int64[np.ndarray, "n k"]


def top_rows(
    scores: Scores, names: Sequence[str], fraction: float, limit: int, fold: Fold = fold_here
) -> list[Int64[np.ndarray, "m"]]:
    """Give the rows of the top list of each of some scores, best first.

    Raises:
        ConfigError: nothing has a score.
    """
    histograms = distributions(scores.only(list(dict.fromkeys(names))), fold)
    counts = {name: int(histogram.counts.sum()) for name, histogram in histograms.items()}
    for name, scored in counts.items():
        if scored == 0:
            layer = scores.layer(name).name
            raise ConfigError(f"no spectrum of layer {layer} has a score; there is nothing to explain")
    sizes = {name: min(limit, max(1, math.ceil(fraction * scored))) for name, scored in counts.items()}
    found = largest(scores, sizes, histograms, fold)
    return [found[name].rows for name in names]


def top_lists(
    scores: Scores, names: Sequence[str], fraction: float, limit: int, fold: Fold = fold_here
) -> SelectedRows:
    """Join the top lists of some scores; a spectrum that is in several is explained once, for all of them."""
    lists = top_rows(scores, names, fraction, limit, fold)
    joined = np.concatenate(lists)
    rows = joined[np.sort(np.unique(joined, return_index=True)[1])]
    return SelectedRows(rows, np.stack([_places(rows, one) for one in lists], axis=1))


def by_ids(
    store: SpectraStore, scores: Scores, names: Sequence[str], path: str, fold: Fold = fold_here
) -> SelectedRows:
    """Find the spectra of a list of ids that have a score; they are ranked among themselves.

    A warning counts the others.

    Arguments:
        store: the spectra.
        scores: those that are explained.
        names: of the scores.
        path: text with one id a line (.txt), or a table with a column `id`.
        fold: adds up over shards.

    Raises:
        SourceError: there is no such file, or it cannot be read.
        ConfigError: it holds no id of the store that has a score.
    """
    wanted = _read_ids(path)
    meant = fold(_Meant, (store, wanted), range(store.shards), "ids") or _Named(np.zeros(0, np.int64), wanted[:0])
    found, ids = meant.rows, meant.ids
    values = [scores.take(name, found) for name in names]
    scored = ~np.isnan(np.stack(values)).any(axis=0)
    if not scored.any():
        such = f", such as {str(wanted[0])!r}," if len(wanted) else ""
        raise ConfigError(
            f"explain.ids: none of the {len(wanted)} ids of {path}{such} is that of a scored spectrum of the store"
        )
    # An id that came twice has one row with a score at most.
    known = len(np.unique(ids))
    unknown, unscored = len(wanted) - known, known - len(np.unique(ids[scored]))
    if unknown or unscored:
        told = [f"{unknown} not in the store"] * (unknown > 0) + [f"{unscored} without a score"] * (unscored > 0)
        warnings.warn(
            f"explain.ids: of {len(wanted)} ids in {path} {' and '.join(told)}", DistspecWarning, stacklevel=2
        )
    # Best first by the first score, and equal ones by row.
    order = np.flatnonzero(scored)[np.argsort(-values[0][scored], kind="stable")]
    lists = [order[np.argsort(-one[order], kind="stable")] for one in values]
    return SelectedRows(found[order], np.stack([_places(order, one) for one in lists], axis=1))


@dataclass(frozen=True, eq=False)
class _Named:
    """Spectra of a list of ids."""

    rows: Int64[np.ndarray, "n"]
    ids: Shaped[np.ndarray, "n"]

    def __add__(self, other: "_Named") -> "_Named":
        return _Named(np.concatenate([self.rows, other.rows]), np.concatenate([self.ids, other.ids]))


class _Meant:
    """Finds the spectra of a shard that a list of ids means."""

    def __init__(self, store: SpectraStore, wanted: Shaped[np.ndarray, "m"]) -> None:
        self._store, self._wanted = store, wanted

    def __call__(self, shard: int) -> _Named:
        rows = np.arange(*self._store.base.bounds(shard))
        ids = self._store.column("id", rows).astype(str)
        meant = np.isin(ids, self._wanted)
        return _Named(rows[meant], ids[meant])


def name_of(path: str | None) -> str:
    """Name the content of a list of ids, so that another list has other explanations.

    Raises:
        SourceError: there is no such file, or it cannot be read.
    """
    return "" if path is None else hashlib.sha256("\n".join(_read_ids(path)).encode()).hexdigest()


def _places(rows: Int64[np.ndarray, "n"], ordered: Int64[np.ndarray, "m"]) -> Int64[np.ndarray, "n"]:
    """Give the place of each row in an ordered list; -1 where it is not in it."""
    by_row = np.argsort(ordered, kind="stable")
    place = np.minimum(np.searchsorted(ordered[by_row], rows), len(ordered) - 1)
    return np.where(ordered[by_row][place] == rows, by_row[place], -1)


def _read_ids(path: str) -> Shaped[np.ndarray, "m"]:
    """Read ids as text, in which no digit is lost."""
    if path.lower().endswith(".txt"):
        if not Path(path).is_file():
            raise SourceError(f"explain.ids: no file {path!r}")
        try:
            lines = Path(path).read_text("utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"explain.ids: {path} is no text of ids: {' '.join(str(error).split())}") from error
        found = np.array(lines, dtype=str)
    else:
        # Imported here: workers, which need the rows alone, do without Arrow.
        from distspec.sources.files.tables import read_table, require_table
        from distspec.store.arrow import to_numpy

        require_table(path, "explain.ids")
        ids, missing = to_numpy(read_table(path, "id", ("id",))[0])
        found = ids[~missing].astype(str)
    found = np.char.strip(found)
    return np.unique(found[found != ""])
