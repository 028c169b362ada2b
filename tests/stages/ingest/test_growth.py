"""A store that grows, is checked and is mended; what only all rows can tell; where nothing may be lost."""

import csv
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from filelock import FileLock

from distspec.cli import main
from distspec.config import Experiment, dump
from distspec.errors import ConfigError, DistspecWarning, LayoutError, SourceError
from distspec.pipeline import check, run
from distspec.runtime.workers import map_items
from distspec.sources.desi.coadds import DesiCoadds
from distspec.sources.simulation.survey import SimulatedSurvey
from distspec.spectra import Status
from distspec.stages.ingest import stage as ingest_stage
from distspec.stages.ingest.check import audit
from distspec.stages.ingest.finish import duplicate_rows
from distspec.stages.ingest.stage import ingest
from distspec.store import SpectraStore
from tests.conftest import make_spectra, make_store
from tests.support.small import contents, small
from tests.support.survey_files import write_desi, write_sdss


def files_of(folder: Path, rows: range) -> list[Path]:
    """Write simulated objects as SDSS files."""
    return write_sdss(SimulatedSurvey(small(folder).ingest.source, 5), folder, rows)


def survey(tmp_path: Path, rows: int = 64, **prepare: Any) -> Experiment:
    """Settings of a survey whose spectra fit in one shard, unless told otherwise."""
    ingest = {
        "source": {"kind": "sdss", "path": str(tmp_path / "files")},
        "prepare": {"dust": {"kind": "none"}} | prepare,
        "shard_rows": rows,
        "chunk_rows": rows // 2,
    }
    return small(tmp_path / "out", ingest=ingest)


def without_metadata(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if not name.endswith("zarr.json")}


@pytest.mark.slow
def test_a_nights_files_extend_the_store_and_touch_nothing_that_is_there(ray_session: None, tmp_path: Path) -> None:
    files_of(tmp_path / "files", range(13))
    experiment = survey(tmp_path, 8)
    first = ingest(experiment)
    assert (first.rows, first.shards) == (13, 2)
    name, before = first.digest, without_metadata(Path(first.path))
    files_of(tmp_path / "files/night-2", range(13, 20))
    store = ingest(experiment)
    assert (store.rows, store.shards, store.digest) == (20, 3, name)
    assert before.items() <= without_metadata(Path(store.path)).items()
    alone = survey(tmp_path / "alone", 8)
    shutil.copytree(tmp_path / "files", tmp_path / "alone/files")
    whole = ingest(alone)
    where = {file: row for row, file in enumerate(whole.column("file"))}
    order = np.array([where[file] for file in store.column("file")])
    assert sorted(order) == list(range(20))
    np.testing.assert_array_equal(store.take(np.arange(20)).flux, whole.take(order).flux)
    np.testing.assert_array_equal(store.column("id"), whole.column("id", order))
    # The same again: nothing is new, nothing is done.
    stamps = {path: path.stat().st_mtime_ns for path in Path(store.path).rglob("*")}
    ingest(experiment)
    assert stamps == {path: path.stat().st_mtime_ns for path in Path(store.path).rglob("*")}


@pytest.mark.slow
def test_a_file_that_has_changed_is_refused_or_named(ray_session: None, tmp_path: Path) -> None:
    files = files_of(tmp_path / "files", range(4))
    experiment = survey(tmp_path)
    ingest(experiment)
    files[1].touch()
    with pytest.warns(DistspecWarning, match="1 files were written again, in the same size"):
        ingest(experiment)
    files[2].write_bytes(files[2].read_bytes() + bytes(2880))
    with pytest.raises(LayoutError, match=rf"1 files have changed.*{files[2].name}"):
        ingest(experiment)


@pytest.mark.slow
def test_a_finished_store_outlives_its_files_and_other_settings_are_named(ray_session: None, tmp_path: Path) -> None:
    files_of(tmp_path / "files", range(4))
    experiment = survey(tmp_path)
    ingest(experiment)
    with pytest.raises(LayoutError, match=r"prepare\.frame was rest, is now observed"):
        ingest(survey(tmp_path, frame="observed"))
    shutil.rmtree(tmp_path / "files")
    with pytest.warns(DistspecWarning, match="the store is used as it is"):
        assert ingest(experiment).rows == 4


@pytest.mark.slow
def test_a_disk_that_is_gone_is_an_error_and_not_a_shard_of_unreadable_files(ray_session: None, tmp_path: Path) -> None:
    files = files_of(tmp_path / "files", range(12))
    experiment = survey(tmp_path, 8)
    store = ingest(experiment)
    SpectraStore.open(store.path, write=True).base.reopen(1)
    for file in sorted(files)[8:]:
        file.unlink()
    with pytest.raises(SourceError, match="none of 4 files can be reached"):
        ingest(experiment)
    assert SpectraStore.open(store.path).pending() == [1]


@pytest.mark.slow
def test_ids_that_come_twice_are_set_aside_once_found(ray_session: None, tmp_path: Path) -> None:
    files = files_of(tmp_path / "files", range(5))
    shutil.copy(files[2], tmp_path / "files/copy.fits")
    store = ingest(survey(tmp_path))
    ids, status = store.column("id"), store.column("status")
    twice = np.flatnonzero(ids == ids[store.column("file").tolist().index("copy.fits")])
    assert [bool(status[row] & Status.DUPLICATE) for row in twice] == [False, True]
    assert audit(store, lambda work, arguments, items: map(work(*arguments), items)) == []
    keep = survey(tmp_path / "keep", cuts={"duplicates": False})
    shutil.copytree(tmp_path / "files", tmp_path / "keep/files")
    kept = ingest(keep)
    assert not (kept.column("status") & Status.DUPLICATE).any()
    assert "1 usable spectra have an id that an earlier one has" in check(keep)[0]


@pytest.mark.parametrize("text", [False, True])
def test_duplicates_are_found_whatever_is_held_in_memory(tmp_path: Path, text: bool, grid: Any) -> None:
    rng = np.random.default_rng(4)
    ids = rng.integers(-20, 20, 60) + np.int64(2**62)
    store = make_store(tmp_path / "s", make_spectra(rng, grid, 60), shard_rows=16, chunk_rows=8)
    for shard in range(store.shards):
        start, stop = store.base.bounds(shard)
        columns = {name: store.column(name)[start:stop] for name in store.column_names} | {"id": ids[start:stop]}
        store.write(shard, store.read(shard), columns)
    seen: set[int] = set()
    expected = [row for row, value in enumerate(ids) if value in seen or seen.add(value)]  # type: ignore[func-returns-value]
    for at_once in (7, 30, 1000):
        assert duplicate_rows(store, at_once).tolist() == expected


@pytest.mark.slow
def test_statistics_are_frozen_and_serve_what_comes_later(ray_session: None, tmp_path: Path) -> None:
    files_of(tmp_path / "files", range(12))
    experiment = survey(tmp_path, sample={"divide_by_mean": True, "snr_quantile": 0.5})
    store = ingest(experiment)
    assert store.statistics is not None
    base = store.base.read("columns/status")
    snr = store.column("snr")
    low = (store.column("status") & Status.LOW_SNR) != 0
    np.testing.assert_array_equal(low, (base == 0) & (snr < np.median(snr[base == 0])))
    files_of(tmp_path / "files/later", range(12, 30))
    later = ingest(experiment)
    assert later.statistics is not None
    assert (later.recipe, later.statistics.digest) == (store.recipe, store.statistics.digest)
    for shard in range(later.shards):
        raw, read = later.read(shard, frozen=False), later.read(shard)
        good = read.good
        expected = (raw.flux / later.statistics.mean)[good]
        np.testing.assert_allclose(read.flux[good], expected, rtol=1e-6)
    # Another sample may take the same statistics over; one of another recipe may not.
    other = survey(tmp_path / "other", sample={"divide_by_mean": True, "snr_quantile": 0.5, "store": store.path})
    files_of(tmp_path / "other/files", range(40, 52))
    assert ingest(other).recipe == store.recipe
    wrong = survey(tmp_path / "wrong", sample={"divide_by_mean": True, "store": store.path})
    files_of(tmp_path / "wrong/files", range(40, 44))
    with pytest.raises(ConfigError, match="was prepared by recipe"):
        ingest(wrong)


@pytest.mark.slow
def test_the_ledger_names_everything_that_is_set_aside(ray_session: None, tmp_path: Path) -> None:
    files = files_of(tmp_path / "files", range(10))
    files[3].write_bytes(b"<html>")
    experiment = survey(tmp_path, cuts={"z_max": 0.2})
    store = ingest(experiment)
    with (tmp_path / "out/ledger.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    status = store.column("status")
    assert [int(line["row"]) for line in lines] == np.flatnonzero(status).tolist()
    assert [line["id"] for line in lines] == store.column("id")[status != 0].tolist()
    assert all(line["reasons"] for line in lines)
    damaged = next(line for line in lines if line["file"] == files[3].name)
    assert "web page" in damaged["note"]


@pytest.mark.slow
def test_what_a_catalogue_wants_and_no_file_holds_is_in_the_ledger(ray_session: None, tmp_path: Path) -> None:
    files = files_of(tmp_path / "files", range(6))
    rows = [tuple(int(part) for part in file.stem.split("-")[1:]) for file in files]
    table = np.array([*rows, (9999, 58000, 17)], dtype=[("PLATE", ">i4"), ("MJD", ">i4"), ("FIBERID", ">i4")])
    fits.BinTableHDU(table).writeto(tmp_path / "specObj.fits")
    experiment = survey(tmp_path)
    tree = experiment.model_dump(mode="json", exclude_none=True)
    tree["ingest"]["source"] |= {"catalog": str(tmp_path / "specObj.fits")}
    store = ingest(small(tmp_path / "out", ingest=tree["ingest"]))
    assert store.rows == 6
    assert "9999" in (tmp_path / "out/ledger.csv").read_text()


def damage(store: SpectraStore) -> None:
    chunk = Path(store.path) / "base/ivar/c/1/0"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    (Path(store.path) / "base/columns/id/c/0").unlink()


@pytest.mark.slow
def test_a_damaged_store_is_found_out_mended_and_ends_with_the_same_bytes(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files_of(tmp_path / "files", range(20))
    experiment = survey(tmp_path, 8)
    settings = tmp_path / "s.toml"
    settings.write_text(dump(experiment))
    store = ingest(experiment)
    whole = contents(Path(store.path))

    def verb(*words: str) -> tuple[int, str, str]:
        import sys

        sys.argv = ["distspec", *words]
        code = 0
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, out, _ = verb("ingest", str(settings), "--check")
    assert (code, "whole" in out) == (0, True)
    damage(store)
    code, _, err = verb("ingest", str(settings), "--check")
    assert code == 2
    assert "ivar is damaged in rows 8-16" in err
    assert "columns/id has lost rows 0-8" in err
    assert err.count("\n") == 2
    assert contents(Path(store.path)) != whole
    assert verb("ingest", str(settings), "--mend")[0] == 2
    assert SpectraStore.open(store.path).pending() == [0, 1]
    assert verb("ingest", str(settings))[0] == 0
    assert contents(Path(store.path)) == whole
    assert verb("ingest", str(settings), "--check")[0] == 0


def test_a_mark_that_does_not_fit_is_found_even_where_every_chunk_is_sound(store: SpectraStore) -> None:
    other = np.arange(16, dtype=np.int64) + 7
    store._root["base/columns/id"][0:16] = other
    problems = audit(store, lambda work, arguments, items: map(work(*arguments), items))
    assert len(problems) == 1
    assert "rows 0-16 are not what their mark says" in problems[0]


@pytest.mark.slow
def test_scores_and_explanations_follow_a_store_that_grows(ray_session: None, tmp_path: Path) -> None:
    files_of(tmp_path / "files", range(80))
    grid = {"scale": "log", "first": 3800.0, "last": 7400.0, "pixels": 160}
    ingesting = survey(tmp_path, grid=grid).ingest.model_dump(mode="json", exclude_none=True)
    detecting = {"detectors": [{"kind": "pca", "components": 3}]}
    experiment = small(tmp_path / "out", ingest=ingesting, detect=detecting, explain={"scores": ["chi2", "pca"]})
    made = run(experiment)
    assert made.checkpoint is not None
    files_of(tmp_path / "files/later", range(80, 110))
    again = run(experiment)
    assert again.checkpoint is not None and again.scores is not None and made.scores is not None
    assert again.checkpoint.sha256 == made.checkpoint.sha256
    assert again.scores.name == made.scores.name
    np.testing.assert_array_equal(again.scores.read("chi2", 0, 80), made.scores.read("chi2", 0, 80))
    assert again.scores.rows == 110
    usable = again.store.column("status") == 0
    assert np.isfinite(again.scores.read("chi2")[usable]).all()
    # A classical detector scores what is new, too, and the top lists of all of it are explained.
    assert np.isfinite(again.detected["pca"].read("pca")[usable]).all()
    rows, rank = (again.explanations["lime"].read(name) for name in ("row", "rank"))
    for place, layer in enumerate((again.scores, again.detected["pca"])):
        listed = rows[rank[:, place] >= 0][np.argsort(rank[rank[:, place] >= 0, place])]
        values = layer.read(("chi2", "pca")[place])
        np.testing.assert_array_equal(listed, np.argsort(-values, kind="stable")[: len(listed)])


@pytest.mark.slow
def test_a_file_that_was_bad_may_be_put_right_and_comes_in_with_the_next_ingest(
    ray_session: None, tmp_path: Path
) -> None:
    files = files_of(tmp_path / "files", range(6))
    sound = files[2].read_bytes()
    files[2].write_bytes(sound[:9000])
    experiment = survey(tmp_path)
    first = ingest(experiment)
    assert (first.column("status") == Status.UNREADABLE).sum() == 1
    files[2].write_bytes(sound)
    again = ingest(experiment)
    names, status = again.column("file"), again.column("status")
    assert again.rows == 7
    assert (status[names == files[2].name] == Status.UNREADABLE).tolist() == [True, False]
    # Done: a third ingest finds nothing new.
    assert ingest(experiment).rows == 7


@pytest.mark.slow
def test_a_file_that_could_not_be_counted_loses_no_spectra_silently(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coadds = write_desi(SimulatedSurvey(small(tmp_path).ingest.source, 5), tmp_path / "files", range(30), 10)
    source = {"kind": "desi", "path": str(tmp_path / "files")}
    prepare = {"dust": {"kind": "none"}, "grid": {"first": 3800.0, "last": 7400.0, "pixels": 160}}
    experiment = small(tmp_path / "out", ingest={"source": source, "prepare": prepare})
    count = DesiCoadds.count

    def blip(self: DesiCoadds, name: str) -> int:
        if name == coadds[1].name:
            raise SourceError(f"{name}: Input/output error; expected a readable file")
        return count(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(DesiCoadds, "count", blip)
        # In this process, which is the one that is disturbed.
        patched.setattr(ingest_stage, "map_items", partial(map_items, here=True))
        store = ingest(experiment)
    assert store.rows == 21
    status, names, notes = (store.column(name) for name in ("status", "file", "note"))
    row = names.tolist().index(coadds[1].name)
    assert status[row] == Status.UNREADABLE
    assert "Input/output error" in notes[row]
    coadds[1].touch()
    again = ingest(experiment)
    assert again.rows == 31
    assert (again.column("file") == coadds[1].name).sum() == 11


@pytest.mark.slow
def test_the_ledger_comes_back_and_says_why_a_sample_is_too_small(ray_session: None, tmp_path: Path) -> None:
    files_of(tmp_path / "files", range(8))
    experiment = survey(tmp_path, sample={"impute": True}, cuts={"snr_min": 1e6})
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"8 are set aside; .*ledger\.csv says why"):
            ingest(experiment)
        assert (tmp_path / "out/ledger.csv").read_text().count("signal-to-noise") == 8
    other = survey(tmp_path / "other", cuts={"snr_min": 1e6})
    files_of(tmp_path / "other/files", range(3))
    ingest(other)
    (tmp_path / "other/out/ledger.csv").unlink()
    ingest(other)
    assert (tmp_path / "other/out/ledger.csv").is_file()


@pytest.mark.slow
def test_a_catalogue_that_has_changed_is_named(ray_session: None, tmp_path: Path) -> None:
    files = files_of(tmp_path / "files", range(4))
    rows = [tuple(int(part) for part in file.stem.split("-")[1:]) for file in files]
    kind = [("PLATE", ">i4"), ("MJD", ">i4"), ("FIBERID", ">i4")]
    catalog = tmp_path / "specObj.fits"
    fits.BinTableHDU(np.array(rows[:2], dtype=kind)).writeto(catalog)
    tree = survey(tmp_path).model_dump(mode="json", exclude_none=True)["ingest"]
    tree["source"] |= {"catalog": str(catalog)}
    assert ingest(small(tmp_path / "out", ingest=tree)).rows == 2
    fits.BinTableHDU(np.array(rows * 300, dtype=kind)).writeto(catalog, overwrite=True)
    with pytest.warns(DistspecWarning, match="the catalogue is not the one"):
        assert ingest(small(tmp_path / "out", ingest=tree)).rows == 4


def test_two_runs_on_one_store_are_refused(ray_session: None, tmp_path: Path) -> None:
    files_of(tmp_path / "files", range(3))
    tree = survey(tmp_path).model_dump(mode="json", exclude_none=True)["ingest"] | {"store": str(tmp_path / "s.zarr")}
    with FileLock(tmp_path / "s.zarr.lock"), pytest.raises(ConfigError, match="another run is at work"):
        run(small(tmp_path / "out", ingest=tree), only="ingest")
    assert run(small(tmp_path / "out", ingest=tree), only="ingest").store.rows == 3
