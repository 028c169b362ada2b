"""The same store on an S3-compatible server: a real one, started here."""

import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import obstore
import pytest
from obstore.store import from_url

from distspec.errors import StoreError, StoreNotFoundError
from distspec.pipeline import run
from distspec.sources.simulation.survey import SimulatedSurvey
from distspec.spectra import Spectra
from distspec.store import Inventory, SpectraStore
from tests.conftest import make_store
from tests.support.small import small
from tests.support.survey_files import write_sdss


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://127.0.0.1:{port}"
    facts = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in facts}
    os.environ.update(facts)
    urllib.request.urlopen(urllib.request.Request(f"{address}/surveys", method="PUT"))
    yield "s3://surveys"
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    server.stop()


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
