import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from distspec.config import Experiment, dump, load
from distspec.errors import CheckpointError, ConfigError, StoreNotFoundError
from distspec.pipeline import Products, plan, run
from distspec.stages.stage import State
from tests.support.processes import PATIENCE, finished, started
from tests.support.small import contents, small


def test_all_stages_leave_what_they_promise(done: tuple[Experiment, Products]) -> None:
    experiment, made = done
    output = Path(experiment.output)
    assert {path.name for path in output.iterdir()} >= {
        "experiment.toml", "store.zarr", "models", "report.html", "anomalies.csv", "mlflow.db", "mlartifacts",
    }  # fmt: skip
    assert load(str(output / "experiment.toml")) == experiment
    assert made.store.pending() == made.scores.pending() == []
    assert not list(output.rglob("*.partial"))


@pytest.mark.slow
def test_a_second_run_changes_no_result(done: tuple[Experiment, Products]) -> None:
    experiment, made = done
    before = contents(Path(made.store.path)) | contents(Path(made.checkpoint.folder))
    said: list[str] = []
    run(experiment, say=said.append)
    assert said == ["already done: ingest, train, score, compare, explain, cluster"]
    assert contents(Path(made.store.path)) | contents(Path(made.checkpoint.folder)) == before


@pytest.mark.parametrize(
    ("stage", "error", "says"),
    [
        ("train", StoreNotFoundError, "run `distspec ingest` first"),
        ("score", StoreNotFoundError, "run `distspec ingest` first"),
        ("report", StoreNotFoundError, "run `distspec ingest` first"),
    ],
)
def test_a_stage_without_its_input_says_what_to_run(
    tmp_path: Path, stage: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        run(small(tmp_path / "out"), stage)


def test_a_stage_after_an_untrained_or_unscored_one_says_so(done: tuple[Experiment, Products]) -> None:
    experiment, _ = done
    untrained = experiment.model_copy(update={"train": experiment.train.model_copy(update={"epochs": 5})})
    with pytest.raises(CheckpointError, match="train first"):
        run(untrained, "score")
    unscored = experiment.model_copy(update={"score": experiment.score.model_copy(update={"epsilon": 0.5})})
    with pytest.raises(StoreNotFoundError, match="run its stage first"):
        run(unscored, "explain")


@pytest.mark.slow
def test_another_model_can_score_the_same_recipe(done: tuple[Experiment, Products], tmp_path: Path) -> None:
    experiment, made = done
    source = {"kind": "simulate", "spectra": 130, "anomalies": 0.0}
    other = small(
        tmp_path / "out",
        seed=99,
        ingest=experiment.ingest.model_dump(mode="json", exclude_none=True) | {"source": source},
        score={"checkpoint": made.checkpoint.folder},
    )
    run(other, "ingest")
    products = run(other, "score")
    assert products.checkpoint.sha256 == made.checkpoint.sha256
    assert products.store.rows == 130
    assert not (tmp_path / "out/models").exists()


def test_a_plan_of_an_untouched_output_begins_with_ingest_and_makes_nothing(tmp_path: Path) -> None:
    planned = {one.stage: one for one in plan(small(tmp_path / "out"))}
    assert planned["ingest"].state == State(0, 2, "files", "no store yet")
    assert {name: one.off for name, one in planned.items() if one.off} == {
        "detect": "detect.detectors names none",
        "evaluate": "evaluate.hosts is 0",
    }
    waiting = {name for name, one in planned.items() if one.after == "ingest" and one.state is None and not one.off}
    assert waiting == {"tune", "train", "score", "compare", "explain", "cluster", "report", "export"}
    assert list(tmp_path.iterdir()) == []


def test_a_plan_counts_the_shards_of_what_is_half_done(done: tuple[Experiment, Products], tmp_path: Path) -> None:
    ran, made = done
    shutil.copytree(Path(ran.output) / "store.zarr", tmp_path / "out/store.zarr")
    shutil.copytree(Path(ran.output) / "models", tmp_path / "out/models")
    experiment = ran.model_copy(update={"output": str(tmp_path / "out")})
    (tmp_path / f"out/store.zarr/layers/{made.scores.name}/commits/c/1").unlink()
    planned = {one.stage: one for one in plan(experiment)}
    assert planned["ingest"].state == State(6, 6, "shards")
    assert planned["train"].state == State(4, 4, "epochs")
    assert planned["score"].state == State(5, 6, "shards", "not all shards are scored")
    assert planned["explain"].after == "score"
    (tmp_path / "out/store.zarr/base/commits/c/2").unlink()
    planned = {one.stage: one for one in plan(experiment)}
    assert planned["ingest"].state == State(5, 6, "shards", "ingest was interrupted")
    assert planned["train"].after == planned["score"].after == "ingest"


def test_two_runs_on_one_output_do_not_meet(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"), pytest.raises(ConfigError, match="another run is at work"):
        run(small(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE)
def test_killed_anywhere_and_started_again_it_gives_the_same_bytes(
    done: tuple[Experiment, Products], tmp_path: Path
) -> None:
    """kill -9 of the driver during ingest, training and scoring; then a run to the end."""
    _, made = done
    output = tmp_path / "out"
    experiment = small(output)
    (tmp_path / "small.toml").write_text(dump(experiment), "utf-8")
    store = output / "store.zarr"
    _killed_when(tmp_path, lambda: any((store / "base/commits/c").glob("*")))
    stamps = {path: path.stat().st_mtime_ns for path in (store / "base/flux/c").glob("0/*")}
    _killed_when(tmp_path, lambda: any(output.glob("training/*/first/epoch-00001/state.json")))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    _killed_when(tmp_path, lambda: any(store.glob("layers/score-*/commits/c/*")))
    ended = finished(_command(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert contents(store) == contents(Path(made.store.path))
    models = [contents(folder)["model.safetensors"] for folder in (output / "models").iterdir()]
    assert models == [contents(Path(made.checkpoint.folder))["model.safetensors"]]
    assert (output / "report.html").is_file()


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "distspec", "run", str(folder / "small.toml")]


def _killed_when(folder: Path, reached: Callable[[], bool]) -> None:
    """Start a run and kill its driver as soon as it has got somewhere."""
    with open(folder / "log", "ab") as log, started(_command(folder), stdout=log, stderr=log) as driver:
        _wait_until(lambda: reached() or driver.poll() is not None)
        driver.kill()
        killed = driver.wait() == -signal.SIGKILL
    assert killed, "the run ended before it could be killed: " + (folder / "log").read_text()


def _wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_in_order_and_says_how_to_go_on(
    done: tuple[Experiment, Products], tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    changes = {"model": {"hidden": [32], "latents": 4}, "epochs": 5000, "patience": 5000}
    (tmp_path / "small.toml").write_text(dump(small(tmp_path / "out", train=changes)), "utf-8")
    with started(_command(tmp_path), stderr=subprocess.PIPE) as driver:
        third = "training/*/first/epoch-00002/state.json"
        _wait_until(lambda: any((tmp_path / "out").glob(third)) or driver.poll() is not None)
        driver.send_signal(sent)
        _, said = driver.communicate(timeout=PATIENCE)
    assert (driver.returncode, said) == (status, "distspec: interrupted; the same command goes on where it stopped\n")
