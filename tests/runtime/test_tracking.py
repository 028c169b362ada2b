"""Runs in MLflow: gone on with, nested, and never worth a result."""

import json
from contextlib import suppress
from pathlib import Path

import pytest

from distspec.config import Experiment
from distspec.errors import ConfigError, DistspecWarning
from distspec.runtime.tracking import Run, serve, tracking_uri
from tests.support.small import small


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A small experiment; one database of runs for all tests, since it takes seconds to make."""
    return small(tmp_path_factory.mktemp("out"))


@pytest.mark.slow
def test_a_stage_that_runs_again_goes_on_in_its_old_run(tracked: Experiment) -> None:
    with pytest.raises(KeyboardInterrupt), Run(tracked, "train", "k", {}) as first:
        first.metrics({"loss": 2.0}, 0)
        raise KeyboardInterrupt
    with Run(tracked, "train", "k", {}) as second:
        assert second.id == first.id
        assert second.last_step("loss") == 0
    with Run(tracked, "train", "k", {}) as third:
        assert third.id != first.id


def test_the_best_model_is_the_best_of_those_that_can_be_compared_with_the_newest(
    tracked: Experiment, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.json").write_text("{}")
    versions = [("a", "chi2", 2.0), ("a", "chi2", 1.0), ("a", "chi2", 3.0), ("a", "mse", 0.1), ("a", "chi2", 1.5)]
    versions.append(("b", "chi2", 9.0))
    best = []
    with Run(tracked, "train", "k", {}) as run:
        for store, kind, loss in versions:
            run.register(tmp_path / "model", {"store": store, "loss": kind}, loss, {"flux": 240}, {"latents": 4})
            client = MlflowClient(tracking_uri(tracked), tracking_uri(tracked))
            best.append(int(client.get_model_version_by_alias("small", "best").version))
    assert best == [1, 2, 2, 4, 2, 6]
    from mlflow.models import Model

    signature = Model.load(client.download_artifacts(run.id, "model")).signature
    assert [spec.name for spec in signature.inputs] == ["flux"]
    assert signature.inputs.inputs[0].shape == (-1, 240)


@pytest.mark.slow
def test_an_unreachable_tracking_server_is_named_without_its_password(tmp_path: Path) -> None:
    experiment = small(tmp_path / "out", tracking={"uri": "http://me:secret@127.0.0.1:9"})
    with pytest.raises(ConfigError, match="cannot track runs at http://127.0.0.1:9") as caught:
        Run(experiment, "train", "k", {})
    assert "secret" not in str(caught.value)


def test_a_tracking_server_that_goes_away_costs_no_result(tracked: Experiment) -> None:
    from mlflow.exceptions import MlflowException

    calls = []

    def refuse(*_: object, **__: object) -> None:
        calls.append(1)
        raise MlflowException("connection refused")

    with pytest.warns(DistspecWarning, match="3 records of run .* did not reach"), Run(tracked, "s", "k", {}) as run:
        run._client.log_batch = run._client.get_metric_history = refuse
        assert run.last_step("loss") == -1
        run.metrics({"loss": 1.0})
        run.metrics({"loss": 2.0}, 1)
    # last_step, the first record, and once more at the end: a server that is down is not asked for every epoch.
    assert len(calls) == 3
    with Run(tracked, "s", "k2", {}) as run:
        works = run._client.log_batch
        run._client.log_batch = refuse
        run.metrics({"loss": 3.0})
        run._client.log_batch = works
        run.metrics({"loss": 4.0}, 1)
    assert [point.value for point in run._client.get_metric_history(run.id, "loss")] == [3.0, 4.0]


def test_runs_inside_a_run_are_gone_on_with_by_name_and_closed_one_by_one(tracked: Experiment) -> None:
    with Run(tracked, "tune", "k", {"store": "s"}) as outer:
        first = outer.nested("trial 0", {"latents": 3})
        first.metrics({"loss": 2.0})
        first.end("FAILED", "not finite")
        second = outer.nested("trial 1", {"latents": 4})
        again = outer.nested("trial 0", {"latents": 3})
        assert again.id == first.id
        again.end("FINISHED")
    client = outer._client
    inner = {one: client.get_run(one.id) for one in (first, second)}
    assert {run.data.tags["mlflow.parentRunId"] for run in inner.values()} == {outer.id}
    assert inner[first].info.status == "FINISHED"
    assert inner[first].data.tags["distspec.reason"] == "not finite"
    assert inner[first].data.params == {"latents": "3"}
    assert inner[second].info.status == "RUNNING"
    assert client.get_run(outer.id).data.tags["distspec.store"] == "s"


def test_a_run_ends_as_the_block_does(tracked: Experiment) -> None:
    def status(error: BaseException | None) -> str:
        run = Run(tracked, "train", repr(error), {})
        with suppress(BaseException), run:
            if error is not None:
                raise error
        return str(run._client.get_run(run.id).info.status)

    assert [status(error) for error in (None, ValueError(), KeyboardInterrupt())] == ["FINISHED", "FAILED", "KILLED"]


def test_what_is_recorded_is_kept_as_it_was(tracked: Experiment) -> None:
    with Run(tracked, "score", "k", {}) as run:
        run.metrics({"spectra": 700, "set_aside": 3})
        run.reads("small", "0123456789ab", "/data/store.zarr")
        run.summary({"spectra": 700}, "facts.json")
        run.text("as it is\n", "store.txt")
    kept = run._client.get_run(run.id)
    assert kept.data.metrics == {"spectra": 700.0, "set_aside": 3.0}
    assert [one.dataset.digest for one in kept.inputs.dataset_inputs] == ["0123456789ab"]
    assert json.loads(Path(run._client.download_artifacts(run.id, "facts.json")).read_text()) == {"spectra": 700}
    assert Path(run._client.download_artifacts(run.id, "store.txt")).read_text() == "as it is\n"


def test_settings_are_parameters_and_the_address_is_not(tracked: Experiment) -> None:
    with Run(tracked, "score", "k", {}) as run:
        pass
    params = run._client.get_run(run.id).data.params
    assert params["train.model.latents"] == "4"
    assert params["ingest.source.spectra"] == "700"
    assert not [name for name in params if name.startswith("tracking")]


def test_runs_are_kept_where_the_settings_say_else_the_environment_else_beside_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(small(tmp_path / "out")) == f"sqlite:///{tmp_path / 'out/mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere")
    assert tracking_uri(small(tmp_path / "out")) == "http://somewhere"
    assert tracking_uri(small(tmp_path / "out", tracking={"uri": "http://here"})) == "http://here"


def test_pages_are_refused_where_there_are_none_or_a_server_has_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no runs in .* yet; run `distspec run` first"):
        serve(small(tmp_path / "out", tracking={"uri": f"sqlite:///{tmp_path / 'none.db'}"}), 5000)
    with pytest.raises(ConfigError, match="open http://there in a browser") as caught:
        serve(small(tmp_path / "out", tracking={"uri": "http://me:secret@there"}), 5000)
    assert "secret" not in str(caught.value)
