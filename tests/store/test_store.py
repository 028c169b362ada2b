import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from distspec.errors import LayoutError, PartialShardError, StoreError, StoreNotFoundError
from distspec.spectra import Spectra, WaveGrid
from distspec.store import SpectraStore, StoreSpec, limit_threads
from tests.conftest import make_spectra, make_store
from tests.support.catalogues import add_scores, make_catalogue


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 70), chunks=st.integers(1, 4), chunk_rows=st.integers(1, 20))
def test_what_is_written_is_read(
    count: int, chunks: int, chunk_rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    grid = WaveGrid.between("log", 3600.0, 7200.0, 40)
    spectra = make_spectra(np.random.default_rng(count), grid, count)
    path = tmp_path_factory.mktemp("store") / "s.zarr"
    store = make_store(path, spectra, shard_rows=chunks * chunk_rows, chunk_rows=chunk_rows)
    again = SpectraStore.open(path)
    assert again.pending() == []
    for shard in range(store.shards):
        rows = slice(*store.base.bounds(shard))
        read = again.read(shard)
        np.testing.assert_array_equal(read.flux, spectra.flux[rows])
        np.testing.assert_array_equal(read.ivar, spectra.ivar[rows])
        np.testing.assert_array_equal(read.rows, spectra.rows[rows])
    some = np.random.default_rng(1).integers(0, count, 7)
    np.testing.assert_array_equal(again.take(some).flux, spectra.flux[some])


def test_large_arrays_lie_in_chunks_inside_shards(tmp_path: Path) -> None:
    grid = WaveGrid.between("log", 3600.0, 7200.0, 1200)
    spectra = make_spectra(np.random.default_rng(0), grid, 2000)
    store = make_store(tmp_path / "s.zarr", spectra, shard_rows=1024, chunk_rows=128)
    assert len(list((tmp_path / "s.zarr/base/flux/c").rglob("0"))) >= 1
    assert sum(p.is_file() for p in (tmp_path / "s.zarr/base/flux/c").rglob("*")) == 2
    np.testing.assert_array_equal(store.base.read("flux", 1000, 1100), spectra.flux[1000:1100])


def test_ids_and_texts_are_exact(tmp_path: Path) -> None:
    grid = WaveGrid.between("log", 3600.0, 7200.0, 20)
    spectra = make_spectra(np.random.default_rng(0), grid, 3)
    columns = {
        "id": np.array([2**63 - 1, -5, 2**53 + 1], np.int64),
        "name": np.array(["", "11998765432109876543", "Ångström <b>"]),
        "box": np.full((3, 2, 2), np.nan, np.float32),
    }
    fields = {"id": ("i8", ()), "name": ("string", ()), "box": ("f4", (2, 2))}
    store = SpectraStore.create(
        tmp_path / "s.zarr",
        StoreSpec(
            grid=grid,
            frame="rest",
            rows=3,
            shard_rows=4,
            chunk_rows=2,
            columns=fields,
            digest="d",
            recipe="r",
            settings={},
        ),
    )
    store.write(0, spectra, columns)
    assert store.column("id").tolist() == [2**63 - 1, -5, 2**53 + 1]
    assert store.column("id").dtype == np.int64
    assert store.column("name", np.array([2, 1])).tolist() == ["Ångström <b>", "11998765432109876543"]
    assert store.column("box").shape == (3, 2, 2)


def test_writing_the_same_shard_again_gives_the_same_bytes(store: SpectraStore, spectra: Spectra) -> None:
    before = files(Path(store.path))
    rows = slice(*store.base.bounds(1))
    columns = {name: store.column(name)[rows] for name in store.column_names}
    store.write(1, spectra[rows], columns)
    assert files(Path(store.path)) == before


def test_partial_shards_and_other_layouts_are_refused(store: SpectraStore, spectra: Spectra) -> None:
    rows = slice(*store.base.bounds(0))
    columns = {name: store.column(name)[rows] for name in store.column_names}
    with pytest.raises(PartialShardError, match="written whole"):
        store.write(0, spectra[0:5], {name: values[:5] for name, values in columns.items()})
    with pytest.raises(PartialShardError, match="all at once"):
        store.write(0, spectra[rows], {"id": columns["id"]})
    with pytest.raises(LayoutError, match="id is float64"):
        store.write(0, spectra[rows], columns | {"id": columns["id"].astype(np.float64)})
    other = WaveGrid.between("linear", 3600.0, 7200.0, spectra.grid.pixels)
    with pytest.raises(LayoutError, match="the store keeps"):
        store.write(0, Spectra(spectra.rows, spectra.flux, spectra.ivar, other)[rows], columns)


def test_an_unfinished_layer_is_refused_with_advice(store: SpectraStore) -> None:
    layer = store.create_layer("score-0", {"mse": ("f4", ())})
    with pytest.raises(StoreError, match=rf"^score-0 lacks {layer.shards} of {layer.shards} shards; run it again$"):
        layer.require_finished("run it again")
    for shard in layer.pending():
        start, stop = layer.bounds(shard)
        layer.write(shard, {"mse": np.zeros(stop - start, np.float32)})
    layer.require_finished("run it again")


def test_pending_names_what_is_not_written(store: SpectraStore) -> None:
    layer = store.create_layer("score-0", {"mse": ("f4", ())})
    assert layer.pending() == [0, 1, 2]
    layer.write(1, {"mse": np.arange(16, dtype=np.float32)})
    assert store.layer("score-0").pending() == [0, 2]
    with pytest.raises(PartialShardError, match="rows 0-16 .* not written yet"):
        layer.read("mse")
    assert layer.read("mse", 16, 32).tolist() == list(range(16))
    assert "1 of 3 shards" in repr(layer)


@pytest.mark.parametrize("damage", ["missing", "flipped", "truncated", "empty"])
@pytest.mark.parametrize("field", ["flux", "columns/id", "columns/name"])
def test_damage_is_an_error_and_never_a_fill_value(
    store: SpectraStore, tmp_path: Path, damage: str, field: str
) -> None:
    if field == "columns/name":
        layer = store.create_layer("l", {"columns/name": ("string", ())})
        for shard in layer.pending():
            start, stop = layer.bounds(shard)
            layer.write(shard, {field: np.array([f"object {i}" for i in range(start, stop)])})
        place = Path(store.path) / "layers/l" / field
    else:
        layer = store.base
        place = Path(store.path) / "base" / field
    chunk = next(p for p in sorted((place / "c" / "1").rglob("*")) if p.is_file()) if field == "flux" else place / "c/1"
    content = chunk.read_bytes()
    match damage:
        case "missing":
            chunk.unlink()
        case "flipped":
            middle = len(content) // 3
            chunk.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
        case "truncated":
            chunk.write_bytes(content[: len(content) // 2])
        case "empty":
            chunk.write_bytes(b"")
    fresh = SpectraStore.open(store.path)
    reader = fresh.base if field != "columns/name" else fresh.layer("l")
    reader.read(field, 0, 16)
    with pytest.raises(StoreError, match="rows 16-32"):
        reader.read(field, 16, 32)
    with pytest.raises(StoreError):
        reader.take(field, np.array([17]))


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_damage_inside_a_shard_is_found_chunk_by_chunk(tmp_path: Path, damage: str) -> None:
    grid = WaveGrid.between("log", 3600.0, 7200.0, 1200)
    spectra = make_spectra(np.random.default_rng(0), grid, 1024)
    store = make_store(tmp_path / "s.zarr", spectra, shard_rows=1024, chunk_rows=128)
    shard = tmp_path / "s.zarr/base/flux/c/0/0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    fresh = SpectraStore.open(store.path)
    bad = 0
    for start in range(0, 1024, 128):
        try:
            np.testing.assert_array_equal(
                fresh.base.read("flux", start + 3, start + 9), spectra.flux[start + 3 : start + 9]
            )
            np.testing.assert_array_equal(fresh.base.take("flux", np.array([start])), spectra.flux[[start]])
        except StoreError:
            bad += 1
    assert bad == (1 if damage == "flipped" else 8)


def test_a_half_made_store_is_not_a_store_and_is_replaced(tmp_path: Path, spectra: Spectra) -> None:
    store = make_store(tmp_path / "s.zarr", spectra, shard_rows=16, chunk_rows=8)
    whole = files(Path(store.path))
    (tmp_path / "s.zarr/zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(StoreNotFoundError, match="not a finished store"):
        SpectraStore.open(tmp_path / "s.zarr")
    again = make_store(tmp_path / "s.zarr", spectra, shard_rows=16, chunk_rows=8)
    assert files(Path(again.path)) == whole


def test_wrong_places_are_refused(tmp_path: Path, store: SpectraStore, spectra: Spectra) -> None:
    with pytest.raises(StoreNotFoundError, match="run `distspec ingest` first"):
        SpectraStore.open(tmp_path / "none")
    with pytest.raises(StoreError, match="already is a store"):
        make_store(tmp_path / "store.zarr", spectra, shard_rows=16, chunk_rows=8)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("dear")
    with pytest.raises(StoreError, match="is not a store"):
        make_store(tmp_path / "mine", spectra, shard_rows=16, chunk_rows=8)
    assert (tmp_path / "mine/thesis.tex").exists()
    with pytest.raises(StoreNotFoundError, match="no layer"):
        store.layer("score-1")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"zarr_format": 2}', '{"zarr_format": 3, "node_type": "array"}'])
def test_garbled_metadata_are_refused(store: SpectraStore, text: str) -> None:
    (Path(store.path) / "zarr.json").write_text(text)
    with pytest.raises((LayoutError, StoreNotFoundError)):
        SpectraStore.open(store.path)


def test_an_unwritable_place_is_refused(tmp_path: Path, spectra: Spectra) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot make a store"):
        make_store(tmp_path / "file" / "s.zarr", spectra, shard_rows=16, chunk_rows=8)


def test_a_write_that_fails_leaves_the_shard_pending(store: SpectraStore, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = store.create_layer("score-2", {"a": ("f4", ()), "b": ("f4", ())})
    values = {"a": np.zeros(16, np.float32), "b": np.ones(16, np.float32)}
    shutil.rmtree(Path(store.path) / "layers/score-2/b")
    with pytest.raises((StoreError, KeyError)):
        layer.write(0, values)
    assert layer.pending() == [0, 1, 2]


def test_layers_of_other_fields_are_refused(store: SpectraStore) -> None:
    store.create_layer("score-3", {"a": ("f4", ())})
    with pytest.raises(LayoutError, match="other fields"):
        store.create_layer("score-3", {"a": ("f8", ())})
    assert store.layers() == ["score-3"]


def test_observed_frame_spectra_carry_their_redshift(tmp_path: Path, spectra: Spectra) -> None:
    store = make_store(tmp_path / "s.zarr", spectra, shard_rows=16, chunk_rows=8)
    assert store.read(0).redshift is None
    meta = Path(store.path) / "zarr.json"
    meta.write_text(meta.read_text().replace('"frame": "rest"', '"frame": "observed"'))
    observed = SpectraStore.open(store.path)
    np.testing.assert_array_equal(observed.read(1).redshift, observed.column("z")[16:32])
    np.testing.assert_array_equal(observed.take(np.array([7, 1])).redshift, observed.column("z")[[7, 1]])


def test_nothing_is_left_open(store: SpectraStore) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        store.read(0)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


@pytest.mark.parametrize("what", ["columns/z", "zarr.json", "flux/zarr.json"])
def test_damaged_metadata_inside_are_refused_naming_the_place(store: SpectraStore, what: str) -> None:
    place = Path(store.path) / "base" / what
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.write_text("{garbage")
    with pytest.raises(LayoutError, match=r"store\.zarr/base"):
        fresh = SpectraStore.open(store.path)
        fresh.read(0)
        fresh.column("z")


def test_what_a_kill_leaves_of_a_store_being_made_is_replaced(tmp_path: Path, spectra: Spectra) -> None:
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr/zarr.json.0abc.partial").write_text("")
    assert make_store(tmp_path / "s.zarr", spectra, shard_rows=16, chunk_rows=8).pending() == []


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 2050), length=st.integers(0, 2050), threads=st.integers(1, 3))
def test_shards_read_directly_are_what_zarr_reads(
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


def test_rows_that_were_given_up_are_kept_with_the_reason_until_they_have_values(tmp_path: Path) -> None:
    store = make_catalogue(tmp_path / "s.zarr")
    add_scores(store)
    layer = store.layer("score-0123456789ab")
    assert layer.given_up() == {}
    layer.give_up(1, [20, 17], "ended its worker")
    layer.give_up(0, [3], "took too long")
    assert store.layer(layer.name).given_up() == {3: "took too long", 17: "ended its worker", 20: "ended its worker"}
    layer.give_up(1, [], "")
    assert layer.given_up() == {3: "took too long"}
    (file,) = Path(store.path).rglob("given-up/*.json")
    for content in ("{", "[]", '{"rows": [3]}', '{"rows": ["a"], "why": ""}'):
        file.write_text(content, "utf-8")
        with pytest.raises(LayoutError, match=r"given-up/0\.json is damaged"):
            layer.given_up()
