"""The same store on an S3-compatible server: a real one, started here."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
from obstore.store import from_url

from distspec.errors import PartialShardError, StoreError, StoreNotFoundError
from distspec.pipeline import run
from distspec.sources.simulation.survey import SimulatedSurvey
from distspec.spectra import Spectra, WaveGrid
from distspec.store import Inventory, SpectraStore
from tests.conftest import make_spectra, make_store
from tests.support.small import small
from tests.support.survey_files import write_sdss


def test_a_store_in_a_bucket_is_like_one_in_a_folder(bucket: str, tmp_path: Path, spectra: Spectra) -> None:
    local = make_store(tmp_path / "s.zarr", spectra, shard_rows=16, chunk_rows=8)
    store = make_store(f"{bucket}/a/s.zarr", spectra, shard_rows=16, chunk_rows=8)
    assert store.path == f"{bucket}/a/s.zarr"
    again = SpectraStore.open(store.path)
    assert again.pending() == []
    assert again.finished
    for shard in range(again.shards):
        np.testing.assert_array_equal(again.read(shard).flux, local.read(shard).flux)
        np.testing.assert_array_equal(again.read(shard).ivar, local.read(shard).ivar)
    np.testing.assert_array_equal(again.column("id"), local.column("id"))
    np.testing.assert_array_equal(again.take(np.array([39, 2])).flux, local.take(np.array([39, 2])).flux)


@pytest.mark.slow
def test_layers_and_extensions_work_in_a_bucket(bucket: str, spectra: Spectra) -> None:
    store = make_store(f"{bucket}/b/s.zarr", spectra, shard_rows=16, chunk_rows=8)
    layer = store.create_layer("score-0", {"mse": ("f4", ())})
    for shard in layer.pending():
        start, stop = layer.bounds(shard)
        layer.write(shard, {"mse": np.arange(start, stop, dtype=np.float32)})
    assert SpectraStore.open(store.path).layers() == ["score-0"]
    assert SpectraStore.open(store.path).layer("score-0").read("mse").tolist() == list(range(40))
    store.extend(7, Inventory(["g"], *(np.array([n], np.int64) for n in (1, 2, 7))))
    assert SpectraStore.open(store.path).pending() == [3]


def test_what_is_lost_in_a_bucket_is_an_error(bucket: str, spectra: Spectra) -> None:
    store = make_store(f"{bucket}/c/s.zarr", spectra, shard_rows=16, chunk_rows=8)
    obstore.delete(from_url(store.path), "base/ivar/c/1/0")
    again = SpectraStore.open(store.path)
    again.read(0)
    with pytest.raises(StoreError, match="lost rows 16-32"):
        again.read(1)
    assert "lost rows 16-32" in again.base.verify(1)


@contextmanager
def requests_to(server: str, caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Collect what the server is asked for, by its own log: method and path of each request."""
    found: list[str] = []
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="werkzeug"):
        yield found
    for record in caplog.records:
        # Without the colours of a terminal.
        match = re.search(r'"(\w+) (\S+) HTTP', re.sub(r"\x1b\[\d+m", "", record.getMessage()))
        if record.name == "werkzeug" and match:
            found.append(f"{match[1]} {match[2].replace(server.replace('s3://', '/'), '')}")


def large_store(path: str) -> tuple[SpectraStore, Spectra]:
    """Two shards of eight chunks each, and one of half a shard."""
    grid = WaveGrid.between("log", 3600.0, 7200.0, 1200)
    spectra = make_spectra(np.random.default_rng(0), grid, 2560)
    make_store(path, spectra, shard_rows=1024, chunk_rows=128)
    return SpectraStore.open(path), spectra


def test_each_shard_of_a_field_is_one_request(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    place = f"{bucket}/d/s.zarr"
    store, spectra = large_store(place)
    with requests_to(place, caplog) as first:
        np.testing.assert_array_equal(store.base.read("flux", 0, 1024), spectra.flux[:1024])
    # Once for a field its metadata, and once for a layer which shards are written.
    assert len(first) == 3
    assert sum("zarr.json" in request for request in first) == 1
    assert sum("list-type" in request for request in first) == 1
    with requests_to(place, caplog) as next_ones:
        np.testing.assert_array_equal(store.base.read("flux", 1024, 2560), spectra.flux[1024:])
    assert sorted(next_ones) == ["GET /base/flux/c/1/0", "GET /base/flux/c/2/0"]
    with requests_to(place, caplog) as part:
        np.testing.assert_array_equal(store.base.read("flux", 300, 900), spectra.flux[300:900])
    # Its index, and its chunks.
    assert part == ["GET /base/flux/c/0/0"] * 2
    store.base.read("columns/z", 0, 1)
    with requests_to(place, caplog) as column:
        np.testing.assert_array_equal(store.base.read("columns/z"), np.linspace(0.01, 0.2, 2560))
    assert sorted(column) == [f"GET /base/columns/z/c/{shard}" for shard in range(3)]
    with requests_to(place, caplog) as single:
        rows = np.array([2000, 3, 1999])
        np.testing.assert_array_equal(store.base.take("columns/id", rows), rows + 2**60 + 1)
    assert sorted(request for request in single if "/c/" in request) == [f"GET /base/columns/id/c/{c}" for c in (0, 1)]


def test_pending_shards_of_a_bucket_are_one_listing(bucket: str, spectra: Spectra, caplog: Any) -> None:
    place = f"{bucket}/e/s.zarr"
    layer = make_store(place, spectra, shard_rows=2, chunk_rows=2).base
    layer.reopen(7)
    with requests_to(place, caplog) as asked:
        assert layer.pending() == [7]
    assert len(asked) == 1
    with pytest.raises(PartialShardError, match="rows 14-16 .* are not written yet"):
        layer.read("flux")
    obstore.put(from_url(place), "base/commits/c/3", b"\0")
    assert layer.pending() == [3, 7]


@pytest.mark.parametrize("field", ["flux", "columns/id", "name"])
@pytest.mark.parametrize("damage", ["missing", "flipped", "truncated", "empty"])
def test_damage_in_a_bucket_is_an_error_that_names_the_rows(
    bucket: str, spectra: Spectra, damage: str, field: str
) -> None:
    store = make_store(f"{bucket}/f/{damage}/{field}/s.zarr", spectra, shard_rows=16, chunk_rows=8)
    layer, key = store.base, {"flux": "base/flux/c/1/0", "columns/id": "base/columns/id/c/1"}.get(field)
    if key is None:
        layer, key = store.create_layer("l", {"name": ("string", ())}), "layers/l/name/c/1"
        for shard in layer.pending():
            layer.write(shard, {"name": np.array([f"object {row}" for row in range(*layer.bounds(shard))])})
    place = from_url(store.path)
    content = bytearray(obstore.get(place, key).bytes())
    content[len(content) // 3] ^= 4
    changed = {"flipped": bytes(content), "truncated": bytes(content[: len(content) // 2]), "empty": b""}
    if damage == "missing":
        obstore.delete(place, key)
    else:
        obstore.put(place, key, changed[damage])
    said = "lost rows 16-32" if damage == "missing" else "damaged in rows 16-32"
    assert len(layer.read(field, 0, 16)) == 16
    for ask in (
        lambda: layer.read(field),
        lambda: layer.read(field, 18, 20),
        lambda: layer.take(field, np.array([17])),
    ):
        with pytest.raises(StoreError, match=said) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_damaged_chunk_inside_a_shard_of_a_bucket_leaves_the_others(bucket: str) -> None:
    store, spectra = large_store(f"{bucket}/g/s.zarr")
    place = from_url(store.path)
    content = bytearray(obstore.get(place, "base/flux/c/0/0").bytes())
    content[len(content) // 2] ^= 1
    obstore.put(place, "base/flux/c/0/0", bytes(content))
    bad = []
    for start in range(0, 1024, 128):
        try:
            found = store.base.read("flux", start + 3, start + 9)
            np.testing.assert_array_equal(found, spectra.flux[start + 3 : start + 9])
        except StoreError as error:
            assert f"damaged in rows {start}-{start + 128}" in str(error)
            bad.append(start)
    assert len(bad) == 1
    with pytest.raises(StoreError, match=r"damaged in rows 0-1024 \(the checksum of chunk \d is wrong\)"):
        store.read(0)
    obstore.put(place, "base/flux/c/0/0", bytes(content[:1000]))
    for start, stop in ((0, 1024), (3, 9)):
        with pytest.raises(StoreError, match="damaged in rows"):
            store.base.read("flux", start, stop)


@pytest.mark.slow
def test_a_run_reads_from_a_bucket_and_writes_its_store_there(bucket: str, ray_session: None, tmp_path: Path) -> None:
    files = write_sdss(SimulatedSurvey(small(tmp_path).ingest.source, 5), tmp_path / "files", range(40))
    for file in files:
        obstore.put(from_url(f"{bucket}/raw"), file.name, file.read_bytes())
    ingest = {
        "source": {"kind": "sdss", "path": f"{bucket}/raw"},
        "store": f"{bucket}/run/s.zarr",
        "prepare": {"dust": {"kind": "none"}, "grid": {"first": 3800.0, "last": 7400.0, "pixels": 160}},
    }
    made = run(small(tmp_path / "out", ingest=ingest))
    assert made.store.path == f"{bucket}/run/s.zarr"
    assert made.store.rows == 40
    assert made.scores is not None
    usable = made.store.column("status") == 0
    assert np.isfinite(made.scores.read("mse")[usable]).all()
    assert not (tmp_path / "out/store.zarr").exists()
    ingest["source"] = {"kind": "sdss", "path": str(tmp_path / "files")}
    local = run(small(tmp_path / "local", ingest=ingest | {"store": str(tmp_path / "s.zarr")}), only="ingest")
    np.testing.assert_array_equal(local.store.read(0).flux, made.store.read(0).flux)


def test_wrong_places_are_refused_in_one_line(bucket: str) -> None:
    with pytest.raises(StoreNotFoundError, match="no store at s3://surveys/none"):
        SpectraStore.open(f"{bucket}/none")
    for url in ("nothing://x/y", "s3://no-such-bucket-here/x"):
        with pytest.raises(StoreError) as caught:
            SpectraStore.open(url)
        assert "\n" not in str(caught.value)
