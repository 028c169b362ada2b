"""`distspec tune`: store -> settings that train well.

It tries settings of `train` in many short trainings and writes the best as `tuned.toml` beside the store. `distspec
run` leaves it out; afterwards go on with what it found:

    distspec tune sdss.toml
    distspec run sdss-run/tuned.toml

It searches depth, units, latents (channels of the convolutional kind), dropout, learning rates, decay, optimizer and
batch in the ranges of Böhm et al. A range of equal ends fixes a value, `false` leaves that of `train`:

    [tune]
    trials = 50          # the paper took about 1,500
    epochs = 10          # of a trial, at most
    spectra = 40_000     # of a trial, at most
    latents = [10, 10]
    optimizer = false

A trial trains the experiment's own kind of model. Its loss is the smallest validation loss of its epochs, over the
same spectra in every trial; hopeless trials are stopped early (`grace_epochs`, `reduction`). `concurrent` trials run
at a time, each on a core, or on a GPU with `train.gpu`. Each is a nested run in MLflow. The line `tuned` tells the
smallest loss and its trial, the line `trials` the table of all of them.

The same command goes on after an interruption, and with a larger `tune.trials` it adds trials. Other ranges, or
another store, begin another search.

In the code: Ray Tune runs the trials, Optuna proposes them from `space.py`, and successive halving ends the hopeless
ones. All that is known of a search is Optuna's journal (`study.py`): a search that was killed goes on from it, and
every unfinished trial from its last epoch. What Ray itself keeps is never read again.
"""

import logging
import math
import os
import queue
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import optuna
import ray
import ray.tune
import torch
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from distspec import models
from distspec.addresses import Place
from distspec.config import Experiment, Needs, Train, dump
from distspec.errors import ConfigError, ShardError
from distspec.files import remove, write_file
from distspec.models.training.feed import Feed
from distspec.results.layout import tuned_path, tuning_folder
from distspec.runtime.cluster import connect, environment, require_resources
from distspec.runtime.progress import progress
from distspec.runtime.tracking import Run
from distspec.stages.stage import Job, Products, Stage, State, Tuned, stage_run
from distspec.stages.tune.space import Chooser, Least, Space
from distspec.stages.tune.study import JOURNAL, NAME, Study, number_of
from distspec.stages.tune.workers import TrialJob, run_trial
from distspec.store import SpectraStore

__all__ = ["TuneStage", "tune"]

_OWN = ("trial", "settings")
"""Entries of a trial's configuration that are none of its parameters."""


class TuneStage(Stage):
    """Store -> settings with which `train` does best."""

    name, uses = "tune", ("ingest",)
    in_run = False

    def state(self, job: Job) -> State:
        """Count the trials that have ended."""
        folder, total = _plan(job.experiment, job.store).folder, job.experiment.tune.trials
        if not (folder / "trials.csv").is_file():  # written last
            return State(0, total, "trials", "interrupted" if (folder / JOURNAL).is_file() else "no search yet")
        done = min(len((folder / "trials.csv").read_text("utf-8").splitlines()) - 1, total)
        return State(done, total, "trials", "" if done == total else "more trials are asked for")

    def make(self, job: Job) -> Products:
        """Search for settings, or go on with the search."""
        return job.having(tuned=tune(job.experiment, job.store))

    def told(self, made: Products) -> Iterator[tuple[str, str]]:
        """Name the settings file and the table of trials."""
        best = made.tuned
        if best is not None:
            failed = f", {best.failed} failed" if best.failed else ""
            yield "tuned", f"{best.path}: validation loss {best.loss:.6g}, trial {best.trial}"
            yield "trials", f"{best.trials} in {best.table}{failed}"


@dataclass(frozen=True)
class _Plan:
    """A search before it begins.

    Arguments:
        space: what is searched.
        base: settings of every trial, without its own values.
        folder: of the study.
    """

    space: Space
    base: Train
    folder: Place


def _plan(experiment: Experiment, store: SpectraStore) -> _Plan:
    """Say what is searched, and where the study lies.

    Raises:
        ConfigError: no spectrum can be used, or the settings do not fit the store.
    """
    settings = experiment.tune
    usable = int((store.column("status") == 0).sum())
    if usable < 2:
        raise ConfigError(f"only {usable} of {store.rows} spectra can be used; tuning needs two at least")
    feed = Feed(store.address, experiment.train, experiment.seed, limit=settings.spectra)
    # Every trial has the same number of epochs; only the halving ends it sooner.
    base = experiment.train.model_copy(update={"epochs": settings.epochs, "patience": settings.epochs})
    space = Space(settings, base, store.grid.pixels, int(feed.training.sum()))
    least = space(Least())
    with torch.device("meta"):
        models.build(least.model, store.grid)  # what does not fit the grid is refused before Ray starts
    folder = tuning_folder(experiment, least, store.digest)
    return _Plan(space, base, folder)


def tune(experiment: Experiment, store: SpectraStore) -> Tuned:
    """Search for settings of training, or go on with the search, and write the best as a settings file.

    A trial's loss is the smallest validation loss of its epochs, over the same spectra in every trial.

    Raises:
        ConfigError: no spectrum can be used, the settings do not fit the store or the cluster, or no trial came to a
            finite loss.
        ShardError: the store or the output fails.
    """
    plan, settings = _plan(experiment, store), experiment.tune
    space, folder = plan.space, plan.folder
    study = Study(folder)
    table = folder / "trials.csv"
    if len(study.ended()) < settings.trials or not _is(table, study.table()):
        job = TrialJob(store.address, (folder / "states").resolve(), plan.base, experiment.seed, settings.spectra)
        lineage = {"store": store.digest, "recipe": store.recipe}
        with stage_run(experiment, store, "tune", folder.name, lineage) as run:
            _search(Search(experiment, job, space, study, run))
            run.text(study.table(), "trials.csv")
            run.text(_settings(experiment, space, study), "tuned.toml")
            run.metrics({"best_validation_loss": study.best().loss, "best_trial": study.best().number}, settings.trials)
        _replace(table, study.table())  # written last: it says that the study is done
    path, best, ended = tuned_path(experiment), study.best(), study.ended()
    _replace(path, _settings(experiment, space, study))
    return Tuned(path, best.number, best.loss, len(ended), sum(trial.failed for trial in ended), table)


def _settings(experiment: Experiment, space: Space, study: Study) -> str:
    """Write the experiment with the best trial's values in the place of those of `train`."""
    best = study.best()
    found = space(optuna.trial.FixedTrial(best.params))
    kept = {"epochs": experiment.train.epochs, "patience": experiment.train.patience}
    tuned = experiment.model_copy(update={"train": found.model_copy(update=kept)})
    said = f"trial {best.number}, best of {len(study.ended())}, with validation loss {best.loss:.6g}"
    return f"# distspec tune: {said} after {len(best.losses)} epochs on {space.spectra} spectra\n{dump(tuned)}"


def _is(path: Place, content: str) -> bool:
    return path.is_file() and path.read_text("utf-8") == content


def _replace(path: Place, content: str) -> None:
    """Write a file whole, unless it holds this already."""
    if _is(path, content):
        return
    write_file(path, content)


@dataclass(frozen=True)
class Search:
    """One study and what it is followed by."""

    experiment: Experiment
    job: TrialJob
    space: Space
    study: Study
    run: Run


def _search(search: Search) -> None:
    """Run trials until enough have ended; a trial whose worker died may ask for another round."""
    trials, study = search.experiment.tune.trials, search.study
    reasons: list[str] = []
    with _bar(trials, len(study.ended())) as ended:
        while (left := trials - len(study.ended())) > 0:
            connect(search.experiment.runtime)
            follower = _Follower(search, ended)
            try:
                # What Ray keeps of a search is of no use to us: the study is the journal.
                with _quiet(), tempfile.TemporaryDirectory(prefix="distspec-ray-") as scratch:
                    _tuner(search, left, scratch, follower).fit()
            except ray.tune.TuneError as error:
                # Ray makes one of its own of whatever a callback raises.
                last = str(error).strip().splitlines()[-1]
                raise follower.fatal or ShardError(f"the search failed: {last}") from error
            finally:
                follower.leave()
            reasons += follower.reasons
    if reasons and all(trial.failed for trial in study.ended()):
        raise ConfigError(f"no trial came to a finite loss; the last one failed so: {reasons[-1]}")
    remove(search.job.state)


def _tuner(search: Search, left: int, scratch: str, follower: "_Follower") -> ray.tune.Tuner:
    settings, gpu = search.experiment.tune, search.job.settings.gpu
    slots = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 0))
    concurrent = settings.concurrent or max(1, slots)
    require_resources("tune.concurrent", Needs(concurrent, concurrent * gpu))
    # A sampler that began with the same seed after each interruption would draw the same trials again.
    seed = (search.experiment.seed * 1_000_003 + len(search.study)) % 2**32
    searcher = OptunaSearch(
        partial(_propose, space=search.space),
        metric="loss",
        mode="min",
        sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True),
        study_name=NAME,
        storage=search.study.storage,
    )
    job = replace(search.job, variables=tuple(environment(search.experiment.runtime).items()))

    def trial(config: dict[str, Any]) -> None:
        run_trial(config, job)

    return ray.tune.Tuner(
        ray.tune.with_resources(trial, {"CPU": 1, "GPU": 1} if gpu else {"CPU": 1}),
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=_halving(search),
            num_samples=left,
            max_concurrent_trials=min(concurrent, left),
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=ray.tune.RunConfig(name="study", storage_path=scratch, verbose=0, callbacks=[follower]),
    )


def _propose(trial: Any, space: Space) -> dict[str, Any]:
    """Draw a trial for Ray Tune: beside its parameters, the settings that they make."""
    chooser: Chooser = trial
    return {"trial": number_of(trial), "settings": space(chooser).model_dump_json()}


def _halving(search: Search) -> ASHAScheduler:
    """Make the scheduler, and tell it of all trials that it would know of had the study never been interrupted."""
    settings = search.experiment.tune
    scheduler = ASHAScheduler(
        metric="halving",
        mode="min",
        max_t=settings.epochs,
        grace_period=min(settings.grace_epochs, settings.epochs),
        reduction_factor=settings.reduction,
    )
    for trial in search.study.ended():
        past = SimpleNamespace(trial_id=f"past-{trial.number}")
        scheduler.on_trial_add(None, past)
        for epoch, loss in enumerate(trial.losses):
            scheduler.on_trial_result(None, past, {"training_iteration": epoch + 1, "halving": loss})
    return scheduler


class _Follower(ray.tune.Callback):  # type: ignore[misc]
    """Passes every trial on to MLflow as a nested run, and to the progress bar."""

    def __init__(self, search: Search, ended: Callable[[], None]) -> None:
        self._search = search
        self._ended = ended
        self._runs: dict[str, tuple[Run, int]] = {}
        self.reasons: list[str] = []
        self.fatal: ShardError | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray keeps a copy of its settings on disk; open connections are no part of it.
        return (ray.tune.Callback, ())

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Open its run."""
        params = {name: value for name, value in trial.config.items() if name not in _OWN}
        run = self._search.run.nested(f"trial-{trial.config['trial']:05d}", params)
        self._runs[trial.trial_id] = run, run.last_step("validation_loss")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record an epoch; what would befall every other trial too ends the study."""
        run, last = self._runs[trial.trial_id]
        if "failure" in result:
            self.reasons.append(result["failure"])
            if result["fatal"]:
                self.fatal = ShardError(f"trial {trial.config['trial']}: {result['failure']}")
                raise self.fatal
            return
        step = result["training_iteration"] - 1
        if step > last:
            run.metrics({name: result[name] for name in result["recorded"]}, step)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Close its run."""
        failure = (trial.last_result or {}).get("failure", "")
        self._runs.pop(trial.trial_id)[0].end("FAILED" if failure else "FINISHED", failure)
        self._forget(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Try a trial again whose worker died: errors of its own come as results."""
        again = self._search.study.begin_again(trial.config["trial"])
        reason = "" if again else "its worker died, again and again"
        if trial.trial_id in self._runs:
            self._runs.pop(trial.trial_id)[0].end("FAILED", reason)
        if not again:
            self.reasons.append(reason)
            self._forget(trial)

    def _forget(self, trial: Any) -> None:
        study = self._search.study
        remove(self._search.job.state / f"{trial.config['trial']:05d}")
        best = min((past.loss for past in study.ended()), default=math.inf)
        if math.isfinite(best):
            self._search.run.metrics({"best_validation_loss": best}, len(study.ended()))
        self._ended()

    def leave(self) -> None:
        """Close what an exception has left open."""
        for run, _ in self._runs.values():
            run.end("KILLED")


@contextmanager
def _bar(total: int, done: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar that moves whenever the function that it gives is called."""
    ended: queue.Queue[bool] = queue.Queue()
    for _ in range(done):
        ended.put(True)
    bar = threading.Thread(
        target=lambda: [None for _ in progress(iter(ended.get, False), total, "tune", "trial")], daemon=True
    )
    bar.start()
    try:
        yield lambda: ended.put(True)
    finally:
        ended.put(False)
        bar.join()


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave the screen, the signals and the folder to us."""
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    os.environ["TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S"] = "0"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        warnings.simplefilter("ignore")  # of Ray and Optuna, for their developers
        yield
