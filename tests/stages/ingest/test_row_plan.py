"""Which file gives which rows: nothing twice, nothing lost, whatever is listed and however it is cut."""

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distspec.errors import DistspecWarning, LayoutError, SourceError
from distspec.sources import Entry
from distspec.stages.ingest.row_plan import FileRows, new_files, require_rows
from distspec.store import Inventory


def entry(name: str, *, size: int = 100, changed: int = 5, count: int | None = 2) -> Entry:
    return Entry(name, size, changed, count)


def inventory(*counts: int) -> Inventory:
    """Files a, b, ... of these numbers of spectra."""
    names = [chr(ord("a") + number) for number in range(len(counts))]
    return Inventory(names, *(np.full(len(counts), value, np.int64) for value in (100, 5)), np.array(counts, np.int64))


def not_asked(names: list[str]) -> Iterable[tuple[str, int]]:
    assert not names
    return []


def whole(number: int) -> bool:
    return False


@given(counts=st.lists(st.sampled_from([-1, 0, 1, 2, 5]), min_size=1, max_size=12), shard_rows=st.integers(1, 7))
def test_the_pieces_of_all_shards_are_every_spectrum_once_in_order(counts: list[int], shard_rows: int) -> None:
    files = inventory(*counts)
    rows = FileRows(files)
    found: list[tuple[str, int]] = []
    for start in range(0, files.rows, shard_rows):
        stop = min(start + shard_rows, files.rows)
        pieces = rows.pieces(start, stop)
        assert all(map(len, pieces))  # no file is opened for nothing
        assert sum(map(len, pieces)) == stop - start
        found += [(piece.name, spectrum) for piece in pieces for spectrum in range(piece.start, piece.stop)]
        assert all(piece.counted == (counts[files.names.index(piece.name)] >= 0) for piece in pieces)
    assert found == [(name, n) for name, count in zip(files.names, counts, strict=True) for n in range(abs(count))]


@given(counts=st.lists(st.sampled_from([-1, 0, 1, 2, 5]), min_size=1, max_size=12))
def test_a_files_rows_follow_those_of_the_file_before(counts: list[int]) -> None:
    rows = FileRows(inventory(*counts))
    ends = [rows.of_file(number) for number in range(len(counts))]
    assert ends[0][0] == 0
    assert all(stop - start == abs(count) for (start, stop), count in zip(ends, counts, strict=True))
    assert all(before[1] == after[0] for before, after in zip(ends, ends[1:], strict=False))


def test_only_files_that_must_be_opened_are_counted() -> None:
    asked = []

    def count(names: list[str]) -> Iterable[tuple[str, int]]:
        asked.append(names)
        return [("c", -1), ("b", 7)]  # in any order

    found = new_files([entry("a"), entry("b", count=None), entry("c", count=None)], None, "s.zarr", count, whole)
    assert asked == [["b", "c"]]
    assert (found.names, found.counts.tolist(), found.rows) == (["a", "b", "c"], [2, 7, -1], 10)


def test_files_that_are_known_are_not_listed_again() -> None:
    found = new_files([entry("a"), entry("b"), entry("c", count=4)], inventory(2, 2), "s.zarr", not_asked, whole)
    assert (found.names, found.counts.tolist()) == (["c"], [4])


def test_a_known_file_of_another_size_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"1 files have changed since s\.zarr .* b has 101 bytes, had 100"):
        new_files([entry("a"), entry("b", size=101)], inventory(2, 2), "s.zarr", not_asked, whole)


def test_a_known_file_that_was_written_again_in_the_same_size_is_named_and_left() -> None:
    with pytest.warns(DistspecWarning, match="1 files were written again, in the same size, .* such as b"):
        found = new_files([entry("a"), entry("b", changed=6)], inventory(2, 2), "s.zarr", not_asked, whole)
    assert len(found) == 0


def test_a_file_of_which_nothing_could_be_read_comes_again_once_it_was_put_right() -> None:
    known = inventory(2, -1)
    put_right = [entry("a"), entry("b", size=300, changed=6, count=3)]
    found = new_files(put_right, known, "s.zarr", not_asked, lambda number: number == 1)
    assert (found.names, found.counts.tolist()) == (["b"], [3])
    # From then on the name stands twice, and the later file is what is compared.
    assert len(new_files(put_right, known + found, "s.zarr", not_asked, whole)) == 0


@pytest.mark.parametrize("files", [inventory(), inventory(0, 0)])
def test_a_source_without_a_wanted_spectrum_is_refused(files: Inventory) -> None:
    with pytest.raises(SourceError, match="none of the .* files holds a wanted spectrum"):
        require_rows(files)
