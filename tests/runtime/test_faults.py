"""Faults that cost workers, in whole stages: the stage ends, what it lost is named, and all else is as without them."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from distspec import cli
from distspec.config import dump
from distspec.pipeline import Products, given_up, run
from distspec.spectra import Status
from distspec.stages.detect import stage as detect_stage
from distspec.stages.detect.workers import DetectorScorer
from distspec.stages.evaluate import stage as evaluate_stage
from distspec.stages.evaluate.workers import Injector
from distspec.stages.explain import stage as explain_stage
from distspec.stages.explain.workers import ExplainWorker
from distspec.stages.ingest import stage as ingest_stage
from distspec.stages.ingest.workers import Ingester
from distspec.stages.score import stage as score_stage
from distspec.stages.score.census import GIVEN_UP
from distspec.stages.score.workers import Scorer
from tests.support.faults import Fault, Struck
from tests.support.small import small

DEADLY = 300
"""Row that ends whoever scores it."""

DETECT = {"detectors": [{"kind": "pca", "components": 3}], "sample": 200}


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
        monkeypatch.setattr(score_stage, "Scorer", partial(Struck, Scorer, Fault("exit", DEADLY)))
    else:
        monkeypatch.setattr(detect_stage, "DetectorScorer", partial(Struck, DetectorScorer, Fault("exit", DEADLY)))
    with pytest.warns(match=f"{verb} goes on without row {DEADLY}, which ended its worker"):
        made = run(experiment)
    assert made.store is not None and made.report is not None
    assert list(given_up(made)["usable spectra without scores"]) == [DEADLY]
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
    monkeypatch.setattr(explain_stage, "ExplainWorker", partial(Struck, ExplainWorker, Fault("exit", row)))
    with pytest.warns(match=f"explain goes on without row {row}, which ended its worker"):
        made = run(small(tmp_path / "out", detect=DETECT))
    layer = made.explanations[name]
    assert list(given_up(made)["usable spectra without explanations"]) == [row]
    assert "ended its worker" in layer.read("reason")[1]
    others = layer.read("row") != row
    for field in set(layer.fields) - {"reason"}:
        np.testing.assert_array_equal(layer.read(field)[others], quiet.read(field)[others])
    assert np.isnan(layer.read("weights")[1]).all()
    assert made.report is not None and "ended its worker" in made.report.read_text("utf-8")


@pytest.mark.slow
def test_a_spectrum_that_cannot_be_read_alive_is_set_aside_with_the_reason(
    undisturbed: Products, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_stage, "Ingester", partial(Struck, Ingester, Fault("exit", DEADLY)))
    with pytest.warns(match=f"ingest goes on without row {DEADLY}, which ended its worker"):
        made = run(small(tmp_path / "out"), only="ingest")
    quiet = undisturbed.store
    assert made.store is not None and quiet is not None
    assert list(given_up(made)["spectra that were not read"]) == [DEADLY]
    assert made.store.status()[DEADLY] == Status.UNREADABLE
    assert "ended its worker" in made.store.column("note")[DEADLY]
    assert f"{DEADLY}" in (tmp_path / "out/ledger.csv").read_text()
    others = np.arange(quiet.rows) != DEADLY
    for name in {*quiet.base.fields} - {"columns/note"}:
        np.testing.assert_array_equal(made.store.base.read(name)[others], quiet.base.read(name)[others])


@pytest.mark.slow
def test_a_host_that_ends_its_worker_is_left_out_of_the_measurement(
    undisturbed: Products, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = {"hosts": 12, "kinds": ["cosmic-ray"], "strengths": [1.0], "explained": 12}
    out = Path(str(undisturbed.report)).parent
    shutil.copytree(out, tmp_path / "out")
    monkeypatch.setattr(evaluate_stage, "Injector", partial(Struck, Injector, Fault("exit", 5)))
    with pytest.warns(match="evaluate goes on without row"):
        made = run(small(tmp_path / "out", detect=DETECT, evaluate=evaluate), only="evaluate")
    assert made.evaluation is not None
    facts = made.evaluation.content
    (row,) = given_up(made)["hosts of planted anomalies left out"]
    assert facts["given_up"][str(row)].startswith("ended its worker")
    assert facts["kinds"]["cosmic-ray"]["possible"] == [11]
    assert any("1 hosts ended the workers" in note for note in facts["notes"])
