"""A store grows by parts: rows that are there stay where they are, byte for byte."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from distspec.errors import LayoutError, PartialShardError, StoreError
from distspec.spectra import Spectra, Status, WaveGrid
from distspec.stages.ingest.check import audit
from distspec.store import Inventory, SpectraStore
from distspec.store.frozen import Statistics
from tests.conftest import make_spectra, make_store
from tests.support.small import contents

GRID = WaveGrid.between("log", 3600.0, 7200.0, 24)


def extended(path: Path, parts: list[int], shard_rows: int, chunk_rows: int) -> tuple[SpectraStore, Spectra]:
    """Make a store of several parts and the spectra that it should hold."""
    whole = make_spectra(np.random.default_rng(sum(parts)), GRID, sum(parts))
    store = make_store(path, whole[: parts[0]], shard_rows=shard_rows, chunk_rows=chunk_rows)
    done = parts[0]
    for part in parts[1:]:
        store.extend(part, Inventory(["f"], *(np.array([n], np.int64) for n in (1, 2, part))))
        for shard in store.pending():
            rows = np.arange(*store.base.bounds(shard))
            columns = {"id": rows + 2**60 + 1, "z": rows / 1000, "status": np.zeros(len(rows), np.int32)}
            store.write(shard, whole[rows], columns)
        done += part
    return store, whole


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    parts=st.lists(st.integers(1, 30), min_size=2, max_size=4),
    chunks=st.integers(1, 3),
    chunk_rows=st.integers(1, 8),
    data=st.data(),
)
def test_rows_stay_dense_and_in_order_however_a_store_has_grown(
    parts: list[int], chunks: int, chunk_rows: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store, whole = extended(tmp_path_factory.mktemp("s") / "s.zarr", parts, chunks * chunk_rows, chunk_rows)
    again = SpectraStore.open(store.path)
    assert again.rows == sum(parts)
    bounds = [again.base.bounds(shard) for shard in range(again.shards)]
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == again.rows
    np.testing.assert_array_equal(np.concatenate([again.read(s).flux for s in range(again.shards)]), whole.flux)
    np.testing.assert_array_equal(again.base.read("ivar"), whole.ivar)
    start = data.draw(st.integers(0, again.rows))
    stop = data.draw(st.integers(start, again.rows))
    np.testing.assert_array_equal(again.base.read("flux", start, stop), whole.flux[start:stop])
    rows = np.array(data.draw(st.lists(st.integers(0, again.rows - 1), min_size=1, max_size=9)))
    np.testing.assert_array_equal(again.take(rows).flux, whole.flux[rows])
    np.testing.assert_array_equal(again.column("id", rows) - (2**60 + 1), rows)


def test_an_extension_touches_no_file_of_the_rows_that_are_there(tmp_path: Path) -> None:
    store, _ = extended(tmp_path / "s.zarr", [21], 8, 4)
    before = {name: data for name, data in contents(tmp_path / "s.zarr").items() if not name.endswith("zarr.json")}
    extended_store = SpectraStore.open(store.path, write=True)
    extended_store.extend(30, Inventory(["g"], *(np.array([n], np.int64) for n in (1, 2, 30))))
    assert extended_store.pending() == [3, 4, 5, 6]
    after = contents(tmp_path / "s.zarr")
    assert before.items() <= after.items()
    assert extended_store.base.bounds(2) == (16, 21)
    assert extended_store.base.bounds(3) == (21, 29)
    with pytest.raises(PartialShardError, match="rows 21-29"):
        extended_store.read(3)
    assert not extended_store.finished


def test_an_extension_that_was_killed_half_way_is_made_again(tmp_path: Path) -> None:
    store, whole = extended(tmp_path / "s.zarr", [21], 8, 4)
    # Arrays are longer already, the part is not yet in the metadata.
    array = store._root["base/flux"]
    array.resize((54, GRID.pixels))
    again = SpectraStore.open(store.path, write=True)
    assert again.rows == 21
    np.testing.assert_array_equal(again.base.read("flux"), whole.flux)
    again.extend(30, Inventory(["g"], *(np.array([n], np.int64) for n in (1, 2, 30))))
    assert SpectraStore.open(store.path).rows == 51


def test_layers_grow_with_their_store(tmp_path: Path) -> None:
    store, _ = extended(tmp_path / "s.zarr", [21], 8, 4)
    fields = {"mse": ("f4", ())}
    layer = store.create_layer("score-0", fields)
    for shard in layer.pending():
        start, stop = layer.bounds(shard)
        layer.write(shard, {"mse": np.arange(start, stop, dtype=np.float32)})
    store.extend(5, Inventory(["g"], *(np.array([n], np.int64) for n in (1, 2, 5))))
    grown = store.create_layer("score-0", fields)
    assert (grown.rows, grown.pending()) == (26, [3])
    grown.write(3, {"mse": np.arange(21, 26, dtype=np.float32)})
    assert store.layer("score-0").read("mse").tolist() == list(range(26))
    with pytest.raises(LayoutError, match="other fields or rows"):
        store.create_layer("score-0", {"mse": ("f8", ())})


def test_the_inventory_remembers_every_file(tmp_path: Path) -> None:
    store, _ = extended(tmp_path / "s.zarr", [4, 3, 2], 8, 4)
    found = SpectraStore.open(store.path).inventory()
    assert found.names == ["f", "f"]
    assert found.counts.tolist() == [3, 2]


def test_the_second_look_marks_rows_and_the_frozen_statistics_change_what_is_read(tmp_path: Path) -> None:
    store, whole = extended(tmp_path / "s.zarr", [12], 8, 4)
    mean = np.full(GRID.pixels, 2, np.float32)
    statistics = Statistics(12, np.arange(GRID.pixels) != 3, mean, mean * np.nan, mean * np.nan)
    fresh = make_store(tmp_path / "t.zarr", whole, shard_rows=8, chunk_rows=4, look=False)
    plain = fresh.recipe
    fresh.freeze(statistics)
    assert fresh.recipe == f"{plain}-{statistics.digest}"
    look = fresh.sample_layer()
    for shard in look.pending():
        start, stop = look.bounds(shard)
        status = np.where(np.arange(start, stop) == 9, int(Status.DUPLICATE), 0).astype(np.int32)
        look.write(shard, {"status": status, "factor": np.ones(stop - start, np.float32)})
    fresh.mark_finished()
    again = SpectraStore.open(fresh.path)
    assert again.finished
    assert np.flatnonzero(again.status()).tolist() == [9]
    assert again.column("status", np.array([9, 1])).tolist() == [int(Status.DUPLICATE), 0]
    read = again.read(0)
    good = whole.good[:8] & statistics.keep
    np.testing.assert_array_equal(read.good, good)
    np.testing.assert_allclose(read.flux[good], whole.flux[:8][good] / 2)
    np.testing.assert_array_equal(again.read(0, frozen=False).flux, whole.flux[:8])
    np.testing.assert_array_equal(again.take(np.array([5])).flux, read.flux[[5]])
    assert again.layers() == []


def test_frozen_statistics_cannot_be_changed(tmp_path: Path) -> None:
    store, _ = extended(tmp_path / "s.zarr", [12], 8, 4)
    store.freeze(None)
    with pytest.raises(Exception, match="cannot be changed"):
        store.freeze(Statistics.identity(GRID.pixels))


def frozen(path: Path) -> SpectraStore:
    """A store of one part with frozen statistics and a second look that marks row 9."""
    whole = make_spectra(np.random.default_rng(3), GRID, 12)
    store = make_store(path, whole, shard_rows=8, chunk_rows=4, look=False)
    mean = np.full(GRID.pixels, 2, np.float32)
    store.freeze(Statistics(12, np.ones(GRID.pixels, bool), mean, mean * np.nan, mean * np.nan))
    look = store.sample_layer()
    for shard in look.pending():
        start, stop = look.bounds(shard)
        status = np.where(np.arange(start, stop) == 9, int(Status.DUPLICATE), 0).astype(np.int32)
        look.write(shard, {"status": status, "factor": np.ones(stop - start, np.float32)})
    store.mark_finished()
    return store


@pytest.mark.slow
@pytest.mark.parametrize("what", ["sample", "inventory", "layers/second-look", "base/commits"])
@pytest.mark.parametrize("damage", ["gone", "garbled", "flipped"])
def test_damage_beside_the_spectra_is_found_and_never_read_over(tmp_path: Path, what: str, damage: str) -> None:
    path = tmp_path / "s.zarr"
    frozen(path)
    chunks = sorted(p for p in (path / what).rglob("*") if p.is_file() and p.name != "zarr.json")
    metadata = sorted((path / what).rglob("zarr.json"))
    for file in [*chunks, *metadata] if damage != "flipped" else chunks:
        content = file.read_bytes()
        if damage == "gone":
            file.unlink()
        elif damage == "garbled":
            file.write_bytes(b"{")
        else:
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        try:
            store = SpectraStore.open(path)
            problems = audit(store, lambda work, arguments, items: map(work(*arguments), items))
        except StoreError as error:
            problems = [str(error)]
        # A flipped bit in a string's length or in what pads a chunk may change nothing.
        assert problems or damage == "flipped", file
        assert all("\n" not in problem for problem in problems)
        file.write_bytes(content)
    assert audit(SpectraStore.open(path), lambda work, arguments, items: map(work(*arguments), items)) == []


def test_statistics_that_are_not_those_that_were_frozen_are_refused(tmp_path: Path) -> None:
    store = frozen(tmp_path / "s.zarr")
    array = zarr.open_group(store.path, mode="r+")["sample/mean"]
    array[3] = 2.5
    again = SpectraStore.open(store.path)
    with pytest.raises(LayoutError, match="damaged"):
        again.read(0)
    assert "frozen statistics" in again.damage[0]


def test_a_lost_second_look_is_refused_and_can_be_taken_again(tmp_path: Path) -> None:
    store = frozen(tmp_path / "s.zarr")
    shutil.rmtree(Path(store.path) / "layers/second-look")
    again = SpectraStore.open(store.path, write=True)
    with pytest.raises(LayoutError, match="second-look is missing"):
        again.status()
    audit(again, lambda work, arguments, items: map(work(*arguments), items), mend=True)
    mended = SpectraStore.open(store.path)
    assert (mended.damage, mended.finished) == ([], False)


def test_rows_that_are_not_settled_yet_are_refused_and_the_others_are_not(tmp_path: Path) -> None:
    store = frozen(tmp_path / "s.zarr")
    store.extend(4, Inventory(["g"], *(np.array([n], np.int64) for n in (1, 2, 4))))
    for shard in store.pending():
        rows = np.arange(*store.base.bounds(shard))
        columns = {"id": rows, "z": rows / 10, "status": np.zeros(len(rows), np.int32)}
        store.write(shard, make_spectra(np.random.default_rng(0), GRID, len(rows))[:], columns)
    again = SpectraStore.open(store.path)
    assert np.flatnonzero(again.status(0, 12)).tolist() == [9]
    for read in (again.status, lambda: again.read(2), lambda: again.take(np.array([13]))):
        with pytest.raises(PartialShardError, match="rows 12-16 .* not settled"):
            read()
