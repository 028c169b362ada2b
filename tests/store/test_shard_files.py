"""Arrays read directly are what zarr reads, whatever they hold and however they are cut; damage names its shard."""

import os
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from distspec.errors import PartialShardError, StoreError
from distspec.spectra import Spectra, WaveGrid
from distspec.store import Fields, Layer, SpectraStore, limit_threads
from distspec.store.shard_files import side_by_side
from tests.conftest import make_spectra, make_store

FIELDS: Fields = {
    "float": ("f4", ()),
    "double": ("f8", (3,)),
    "id": ("i8", ()),
    "byte": ("i1", ()),
    "flag": ("b1", ()),
    "map": ("f4", (2, 2)),
    "text": ("string", ()),
    "words": ("string", (2,)),
}

ROWS, SHARD = 103, 10


def made(path: Path, spectra: Spectra) -> Layer:
    """A layer of all kinds of fields in eleven shards, the last of three rows."""
    store = make_store(path, spectra, shard_rows=16, chunk_rows=8)
    layer = store.create_layer("kinds", FIELDS, rows=ROWS, shard_rows=SHARD)
    rng = np.random.default_rng(1)
    for shard in layer.pending():
        start, stop = layer.bounds(shard)
        values = {}
        for name, (dtype, shape) in FIELDS.items():
            numbers = rng.integers(-100, 100, (stop - start, *shape))
            values[name] = np.char.add("ü", numbers.astype(str)) if dtype == "string" else numbers.astype(dtype)
        layer.write(shard, values)
    return store.layer("kinds")


@pytest.mark.parametrize("name", FIELDS)
def test_every_kind_of_field_is_what_zarr_reads(tmp_path: Path, spectra: Spectra, name: str) -> None:
    layer = made(tmp_path / "s.zarr", spectra)
    expected = zarr.open_group(tmp_path / "s.zarr", mode="r")[f"layers/kinds/{name}"][:]
    rows = np.array([100, 3, 3, 57, 0])
    for threads in (1, 3):
        limit_threads(threads)
        try:
            for start, stop in ((0, ROWS), (7, 8), (5, 25), (100, 103), (20, 20)):
                found = layer.read(name, start, stop)
                np.testing.assert_array_equal(found, expected[start:stop])
                assert found.dtype.kind == ("U" if FIELDS[name][0] == "string" else np.dtype(FIELDS[name][0]).kind)
            np.testing.assert_array_equal(layer.take(name, rows), expected[rows])
        finally:
            limit_threads(os.cpu_count() or 1)
    assert layer._direct[name] is not None


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 2050), length=st.integers(0, 2050), threads=st.integers(1, 3))
def test_chunks_inside_shards_are_what_zarr_reads(
    start: int, length: int, threads: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "direct.zarr"
    if not SpectraStore.is_finished(path):
        grid = WaveGrid.between("log", 3600.0, 7200.0, 1200)
        make_store(path, make_spectra(np.random.default_rng(0), grid, 2050), shard_rows=1024, chunk_rows=128)
    store = SpectraStore.open(path)
    stop = min(start + length, 2050)
    room = np.full((max(stop - start, 0), 1200), np.nan, np.float32)
    limit_threads(threads)
    try:
        read = store.base.read("ivar", start, stop)
        again = store.base.read("ivar", start, stop, room)
    finally:
        limit_threads(os.cpu_count() or 1)
    assert store.base._direct["ivar"] is not None
    np.testing.assert_array_equal(read, zarr.open_group(path, mode="r")["base/ivar"][start:stop])
    np.testing.assert_array_equal(again, read)
    assert np.shares_memory(again, room) == (stop > start)


@pytest.mark.parametrize("name", ["float", "text"])
def test_of_many_shards_the_first_that_is_lost_or_damaged_is_named(tmp_path: Path, spectra: Spectra, name: str) -> None:
    layer = made(tmp_path / "s.zarr", spectra)
    folder = tmp_path / "s.zarr/layers/kinds" / name / "c"
    content = bytearray((folder / "8").read_bytes())
    content[-1] ^= 1
    (folder / "8").write_bytes(content)
    with pytest.raises(StoreError, match=r"damaged in rows 80-90 \(the checksum of chunk 0 is wrong\)"):
        layer.read(name)
    (folder / "5").unlink()
    for rows in (np.arange(ROWS), np.array([99, 81, 52])):
        with pytest.raises(StoreError, match=r"lost rows 50-60 \(file c/5 is missing\)"):
            layer.take(name, rows)
    with pytest.raises(StoreError, match="lost rows 50-60"):
        layer.read(name)
    layer.reopen(3)
    with pytest.raises(PartialShardError, match="rows 30-40 .* not written yet"):
        layer.read(name)
    assert len(layer.read(name, 0, 30)) == 30


def test_other_file_systems_are_read_through_zarr(spectra: Spectra) -> None:
    place = "memory://distspec-test/s.zarr"
    store = make_store(place, spectra, shard_rows=16, chunk_rows=8)
    np.testing.assert_array_equal(store.base.read("flux"), spectra.flux)
    assert store.base._direct["flux"] is None
    store.base.reopen(1)
    assert store.pending() == [1]
    fsspec.filesystem("memory").rm("/distspec-test/s.zarr/base/ivar/c/2/0")
    with pytest.raises(StoreError, match="lost rows 32-40"):
        store.base.read("ivar", 32, 40)


def test_work_side_by_side_ends_before_its_first_failure_is_raised() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item in (4, 7):
            raise ValueError(f"item {item}")
        done.append(item)

    side_by_side(work, [1, 2, 3], 2)
    assert sorted(done) == [1, 2, 3]
    for threads in (1, 2, 3, 20):
        with pytest.raises(ValueError, match="item 4"):
            side_by_side(work, range(10), threads)
