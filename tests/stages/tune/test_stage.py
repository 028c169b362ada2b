import csv
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distspec.config import Experiment, Train, Tune, load
from distspec.errors import ConfigError, ShardError
from distspec.models.training.feed import Feed
from distspec.pipeline import Products
from distspec.runtime.tracking import tracking_uri
from distspec.stages.order import STAGES
from distspec.stages.stage import Tuned
from distspec.stages.train.stage import train
from distspec.stages.tune import stage
from distspec.stages.tune.space import Least, Space
from distspec.stages.tune.stage import tune
from distspec.stages.tune.study import Study
from distspec.store import SpectraStore
from tests.support.small import small

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "convolutional": {"kind": "convolutional", "channels": [8, 4]},
    "variational": {"kind": "variational"},
    "redshifted": {"kind": "redshifted"},
}


def training(kind: str, **changes: Any) -> Train:
    return Train.model_validate_json(json.dumps({"model": MODELS[kind], **changes}))


@dataclass
class Drawing:
    """Draws from the whole of each range that it is asked for, and notes what it was asked."""

    data: st.DataObject

    def __post_init__(self) -> None:
        self.asked: dict[str, tuple[Any, Any]] = {}
        self.log: set[str] = set()

    def _note(self, name: str, low: Any, high: Any, log: bool) -> None:
        assert name not in self.asked
        assert low <= high
        assert low > 0
        self.asked[name] = (low, high)
        if log:
            self.log.add(name)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        self._note(name, low, high, log)
        return self.data.draw(st.integers(low, high))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self._note(name, low, high, log)
        return self.data.draw(st.floats(low, high))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.data.draw(st.sampled_from(choices))


@settings(deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from(sorted(MODELS)),
    pixels=st.integers(2, 4000),
    spectra=st.integers(1, 40_000),
    schedule=st.sampled_from(["polynomial", "plateau", "one_cycle", "constant"]),
)
def test_every_trial_is_in_the_papers_ranges(
    data: st.DataObject, kind: str, pixels: int, spectra: int, schedule: str
) -> None:
    tuning, base = Tune(), training(kind, schedule=schedule, clip=7.0)
    drawing = Drawing(data)
    made = Space(tuning, base, pixels, spectra)(drawing)
    Train.model_validate_json(made.model_dump_json())
    assert made.clip == 7.0
    assert 16 <= made.batch <= 256
    assert 1e-4 <= made.learning_rate <= 2e-3
    assert ("final_learning_rate" in drawing.asked) == (schedule != "constant")
    if schedule != "constant":
        assert 5e-6 <= made.final_learning_rate <= made.learning_rate
    assert ("decay_steps" in drawing.asked) == (schedule == "polynomial")
    if schedule == "polynomial":
        steps = spectra // min(made.batch, spectra) * 10
        assert min(2000, steps) <= made.decay_steps <= steps
    if kind == "convolutional":
        channels = made.model.channels
        assert len(channels) <= 5
        assert list(channels) == sorted(channels, reverse=True)
        assert 2 <= channels[-1] <= channels[0] <= 64
        assert pixels % 2 ** len(channels) == 0 or pixels % 2
    else:
        hidden = made.model.hidden[::-1] if kind == "redshifted" else made.model.hidden
        assert 2 <= len(hidden) <= 5
        assert min(2, pixels) <= made.model.latents <= min(14, pixels)
        assert list(hidden) == sorted(hidden, reverse=True)
        assert made.model.latents <= hidden[-1] <= hidden[0] <= pixels
    assert ("dropout" in drawing.asked) == (kind == "dense")
    assert drawing.log == {"dropout", "final_learning_rate", "decay_steps"} & drawing.asked.keys()


def test_the_decay_reaches_over_the_steps_of_the_papers_trials() -> None:
    class Most(Least):
        def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
            return 16 if name == "batch" else high

    assert Space(Tune(), Train(), 1000, 40_000)(Most()).decay_steps == 40_000 // 16 * 10


def test_a_range_may_be_fixed_or_left_to_train() -> None:
    everything = ("depth", "latents", "dropout", "learning_rate", "final_learning_rate", "decay_steps", "optimizer")
    off = load(None, [f"tune.{name}=false" for name in (*everything, "batch", "channels")])
    for kind in MODELS:
        base = training(kind, batch=77)
        assert Space(off.tune, base, 1000, 40_000)(Least()) == base
    one = load(None, ["tune.depth=[3, 3]", "tune.units=50", "tune.latents=[4, 4]", "tune.batch=[9, 9]"])
    made = Space(one.tune, one.train, 1000, 40_000)(Least())
    assert (made.model.hidden, made.model.latents, made.batch) == ((4, 4, 4), 4, 9)
    for refused, said in {
        "tune.depth=[3, 2]": "depth goes from its least to its largest",
        "tune.dropout=[0.1, 1.5]": "dropout must be below 1",
        "tune.optimizer=[]": "optimizer names none",
        "tune.reduction=1": "greater than 1",
    }.items():
        with pytest.raises(ConfigError, match=said):
            load(None, [refused])


def test_it_is_a_stage_that_runs_by_name_only() -> None:
    assert [stage.in_run for stage in STAGES if stage.name == "tune"] == [False]


def test_a_limit_draws_chunks_from_the_whole_store(done: tuple[Experiment, Products]) -> None:
    experiment, made = done
    whole, part = (Feed(made.store.address, experiment.train, 5, limit=limit) for limit in (None, 150))
    again = Feed(made.store.address, experiment.train, 5, limit=150)
    assert part.training.sum() == 150
    assert not (part.training & ~whole.training).any()
    assert not (part.validation & ~whole.validation).any()
    assert part.validation.any()
    np.testing.assert_array_equal(part.training, again.training)
    shards = np.flatnonzero(part.training) // made.store.chunk_rows
    assert shards.max() - shards.min() > 3
    assert Feed(made.store.address, experiment.train, 5, limit=10**6).training.sum() == whole.training.sum()
    seen = [len(flux) for flux, _, _ in part.with_batch(50).batches(0)]
    assert seen == [50, 50, 50]


# A study of a few trials, of which one is told to diverge; interrupted after the first that ends, then gone on with.

GOOD = {"latents": 4, "depth": 1, "units_1": 24, "dropout": 1e-3, "optimizer": "adam", "batch": 64}
DRAWN = [GOOD | {"learning_rate": rate} for rate in (2e-3, 1e-3, 1e30)]


@dataclass
class Studied:
    experiment: Experiment
    made: Products
    folder: Path
    interrupted: list[Any]
    tuned: Tuned


@pytest.fixture(scope="module")
def studied(done: tuple[Experiment, Products], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studied]:
    _, made = done
    ranges = {"learning_rate": [1e-4, 1e30], "depth": [1, 2], "units": 24, "batch": [64, 64]}
    experiment = small(
        tmp_path_factory.mktemp("tune") / "out",
        tune={"trials": 4, "epochs": 3, "grace_epochs": 1, "concurrent": 2, "reduction": 2, **ranges},
        train={"epochs": 3, "batch": 32, "model": {"hidden": [32], "latents": 4}},
    )
    finish = stage._Follower.on_trial_complete

    def interrupt(self: Any, *args: Any, **info: Any) -> None:
        finish(self, *args, **info)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:

        class Prepared(Study):
            def __init__(self, folder: Path) -> None:
                super().__init__(folder)
                for params in DRAWN:
                    self._study.enqueue_trial(params)

        patch.setattr(stage, "Study", Prepared)
        patch.setattr(stage._Follower, "on_trial_complete", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tune(experiment, made.store)
    folder = next(Path(experiment.output).glob("tuning/*"))
    assert not Path(experiment.output, "tuned.toml").exists()
    interrupted = Study(folder).ended()
    yield Studied(experiment, made, folder, interrupted, tune(experiment, made.store))


def test_an_interrupted_study_goes_on_and_repeats_nothing(studied: Studied) -> None:
    ended = Study(studied.folder).ended()
    assert 1 <= len(studied.interrupted) < len(ended) == 4 == studied.tuned.trials
    for before in studied.interrupted:
        assert before in ended
    # What had been drawn is drawn again, for the trials too that the interruption cut.
    assert {trial.params["learning_rate"] for trial in ended} >= {2e-3, 1e-3, 1e30}
    assert not (studied.folder / "states").exists()
    assert not (studied.folder / "ray").exists()


def test_a_trial_that_diverges_fails_and_never_wins(studied: Studied) -> None:
    ended = Study(studied.folder).ended()
    bad = [trial for trial in ended if trial.params["learning_rate"] > 1e20]
    assert bad
    assert all(trial.failed for trial in bad)
    assert studied.tuned.failed == sum(trial.failed for trial in ended)
    assert studied.tuned.loss == min(trial.loss for trial in ended)
    assert math.isfinite(studied.tuned.loss)
    rows = list(csv.DictReader(studied.tuned.table.read_text().splitlines()))
    assert [row["state"] for row in rows] == ["failed" if trial.failed else "finished" for trial in ended]


def test_every_trial_is_a_nested_run(studied: Studied) -> None:
    from mlflow import MlflowClient

    uri = tracking_uri(studied.experiment)
    client = MlflowClient(uri, uri)
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["best_validation_loss"] == studied.tuned.loss
    table = Path(client.download_artifacts(parent.info.run_id, "trials.csv"))
    assert table.read_text() == studied.tuned.table.read_text()
    inner = {run.data.tags["mlflow.runName"]: run for run in runs if run is not parent}
    ended = Study(studied.folder).ended()
    assert inner.keys() == {f"trial-{trial.number:05d}" for trial in ended}
    for trial in ended:
        run = inner[f"trial-{trial.number:05d}"]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == ("FAILED" if trial.failed else "FINISHED")
        assert run.data.params == {name: str(value) for name, value in trial.params.items()}
        history = client.get_metric_history(run.info.run_id, "validation_loss")
        assert [point.step for point in history] == list(range(len(trial.losses)))
        assert list(np.minimum.accumulate([point.value for point in history])) == list(trial.losses)
        assert not trial.failed or "not finite" in run.data.tags["distspec.reason"]


@pytest.mark.slow
def test_what_it_found_loads_and_trains_to_the_same_loss(studied: Studied) -> None:
    found = load(str(studied.tuned.path))
    assert found.train.epochs == studied.experiment.train.epochs
    best = next(trial for trial in Study(studied.folder).ended() if trial.number == studied.tuned.trial)
    assert found.train.learning_rate == best.params["learning_rate"]
    assert found.train.model.latents == best.params["latents"]
    assert found.train.batch == 64
    assert found.model_copy(update={"train": studied.experiment.train}) == studied.experiment
    assert studied.tuned.path.read_text().startswith(f"# distspec tune: trial {best.number}, best of 4")
    checkpoint = train(found, studied.made.store)
    losses = [epoch["validation_loss"] for epoch in checkpoint.facts["phases"]["first"]]
    assert list(np.minimum.accumulate(losses))[: len(best.losses)] == pytest.approx(best.losses, rel=1e-4)


def test_a_finished_study_is_not_searched_again(studied: Studied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_search", None)
    before = studied.tuned.path.read_bytes()
    assert tune(studied.experiment, studied.made.store) == studied.tuned
    # What it found belongs to the same study.
    assert tune(load(str(studied.tuned.path)), studied.made.store) == studied.tuned
    studied.tuned.path.unlink()
    assert tune(studied.experiment, studied.made.store) == studied.tuned
    assert studied.tuned.path.read_bytes() == before


@pytest.mark.slow
def test_what_cannot_be_tuned_is_refused_before_ray_starts(done: tuple[Experiment, Products], tmp_path: Path) -> None:
    _, made = done
    experiment = small(tmp_path / "out", tune={"concurrent": 99})
    with pytest.raises(ConfigError, match=r"tune.concurrent asks for 99 CPUs"):
        tune(experiment, made.store)


@pytest.mark.slow
def test_a_damaged_store_ends_the_study_in_one_line_and_fails_no_trial(
    done: tuple[Experiment, Products], tmp_path: Path
) -> None:
    _, made = done
    shutil.copytree(made.store.path, tmp_path / "store.zarr")
    store = SpectraStore.open(tmp_path / "store.zarr")
    (damaged,) = (tmp_path / "store.zarr").glob("base/flux/c/0/0")
    damaged.write_bytes(damaged.read_bytes()[:-9] + bytes(9))
    experiment = small(tmp_path / "out", tune={"trials": 2, "epochs": 1})
    with pytest.raises(ShardError, match=r"trial \d: .*flux is damaged"):
        tune(experiment, store)
    assert Study(next((tmp_path / "out").glob("tuning/*"))).ended() == []


@pytest.mark.slow
def test_a_journal_survives_kills_and_a_trial_whose_worker_dies_is_begun_thrice(tmp_path: Path) -> None:
    study = Study(tmp_path)
    first = study._study.ask()
    first.suggest_float("rate", 0.0, 1.0)
    with pytest.raises(ConfigError, match="none of 0 trials"):
        study.best()
    # Killed here: half a line, and the lock.
    with open(tmp_path / "journal.jsonl", "ab") as file:
        file.write(b'{"op_code":6,"wor')
    (tmp_path / "journal.jsonl.lock").symlink_to("journal.jsonl")
    study = Study(tmp_path)
    assert study.ended() == []
    assert len(Study(tmp_path)) == 2
    study = Study(tmp_path)
    again = study._study.ask()
    assert again.suggest_float("rate", 0.0, 1.0) == first.params["rate"]
    study._study.tell(again, state=stage.optuna.trial.TrialState.FAIL)
    assert study.begin_again(0)
    last = study._study.ask()
    study._study.tell(last, state=stage.optuna.trial.TrialState.FAIL)
    assert not study.begin_again(0)
    (ended,) = study.ended()
    assert (ended.number, ended.failed) == (0, True)
    assert study.table().splitlines()[1] == "0,failed,,0"
