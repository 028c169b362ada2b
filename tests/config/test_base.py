"""What all settings have in common: which of them name places, and what these become for workers elsewhere."""

from pathlib import Path

import pytest

from distspec.config import Experiment, anchored
from distspec.config.base import Settings


def experiment(**source: str) -> Experiment:
    tree = {
        "output": "out",
        "ingest": {
            "source": {"kind": "sdss", "path": "spectra"} | source,
            "store": "s3://bucket/s.zarr",
            "values": [{"path": "table.csv"}],
            "prepare": {"dust": {"kind": "sfd", "path": "dust"}, "sample": {"store": "other.zarr", "impute": True}},
        },
        "score": {"checkpoint": "model"},
        "explain": {"ids": "ids.txt"},
        "export": {"to": "table.parquet"},
    }
    return Experiment.model_validate(tree, strict=False)


def test_every_place_becomes_absolute_and_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = experiment()
    after = anchored(before)
    here = str(tmp_path.resolve())
    assert (after.output, after.ingest.source.path) == (f"{here}/out", f"{here}/spectra")
    assert (after.ingest.store, after.ingest.values[0].path) == ("s3://bucket/s.zarr", f"{here}/table.csv")
    assert (after.ingest.prepare.dust.path, after.ingest.prepare.sample.store) == (f"{here}/dust", f"{here}/other.zarr")
    assert (after.score.checkpoint, after.explain.ids) == (f"{here}/model", f"{here}/ids.txt")
    assert after.export.to == f"{here}/table.parquet"
    # In another folder the same places are meant.
    monkeypatch.chdir("/")
    assert anchored(after) == after
    text = after.model_dump_json().replace(f"{here}/", "")
    assert text == before.model_dump_json()


def test_a_catalogue_may_lie_beside_the_spectra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert anchored(experiment(catalog="specObj.fits")).ingest.source.catalog == "specObj.fits"
    Path("specObj.fits").touch()
    assert anchored(experiment(catalog="specObj.fits")).ingest.source.catalog == str(
        tmp_path.resolve() / "specObj.fits"
    )


def test_arguments_of_workers_are_anchored_however_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings: Settings = experiment()
    given = ("text", 3, [Path("a")], {"b": (Path("b"), settings)})
    found = anchored(given)
    here = tmp_path.resolve()
    assert found == ("text", 3, [here / "a"], {"b": (here / "b", anchored(settings))})
