"""Faults that cost workers, in whole stages: the stage ends, what it lost is named, and all else is as without them."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distspec import cli
from distspec.config import dump
from distspec.pipeline import Products, given_up, run
from distspec.stages.detect import stage as detect_stage
from distspec.stages.detect.workers import DetectorScorer
from distspec.stages.explain import stage as explain_stage
from distspec.stages.explain.selection import SelectedRows
from distspec.stages.explain.workers import ExplainWorker
from distspec.stages.score import stage as score_stage
from distspec.stages.score.census import GIVEN_UP
from distspec.stages.score.workers import Scorer
from tests.support.small import small

DEADLY = 300
"""Row that ends whoever scores it."""

DETECT = {"detectors": [{"kind": "pca", "components": 3}], "sample": 200}


class DeadlyScorer(Scorer):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._scores = Deadly(self._scores)  # type: ignore[assignment]


class DeadlyDetectorScorer(DetectorScorer):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._detectors = {name: Deadly(one) for name, one in self._detectors.items()}  # type: ignore[misc]


class DeadlyExplainWorker(ExplainWorker):
    def __init__(self, row: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._row = row

    def find(self, layer: str, chosen: SelectedRows) -> dict[str, np.ndarray]:
        if self._row in chosen.rows:
            os._exit(1)
        return super().find(layer, chosen)


class Deadly:
    """Scores as another does, and ends the process where it meets one row."""

    def __init__(self, other: Any) -> None:
        self._other = other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)

    def __call__(self, spectra: Any) -> Any:
        if DEADLY in spectra.rows:
            os._exit(1)
        return self._other(spectra)

    def details(self, spectra: Any) -> Any:
        if DEADLY in spectra.rows:
            os._exit(1)
        return self._other.details(spectra)


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Products:
    return run(small(tmp_path_factory.mktemp("quiet") / "out", detect=DETECT))


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["score", "detect"])
def test_a_spectrum_that_ends_its_workers_is_set_aside_and_the_run_goes_on(
    undisturbed: Products,
    verb: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    experiment = small(tmp_path / "out", detect=DETECT)
    assert undisturbed.store is not None and undisturbed.store.status(DEADLY, DEADLY + 1)[0] == 0
    if verb == "score":
        monkeypatch.setattr(score_stage, "Scorer", DeadlyScorer)
    else:
        monkeypatch.setattr(detect_stage, "DetectorScorer", DeadlyDetectorScorer)
    with pytest.warns(match=f"{verb} goes on without row {DEADLY}, which ended its worker"):
        made = run(experiment)
    assert made.store is not None and made.report is not None
    assert list(given_up(made)["scores"]) == [DEADLY]
    layers = {"score": (made.scores, undisturbed.scores), "detect": (made.detected["pca"], undisturbed.detected["pca"])}
    for name, (layer, quiet) in layers.items():
        assert layer is not None and quiet is not None
        for field in layer.fields:
            found, expected = layer.read(field), quiet.read(field)
            if name == verb:
                expected = np.array(expected)
                nothing = np.isnan(found[DEADLY]) if found.dtype.kind == "f" else found[DEADLY] == -1
                assert np.all(nothing) and not np.isnan(expected[DEADLY]).any()
                expected[DEADLY] = found[DEADLY]
            np.testing.assert_array_equal(found, expected)
    page = made.report.read_text("utf-8")
    assert GIVEN_UP in page
    (summary,) = (tmp_path / "out" / "mlartifacts").rglob("summary.json")
    told = json.loads(summary.read_bytes())
    assert sum(told["set_aside_reasons"].values()) == told["set_aside"] == made.store.rows - told["scored"]
    assert told["set_aside_reasons"].get("GIVEN_UP", 0) == (verb == "score")
    # The same said on the command line; done already, so that nothing is lost again.
    file = tmp_path / "small.toml"
    file.write_text(dump(experiment), "utf-8")
    monkeypatch.setattr("sys.argv", ["distspec", "run", str(file)])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 3
    assert f"usable spectra without scores: 1, the first: row {DEADLY} (" in capsys.readouterr().err


@pytest.mark.slow
def test_a_spectrum_that_cannot_be_explained_alive_is_named_and_the_others_are_as_ever(
    undisturbed: Products, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name, quiet), *_ = undisturbed.explanations.items()
    row = int(quiet.read("row")[1])
    monkeypatch.setattr(explain_stage, "ExplainWorker", partial(DeadlyExplainWorker, row))
    with pytest.warns(match=f"explain goes on without row {row}, which ended its worker"):
        made = run(small(tmp_path / "out", detect=DETECT))
    layer = made.explanations[name]
    assert list(given_up(made)["explanations"]) == [row]
    assert "ended its worker" in layer.read("reason")[1]
    others = layer.read("row") != row
    for field in set(layer.fields) - {"reason"}:
        np.testing.assert_array_equal(layer.read(field)[others], quiet.read(field)[others])
    assert np.isnan(layer.read("weights")[1]).all()
    assert made.report is not None and "ended its worker" in made.report.read_text("utf-8")
