import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from distspec.config import Experiment
from distspec.errors import ConfigError
from distspec.models.checkpoint import Checkpoint
from distspec.models.training import loop as training
from distspec.pipeline import Products
from distspec.results.layout import model_folder
from distspec.runtime.tracking import tracking_uri
from distspec.stages.train.stage import train
from tests.support.processes import PATIENCE
from tests.support.small import contents, small


def test_training_lowers_the_loss_and_ends_with_a_registered_model(done: tuple[Experiment, Products]) -> None:
    experiment, made = done
    epochs = made.checkpoint.facts["phases"]["first"]
    assert epochs[-1]["train_loss"] < 0.8 * epochs[0]["train_loss"]
    assert epochs[-1]["learning_rate"] < epochs[0]["learning_rate"] < experiment.train.learning_rate
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(experiment), tracking_uri(experiment))
    version = client.get_model_version_by_alias("small", "newest")
    assert version.tags["sha256"] == made.checkpoint.sha256
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.model.hidden"] == "[32]"
    assert run.data.params["ingest.source.spectra"] == "700"
    history = client.get_metric_history(version.run_id, "validation_loss")
    assert [point.step for point in history] == list(range(len(epochs)))
    assert [point.value for point in history] == [epoch["validation_loss"] for epoch in epochs]
    names = {item.path for item in client.list_artifacts(version.run_id)}
    assert {"curves.png", "reconstructions.png", "chi2_along_wavelength.png", "model"} <= names
    copy = Checkpoint.load(client.download_artifacts(version.run_id, "model"))
    assert copy.sha256 == made.checkpoint.sha256


@pytest.mark.slow
def test_an_interrupted_training_goes_on_and_ends_with_the_same_weights(
    done: tuple[Experiment, Products], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, made = done
    experiment = small(tmp_path / "out")
    keep = training.keep_state

    def killed(state: Path, epoch: int, *rest: object) -> None:
        keep(state, epoch, *rest)
        if epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "keep_state", killed)
    with pytest.raises(BaseException, match=".*"):
        train(experiment, made.store)
    folder = model_folder(experiment, made.store.digest)
    assert not folder.exists()
    newest, epochs = training.newest_state(tmp_path / "out/training" / folder.name / "first")
    assert newest.name == "epoch-00001"
    assert len(epochs) == 2
    # A truncated newest state costs an epoch, not the run.
    (newest / "optimizer.safetensors").write_bytes(b"half")
    monkeypatch.setattr(training, "keep_state", keep)
    checkpoint = train(experiment, made.store)
    assert checkpoint.sha256 == made.checkpoint.sha256
    assert not (tmp_path / "out/training" / folder.name).exists()


def test_a_finished_model_is_not_trained_again(done: tuple[Experiment, Products]) -> None:
    experiment, made = done
    before = contents(Path(made.checkpoint.folder))
    assert train(experiment, made.store).sha256 == made.checkpoint.sha256
    assert contents(Path(made.checkpoint.folder)) == before


def test_a_loss_that_is_not_finite_stops_the_training_and_registers_nothing(
    done: tuple[Experiment, Products], tmp_path: Path
) -> None:
    _, made = done
    experiment = small(tmp_path / "out", train={"learning_rate": 1e30, "model": {"hidden": [32], "latents": 4}})
    with pytest.raises(ConfigError, match=r"not finite in epoch \d+; lower train.learning_rate"):
        train(experiment, made.store)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(experiment), tracking_uri(experiment))
    assert client.search_registered_models() == []
    assert not list((tmp_path / "out").glob("models/*"))


TWO = {"workers": 2, "epochs": 4, "batch": 64, "model": {"hidden": [32], "latents": 4}}


def kill_a_worker(state: Path) -> list[int]:
    """Kill one of the training workers as soon as an epoch is kept; give its process number."""
    deadline = time.monotonic() + PATIENCE
    while not (state / "first/epoch-00000/state.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    session = {raylet.pid for raylet in psutil.Process().children() if "raylet" in " ".join(cmdline(raylet))}
    for process in psutil.process_iter():
        if "RayTrainWorker" in " ".join(cmdline(process)) and process.ppid() in session:
            process.kill()
            return [process.pid]
    return []


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


@pytest.mark.slow
def test_two_workers_train_a_model_as_good_and_one_that_is_killed_changes_nothing(
    done: tuple[Experiment, Products], tmp_path: Path
) -> None:
    _, made = done
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    checkpoint = train(small(tmp_path / "whole", train=TWO), made.store)
    curves = [one.facts["phases"]["first"] for one in (checkpoint, made.checkpoint)]
    losses = [min(epoch["validation_loss"] for epoch in curve) for curve in curves]
    assert losses[0] == pytest.approx(losses[1], rel=0.15)
    experiment = small(tmp_path / "killed", train=TWO)
    state = tmp_path / "killed/training" / model_folder(experiment, made.store.digest).name
    with ThreadPoolExecutor(1) as watcher:
        killed = watcher.submit(kill_a_worker, state)
        again = train(experiment, made.store)
    assert killed.result()
    assert again.sha256 == checkpoint.sha256
    assert again.facts["phases"] == checkpoint.facts["phases"]


@pytest.mark.slow
def test_more_workers_or_gpus_than_there_are_is_refused(done: tuple[Experiment, Products], tmp_path: Path) -> None:
    _, made = done
    for change in ({"workers": 9}, {"workers": 1, "gpu": True}, {"workers": 0, "gpu": True}):
        if torch.cuda.is_available() and "gpu" in change:
            continue
        experiment = small(tmp_path / "out", train={"epochs": 3, **change})
        with pytest.raises(ConfigError, match=r"asks for (9 CPUs|1 CPU and 1 GPU|a GPU)"):
            train(experiment, made.store)


@pytest.mark.slow
def test_the_second_network_starts_from_the_weights_of_the_first(
    done: tuple[Experiment, Products], tmp_path: Path
) -> None:
    store = done[1].store
    second = {"epochs": 1, "learning_rate": 1e-9, "final_learning_rate": 1e-9}
    train_ = {"model": {"hidden": [32], "latents": 4}, "epochs": 2, "batch": 64, "second": second}
    both = train(small(tmp_path / "out", train=train_), store).model
    for name, weights in both.first.state_dict().items():
        torch.testing.assert_close(both.second.state_dict()[name], weights, atol=1e-6, rtol=0)
