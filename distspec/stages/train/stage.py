"""`distspec train`: store -> checkpoint and registered model.

It trains an autoencoder on the spectra of the store that are not set aside, but for `train.validation` of them, and
prints the table of errors of Sharma et al. for these. By `train.model.kind`:

    dense          hidden layers and their mirror, masked chi-squared
                   (Böhm et al.)
    convolutional  convolutions and pooling, spectra scaled to [0, 1], squared
                   error (Sharma et al.)
    variational    InfoVAE, KL and MMD terms; scored from the mean
                   (Ortiz & Boquien)
    redshifted     attention encoder, rest-frame decoder moved to each
                   redshift; observed frame (spender, Melchior et al.)

Settings that one would change first:

    [train]
    epochs = 80
    model = { kind = "dense", hidden = [590, 100], latents = 10 }
    workers = 4          # processes, or GPUs with gpu = true

    [train.second]       # another network, on what the first one makes of the
    epochs = 40          # spectra: denoised, gaps filled

    [train.density]      # -log p of the latents: the score `density`
    labels = ["class", "subclass"]

With `[train.density]` every spectrum also gets the probability of each class. The density is a sliced flow (`kind =
"sliced"`: no gradient descent, merged over workers) or a neural spline flow (`"spline"`). `labels` conditions it on
the catalogue's classes, which are corrected once by what is likeliest; without labels the sliced flow parts the
latents into groups.

`train.workers` spreads all of it over processes or GPUs; `precision = "bfloat16"` multiplies in 16 bits where that is
safe. A worker whose part of the spectra fits in `train.cache_gb` holds it in memory or on the GPU; else it is streamed
and mixed, in the same order, by `train.readers` threads that read ahead. A training that is killed, or loses a worker,
goes on and ends with the same weights; a loss that is not finite ends it, and nothing is registered. With
`workers = { min = 1, max = 4 }` it goes on with as many workers as are left when a node is lost, and the weights are
the same for any number of them; with a fixed number it waits, and says so, until there is room again.

The checkpoint lies in `models/<digest>` of the output. The model goes to MLflow with its signature, tags that name
the store, and the aliases `newest` and `best`. Settings that were trained already are not trained again; another
setting makes another checkpoint beside it. `score.checkpoint=FOLDER` takes a finished one, and nothing is trained.

In the code: up to three fits follow each other in one group of Ray Train workers (`workers.py`): an autoencoder, the
second one, the density (`density.py`). Each keeps its state, from which a training that was killed goes on, and so does
the next attempt (`attempts.py`) after one that lost a worker. Curves
reach MLflow while it runs, from the driver alone, which follows these states.
"""

import threading
from collections.abc import Iterator

import matplotlib
import numpy as np
import torch
from jaxtyping import Float32
from matplotlib.figure import Figure

from distspec import models
from distspec.addresses import Place, address_of
from distspec.config import Experiment, Train
from distspec.errors import ConfigError
from distspec.files import remove
from distspec.models.autoencoders.redshifted import within_reach
from distspec.models.checkpoint import Checkpoint
from distspec.models.flows.density import classes_of
from distspec.models.training.feed import Feed
from distspec.models.training.loop import Epoch, newest_epochs
from distspec.results.layout import model_folder, output_of
from distspec.runtime.cluster import environment
from distspec.runtime.progress import progress
from distspec.runtime.tracking import Run
from distspec.spectra import Spectra, first_reasons
from distspec.stages.stage import Job, Products, Section, Stage, State, stage_run
from distspec.stages.train.accuracy import as_text
from distspec.stages.train.attempts import train_in_attempts
from distspec.stages.train.section import sections
from distspec.stages.train.workers import TrainingJob, phases_of
from distspec.store import SpectraStore

__all__ = ["TrainStage", "train"]


class TrainStage(Stage):
    """Store -> trained model."""

    name, uses = "train", ("ingest",)

    def off(self, experiment: Experiment) -> str:
        """Nothing is trained where the settings name a model."""
        return "" if experiment.score.checkpoint is None else "score.checkpoint names a model"

    def state(self, job: Job) -> State:
        """Count the epochs of all fits that are whole."""
        experiment = job.experiment
        folder = model_folder(experiment, job.store.digest)
        total = sum(epochs for epochs, _ in phases_of(experiment.train).values())
        if (folder / "model.json").is_file():
            return State(total, total, "epochs")
        state = output_of(experiment) / "training" / folder.name
        done = sum(len(newest_epochs(state / phase)) for phase in phases_of(experiment.train))
        return State(min(done, total - 1), total, "epochs", "no model of these settings" if not done else "interrupted")

    def find(self, job: Job) -> Products:
        """Open the model that the settings name, or the experiment's own.

        Raises:
            CheckpointError: it is damaged, or belongs to other spectra.
        """
        folder = job.experiment.score.checkpoint or model_folder(job.experiment, job.store.digest)
        if job.experiment.score.checkpoint is None and not (address_of(folder) / "model.json").is_file():
            return job.have
        checkpoint = Checkpoint.load(folder)
        checkpoint.require(job.store.grid, job.store.recipe)
        return job.having(checkpoint=checkpoint)

    def make(self, job: Job) -> Products:
        """Train, unless the settings name a model."""
        if job.experiment.score.checkpoint is not None:
            return self.find(job)
        checkpoint = train(job.experiment, job.store)
        checkpoint.require(job.store.grid, job.store.recipe)
        return job.having(checkpoint=checkpoint)

    def told(self, made: Products) -> Iterator[tuple[str, str]]:
        """Name the model."""
        if made.checkpoint is not None:
            yield "model", str(made.checkpoint.folder)

    def sections(self, job: Job) -> Iterator[Section]:
        """Show the model, how its fits went, and the density of its latents."""
        yield from sections(job.checkpoint, job.experiment.report.score)


def train(experiment: Experiment, store: SpectraStore) -> Checkpoint:
    """Train the experiment's model on a store, or load it where that is done.

    Raises:
        ConfigError: no spectrum can be used, the settings do not fit the store, or the loss is not finite.
        CheckpointError: the output cannot be written.
    """
    folder = model_folder(experiment, store.digest)
    if (folder / "model.json").is_file():
        return Checkpoint.load(folder)
    settings = experiment.train
    usable = int((store.column("status") == 0).sum())
    if usable < 2:
        raise ConfigError(
            f"only {usable} of {store.rows} spectra can be used {_reasons(store)}; training needs two at least: loosen "
            "ingest.prepare.cuts or give more spectra"
        )
    _require_columns(settings, store)
    _require_redshifts(settings, store)
    with torch.device("meta"):
        models.build(settings.model, store.grid)  # what does not fit the grid is refused before Ray starts
    lineage = {"store": store.digest, "recipe": store.recipe}
    with stage_run(experiment, store, "train", folder.name, lineage, workers=True) as run:
        state = output_of(experiment) / "training" / folder.name
        _work(experiment, store, state, run)
        checkpoint = Checkpoint.load(state / "model")
        _record(run, checkpoint, experiment, store)
        losses = [epoch["validation_loss"] for epoch in checkpoint.facts["phases"]["first"]]
        facts = {"store": store.digest, "recipe": store.recipe, "sha256": checkpoint.sha256}
        facts["loss"] = f"{settings.model.kind} {settings.loss}"
        inputs = dict.fromkeys(("flux", "ivar"), store.grid.pixels)
        inputs |= {"redshift": 0} if settings.model.kind == "redshifted" else {}
        outputs = {"reconstruction": store.grid.pixels, "latents": checkpoint.latents}
        outputs |= {"density": 0} if checkpoint.density is not None else {}
        run.register(state / "model", facts, min(losses), inputs, outputs)
        run.metrics({"best_validation_loss": min(losses)})
    # Written last: the model's folder exists only when everything else is done.
    checkpoint = checkpoint.save(folder)
    remove(state)
    return checkpoint


def _reasons(store: SpectraStore) -> str:
    reasons = first_reasons(store.column("status"))
    told = ", ".join(f"{count} {reason.lower().replace('_', ' ')}" for reason, count in reasons.items())
    return f"({told})" if told else "(none is set aside)"


def _require_columns(settings: Train, store: SpectraStore) -> None:
    labels = settings.density.labels if settings.density is not None else ()
    used = np.flatnonzero(store.column("status") == 0)
    for name in labels:
        if name not in store.column_names:
            known = ", ".join(sorted(store.column_names))
            raise ConfigError(f"train.density.labels names {name!r}; the store has the columns {known}")
    if labels:
        classes_of([store.column(name, used) for name in labels])  # too many classes are refused before the fits


def _require_redshifts(settings: Train, store: SpectraStore) -> None:
    if settings.model.kind != "redshifted":
        return
    if store.frame != "observed":
        raise ConfigError("a redshifted train.model moves spectra itself; ingest with prepare.frame = 'observed'")
    unknown = int((~np.isfinite(store.column("z")[store.column("status") == 0])).sum())
    if unknown:
        raise ConfigError(
            f"{unknown} usable spectra have no redshift, which a redshifted train.model needs; set them aside by "
            "ingest.prepare.cuts.z_min and z_max"
        )


def _work(experiment: Experiment, store: SpectraStore, state: Place, run: Run) -> None:
    """Run the loop by Ray Train while a thread passes finished epochs on to MLflow."""
    settings = experiment.train
    if not settings.workers and settings.gpu and not torch.cuda.is_available():
        raise ConfigError("train.gpu asks for a GPU and torch sees none on this machine; set train.gpu=false")
    done = threading.Event()
    follower = threading.Thread(target=_follow, args=(state, settings, run, done), daemon=True)
    follower.start()
    runtime = experiment.runtime
    given = tuple(environment(runtime).items())
    job = TrainingJob(store.address, state.resolve(), settings, experiment.seed, runtime.item_seconds, given)
    try:
        train_in_attempts(job, runtime, state)
    finally:
        done.set()
        follower.join()


def _follow(state: Place, settings: Train, run: Run, done: threading.Event) -> None:
    """Pass each epoch of each phase on to the progress bar and to MLflow as soon as its state is whole."""
    phases = phases_of(settings)
    later = {name: list(phases)[place + 1 :] for place, name in enumerate(phases)}

    def finished(phase: str) -> Iterator[Epoch]:
        seen = 0
        while True:
            last = done.is_set() or any((state / name).exists() for name in later[phase])
            history = newest_epochs(state / phase)
            yield from history[seen:]
            seen = len(history)
            if last:
                return
            done.wait(0.5)

    for phase, (epochs, unit) in phases.items():
        prefix = "" if phase == "first" else f"{phase}/"
        logged = run.last_step(f"{prefix}validation_{'log_prob' if unit == 'layer' else 'loss'}") + 1
        for step, epoch in enumerate(progress(finished(phase), epochs, f"train {phase}", unit)):
            if step >= logged:
                run.metrics({f"{prefix}{name}": value for name, value in epoch.items()}, step)


def _record(run: Run, checkpoint: Checkpoint, experiment: Experiment, store: SpectraStore) -> None:
    """Put the curves, the table of errors, examples and chi-squared along wavelength into MLflow."""
    matplotlib.use("Agg")
    run.figure(_curves(checkpoint.facts["phases"]), "curves.png")
    run.text(as_text(checkpoint.facts["accuracy"]) + "\n", "accuracy.txt")
    feed = Feed(store.address, experiment.train, experiment.seed)
    spectra = store.take(np.flatnonzero(feed.validation)[:512])
    flux, ivar = (torch.from_numpy(values) for values in (spectra.flux, spectra.ivar))
    redshift = None if spectra.redshift is None else torch.from_numpy(spectra.redshift).float()
    with torch.inference_mode():
        reconstruction = checkpoint.model(torch.where(ivar > 0, flux, 0.0), ivar, redshift)[0].numpy()
        good = within_reach(checkpoint.model, ivar, redshift).numpy() > 0
    run.figure(_examples(spectra, reconstruction), "reconstructions.png")
    chi2 = np.where(good, spectra.flux - reconstruction, 0.0) ** 2 * spectra.ivar
    along = Figure(figsize=(9, 3.5), layout="constrained")
    axes = along.subplots()
    axes.plot(store.grid.wave, chi2.sum(axis=0) / np.maximum(good.sum(axis=0), 1), lw=0.7)
    axes.axhline(1.0, color="black", lw=0.5)
    axes.set(xlabel="wavelength (Å, vacuum)", ylabel="validation χ² per pixel", yscale="log")
    run.figure(along, "chi2_along_wavelength.png")


def _curves(phases: dict[str, list[Epoch]]) -> Figure:
    """Draw one panel for each fit."""
    figure = Figure(figsize=(5 * len(phases), 4), layout="constrained")
    for axes, (phase, epochs) in zip(np.atleast_1d(figure.subplots(1, len(phases))), phases.items(), strict=True):
        for name in sorted({name for epoch in epochs for name in epoch if name.startswith(("train", "validation"))}):
            axes.plot([epoch.get(name, np.nan) for epoch in epochs], label=name)
        # Losses that fall by decades; a log-likelihood may be negative.
        least = min((value for epoch in epochs for name, value in epoch.items() if "loss" in name), default=0.0)
        axes.set(xlabel="epoch", title=phase, yscale="log" if least > 0 else "linear")
        axes.legend()
    return figure


def _examples(spectra: Spectra, reconstruction: Float32[np.ndarray, "n pixels"]) -> Figure:
    figure = Figure(figsize=(9, 9), layout="constrained")
    shown = min(4, len(spectra))
    for index, axes in enumerate(np.atleast_1d(figure.subplots(shown, 1, sharex=True))):
        axes.plot(spectra.grid.wave, np.where(spectra.good[index], spectra.flux[index], np.nan), lw=0.5, color="gray")
        axes.plot(spectra.grid.wave, reconstruction[index], lw=0.8)
        axes.set_ylabel(f"row {spectra.rows[index]}")
    axes.set_xlabel("wavelength (Å, vacuum)")
    return figure
