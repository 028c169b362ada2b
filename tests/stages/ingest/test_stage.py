import os
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from distspec.addresses import BucketPath, address_of
from distspec.config import Experiment, Simulate
from distspec.errors import LayoutError, SourceError, UnreachableError
from distspec.pipeline import Products
from distspec.runtime.threads import one_thread
from distspec.sources import Piece
from distspec.sources.simulation.survey import SimulatedSurvey
from distspec.spectra import Status, first_reasons
from distspec.stages.ingest.row_plan import FileRows
from distspec.stages.ingest.stage import ingest
from distspec.stages.ingest.workers import Ingester
from distspec.store import SpectraStore
from tests.support.desi_files import write
from tests.support.small import contents, small
from tests.support.survey_files import write_sdss

pytestmark = pytest.mark.numeric


def simulated(experiment: Experiment) -> SimulatedSurvey:
    assert isinstance(experiment.ingest.source, Simulate)
    return SimulatedSurvey(experiment.ingest.source, experiment.seed)


def test_every_spectrum_of_the_source_has_its_row(done: tuple[Experiment, Products]) -> None:
    experiment, made = done
    ids = simulated(experiment).catalog(0, 700)["id"]
    np.testing.assert_array_equal(made.store.column("id"), ids)
    status = made.store.column("status")
    assert (status != 0).any()
    assert sum(first_reasons(status).values()) == (status != 0).sum()
    assert made.store.inventory().names == ["block-000000", "block-000001"]
    assert made.store.inventory().counts.tolist() == [512, 188]


@pytest.mark.slow
def test_any_number_of_workers_and_a_second_run_give_the_same_bytes(
    done: tuple[Experiment, Products], tmp_path: Path
) -> None:
    _, made = done
    whole = contents(Path(made.store.path) / "base")
    for workers in (1, 3):
        experiment = small(tmp_path / str(workers), runtime={"workers": workers})
        store = ingest(experiment)
        assert contents(Path(store.path) / "base") == whole
    stamps = {path: os.stat(path).st_mtime_ns for path in Path(store.path).rglob("c/*")}
    ingest(experiment)
    assert stamps == {path: os.stat(path).st_mtime_ns for path in Path(store.path).rglob("c/*")}


@pytest.mark.slow
def test_only_unfinished_shards_are_done_again(
    done: tuple[Experiment, Products], tmp_path: Path, four_threads: None
) -> None:
    _, made = done
    experiment = small(tmp_path / "out")
    store = tmp_path / "out/store.zarr"
    shutil.copytree(made.store.path, store)
    base = store / "base"
    # As if the writer of shard 2 had been killed between its arrays and its mark.
    (base / "commits/c/2").unlink()
    (base / "ivar/c/2/0").write_bytes(b"half")
    old = os.stat(base / "flux/c/1/0").st_mtime_ns
    assert SpectraStore.open(store).pending() == [2]
    ingest(experiment)
    assert os.stat(base / "flux/c/1/0").st_mtime_ns == old
    assert contents(base) == contents(Path(made.store.path) / "base")


@pytest.mark.slow
def test_files_that_cannot_be_read_are_set_aside_with_the_reason(ray_session: None, tmp_path: Path) -> None:
    survey = SimulatedSurvey(small(tmp_path).ingest.source, 5)
    files = write_sdss(survey, tmp_path / "files", range(12))
    files[3].write_bytes(files[3].read_bytes()[:9000])
    files[7].write_text("<!DOCTYPE html><title>404</title>")
    experiment = small(
        tmp_path / "out",
        ingest={
            "source": {"kind": "sdss", "path": str(tmp_path / "files")},
            "prepare": {"dust": {"kind": "none"}},
            "shard_rows": 8,
            "chunk_rows": 4,
        },
    )
    store = ingest(experiment)
    status, notes, names = (store.column(name) for name in ("status", "note", "file"))
    unreadable = status == Status.UNREADABLE
    assert store.rows == 12
    assert sorted(names[unreadable].tolist()) == sorted([files[3].name, files[7].name])
    assert all(name in note for name, note in zip(names[unreadable], notes[unreadable], strict=True))
    assert (store.column("coverage")[unreadable] == 0).all()
    assert all("\n" not in note for note in notes)
    readable = store.column("id")[~unreadable].tolist()
    assert len(readable) == 10
    assert all(text.isdigit() and int(text) > 2**53 for text in readable)


def test_a_source_without_a_single_readable_file_is_refused_and_leaves_no_store(
    ray_session: None, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    for name in ("a.fits", "b.fits"):
        (tmp_path / "files" / name).write_text("<html>")
    source = {"kind": "sdss", "path": str(tmp_path / "files")}
    experiment = small(tmp_path / "out", ingest={"source": source, "prepare": {"dust": {"kind": "none"}}})
    with pytest.raises(SourceError, match="none of 2 files can be read"):
        ingest(experiment)
    assert not (tmp_path / "out/store.zarr").exists()


def test_a_store_of_other_settings_or_files_is_refused(done: tuple[Experiment, Products]) -> None:
    experiment, made = done
    output = Path(made.store.path).parent
    other = small(output, ingest={"source": {"kind": "simulate", "spectra": 701, "anomalies": 0.05}})
    with pytest.raises(LayoutError, match="source.spectra was 700, is now 701"):
        ingest(other)


@pytest.mark.slow
def test_a_shard_is_prepared_the_same_however_it_is_batched(
    done: tuple[Experiment, Products], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, made = done
    again = small(tmp_path / "out")
    whole = contents(Path(made.store.path) / "base")
    monkeypatch.setattr("distspec.stages.ingest.workers._BATCH", 37)
    store = ingest(again)  # makes the store; workers use the usual batch
    (Path(store.path) / "base/commits/c/0").unlink()
    with one_thread():
        Ingester(again, store.path)((0, [Piece("block-000000", 0, 128)]))
    assert contents(Path(store.path) / "base") == whole
    assert experiment.ingest == again.ingest


@pytest.mark.slow
def test_a_bucket_that_stops_answering_ends_the_ingest_and_nothing_is_set_aside(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    for name, value in {"ALLOW_HTTP": "true", "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "REGION": "r"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    urllib.request.urlopen(urllib.request.Request(f"{address}/stops", method="PUT"))
    folder = address_of("s3://stops/spectra")
    assert isinstance(folder, BucketPath)
    (folder / "coadd-main-dark-1.fits").upload(write(tmp_path / "coadd.fits"))
    source = {"kind": "desi", "path": str(folder)}
    experiment = small(tmp_path / "out", ingest={"source": source, "prepare": {"dust": {"kind": "none"}}})
    store = ingest(experiment)
    pieces = FileRows(store.inventory()).pieces(*store.base.bounds(0))
    store.base.reopen(0)
    server.stop()
    with pytest.raises(UnreachableError, match=r"coadd-main-dark-1.fits cannot be reached .* run the same command"):
        Ingester(experiment, store.path)((0, pieces))
    assert SpectraStore.open(store.path).pending() == [0]
