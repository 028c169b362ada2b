"""`distspec train`: store -> checkpoint and registered model.

Ray Train runs the same loop in any number of workers, each of which reads its own chunks of the store. The state after
each epoch is a folder that appears whole; a training that was killed goes on from the newest one and ends with the same
weights. Curves reach MLflow while it runs, from the driver alone, which follows these folders.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import ray.train
import ray.train.torch
import torch
from jaxtyping import Bool, Float32, Float64, Int64, UInt64
from matplotlib.figure import Figure
from safetensors.torch import save
from torch import Tensor, nn

from distspec.config import Experiment, Train
from distspec.errors import CheckpointError, ConfigError, DistspecError, ShardError
from distspec.layout import model_folder
from distspec.models.autoencoder import DenseAutoencoder, masked_chi2
from distspec.models.checkpoint import Checkpoint, read_tensors, write_folder
from distspec.reduce import Moments
from distspec.runtime import connect, progress, require_resources
from distspec.spectra import Spectra, first_reasons
from distspec.store import SpectraStore
from distspec.tracking import Run

__all__ = ["Feed", "train"]

_MEAN_SAMPLE = 65_536
"""Spectra that the mean spectrum is taken from, spread evenly over the store."""

_POOL = 16
"""Chunks that are mixed before batches are drawn from them."""

_ABSURD = 1e3
"""Pixels beyond so many times the typical flux do not enter the mean spectrum."""


def train(experiment: Experiment, store: SpectraStore) -> Checkpoint:
    """Train the experiment's model on a store, or load it where that is done.

    Raises:
        ConfigError: no spectrum can be used, or the loss is not finite.
        CheckpointError: the output cannot be written.
    """
    folder = model_folder(experiment, store.digest)
    if (folder / "model.json").is_file():
        return Checkpoint.load(folder)
    feed = Feed(store.path, experiment.train, experiment.seed)
    if not feed.training.any() or not feed.validation.any():
        raise ConfigError(
            f"only {int((store.column('status') == 0).sum())} of {store.rows} spectra can be used "
            f"{_reasons(store)}; training needs two at least: loosen ingest.prepare.cuts or give more spectra"
        )
    lineage = {"store": store.digest, "recipe": store.recipe}
    connect(experiment.runtime, experiment.train.workers)
    with Run(experiment, "train", folder.name, lineage) as run:
        run.reads(experiment.name, store.digest, store.path)
        state = Path(experiment.output) / "training" / folder.name
        epochs = _fit(experiment, store, state, run)
        checkpoint = _finish(experiment, store, state, epochs)
        _record(run, checkpoint, epochs, feed, store)
        checkpoint = checkpoint.save(state / "finished")
        facts = {"store": store.digest, "recipe": store.recipe, "sha256": checkpoint.sha256}
        run.register(state / "finished", facts)
        run.metrics({"best_validation_chi2": min(epoch["validation_chi2"] for epoch in epochs)})
    # Written last: the model's folder exists only when everything else is done.
    checkpoint = checkpoint.save(folder)
    shutil.rmtree(state, ignore_errors=True)
    return checkpoint


def _reasons(store: SpectraStore) -> str:
    reasons = first_reasons(store.column("status"))
    told = ", ".join(f"{count} {reason.lower().replace('_', ' ')}" for reason, count in reasons.items())
    return f"({told})" if told else "(none is set aside)"


@dataclass(frozen=True)
class Job:
    """What a training worker needs; small and picklable."""

    store: str
    state: str
    settings: Train
    seed: int


def _fit(experiment: Experiment, store: SpectraStore, state: Path, run: Run) -> list[dict[str, float]]:
    """Run the loop by Ray Train while a thread passes finished epochs on to MLflow; give all epochs."""
    settings = experiment.train
    if settings.workers:
        require_resources("train.workers", settings.workers, settings.workers * settings.gpu)
    elif settings.gpu and not torch.cuda.is_available():
        raise ConfigError("train.gpu asks for a GPU and torch sees none on this machine; set train.gpu=false")
    done = threading.Event()
    follower = threading.Thread(target=_follow, args=(state, settings.epochs, run, done), daemon=True)
    follower.start()
    resources = {"GPU": 1.0} if settings.gpu else {"CPU": 1.0}
    trainer = ray.train.torch.TorchTrainer(
        _loop,
        train_loop_config={"job": Job(store.address, str(state.resolve()), settings, experiment.seed)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers, use_gpu=settings.gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=state.name,
            storage_path=str((state.parent / "ray").resolve()),
            failure_config=ray.train.FailureConfig(max_failures=2),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    finally:
        done.set()
        follower.join()
    return _newest(state)[1]


def _cause(error: Exception) -> DistspecError:
    """Find our own error among the failures of the workers."""
    failures = list(getattr(error, "worker_failures", {}).values())
    for failure in failures:
        inner = getattr(failure, "cause", failure)
        if isinstance(inner, DistspecError):
            return inner
    return ShardError(f"training failed: {str(failures[0] if failures else error).strip().splitlines()[-1]}")


def _follow(state: Path, epochs: int, run: Run, done: threading.Event) -> None:
    """Pass each epoch on to the progress bar and to MLflow as soon as its state is whole."""
    logged = run.last_step("validation_chi2") + 1

    def finished() -> Iterator[dict[str, float]]:
        seen = 0
        while True:
            last = done.is_set()
            history = _newest(state)[1]
            yield from history[seen:]
            seen = len(history)
            if last:
                return
            done.wait(0.5)

    for step, epoch in enumerate(progress(finished(), epochs, "train", "epoch")):
        if step >= logged:
            run.metrics(epoch, step)


def _newest(state: Path) -> tuple[Path | None, list[dict[str, float]]]:
    """Find the last whole epoch: its folder and the numbers of all epochs up to it."""
    for folder in sorted(state.glob("epoch-*"), reverse=True):
        try:
            text = json.loads((folder / "state.json").read_bytes())
            # A truncated file from a failing disk must not stop a training that has an older whole state.
            for name, sha256 in text["sha256"].items():
                if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
                    raise ValueError(f"{name} is damaged")
        except (OSError, ValueError, KeyError):
            continue
        return folder, text["epochs"]
    return None, []


def _loop(config: dict[str, Any]) -> None:
    """Train in one worker; rank 0 keeps the state."""
    job: Job = config["job"]
    settings = job.settings
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), max(context.get_world_size(), 1)
    device = ray.train.torch.get_device()
    torch.manual_seed(job.seed)
    feed = Feed(job.store, settings, job.seed, rank, world)
    core = DenseAutoencoder(settings.model, feed.store.grid.pixels)
    core.mean, core.scale = feed.center()
    model = ray.train.torch.prepare_model(core) if world > 1 else core.to(device)
    optimizer = torch.optim.Adam(core.parameters(), lr=settings.learning_rate)
    start, epochs, best = _resume(Path(job.state), core, optimizer)
    stopper = _Stopper(settings.patience, epochs)
    for epoch in range(start, settings.epochs):
        if stopper.stop:
            break
        torch.manual_seed(job.seed * 1_000_003 + epoch)  # dropout of a resumed epoch is that of an unbroken run
        loss = _train_epoch(model, optimizer, feed, epoch, device)
        chi2 = _validate(core, feed, device)
        if not (np.isfinite(loss) and np.isfinite(chi2)):
            raise ConfigError(
                f"the loss is not finite in epoch {epoch}; lower train.learning_rate (now {settings.learning_rate})"
            )
        rate = optimizer.param_groups[0]["lr"]
        epochs.append({"train_chi2": loss, "validation_chi2": chi2, "learning_rate": rate})
        if stopper.better(chi2):
            best = {name: tensor.detach().cpu().clone() for name, tensor in core.state_dict().items()}
        if rank == 0:
            _keep(Path(job.state), epoch, core, best, optimizer, epochs)
        ray.train.report({"validation_chi2": chi2})


class _Stopper:
    """Stops when the validation loss has not improved for some epochs."""

    def __init__(self, patience: int, epochs: list[dict[str, float]]) -> None:
        self._patience = patience
        self._best = np.inf
        self._since = 0
        for epoch in epochs:
            self.better(epoch["validation_chi2"])

    def better(self, loss: float) -> bool:
        """Note a loss and tell whether it is the best so far."""
        self._since = 0 if loss < self._best else self._since + 1
        self._best = min(self._best, loss)
        return self._since == 0

    @property
    def stop(self) -> bool:
        return self._since >= self._patience


def _train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, feed: "Feed", epoch: int, device: torch.device
) -> float:
    """Do one pass; give the mean chi-squared per pixel over this worker's batches, averaged over workers."""
    settings = feed.settings
    model.train()
    total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for step, (flux, ivar) in enumerate(feed.batches(epoch)):
        done = (epoch * feed.steps + step) / (settings.epochs * feed.steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate + (settings.final_learning_rate - settings.learning_rate) * done
        flux, ivar = flux.to(device), ivar.to(device)
        optimizer.zero_grad(set_to_none=True)
        chi2, pixels = masked_chi2(flux, ivar, model(flux, ivar)[0])
        loss = chi2 / pixels.clamp_min(1)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += chi2.detach().double().cpu()
        count += pixels.cpu()
    return _mean_over_workers(total, count)


@torch.no_grad()
def _validate(model: DenseAutoencoder, feed: "Feed", device: torch.device) -> float:
    """Give chi-squared per pixel over the whole validation set."""
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for flux, ivar in feed.validation_batches():
        flux, ivar = flux.to(device), ivar.to(device)
        chi2, pixels = masked_chi2(flux, ivar, model(flux, ivar)[0])
        total += chi2.double().cpu()
        count += pixels.cpu()
    return _mean_over_workers(total, count)


def _mean_over_workers(total: Tensor, count: Tensor) -> float:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        pair = torch.stack([total, count]).to(ray.train.torch.get_device())
        torch.distributed.all_reduce(pair)
        total, count = pair.cpu()
    return float(total / count.clamp_min(1))


def _keep(
    state: Path,
    epoch: int,
    model: nn.Module,
    best: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    epochs: list[dict[str, float]],
) -> None:
    """Write the state after an epoch; the two newest stay, so that a damaged one costs an epoch and not the run."""
    moments = {
        f"{index}.{name}": value.detach().cpu().clone()
        for index, slot in optimizer.state_dict()["state"].items()
        for name, value in slot.items()
    }
    weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    files = {"model.safetensors": save(weights), "best.safetensors": save(best), "optimizer.safetensors": save(moments)}
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files["state.json"] = json.dumps({"epochs": epochs, "sha256": sha256}).encode()
    write_folder(state / f"epoch-{epoch:04d}", files)
    for old in sorted(state.glob("epoch-*"))[:-2]:
        for path in old.iterdir():
            path.unlink()
        old.rmdir()


def _resume(
    state: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, float]], dict[str, Tensor]]:
    """Load the newest whole state, if there is one: next epoch, numbers so far, best weights."""
    folder, epochs = _newest(state)
    if folder is None:
        return 0, [], {}
    sha256 = json.loads((folder / "state.json").read_bytes())["sha256"]
    tensors = {name: read_tensors(folder / name, sha256[name]) for name in sha256}
    model.load_state_dict(tensors["model.safetensors"])
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors["optimizer.safetensors"].items():
        index, _, name = key.partition(".")
        slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return len(epochs), epochs, tensors["best.safetensors"]


def _finish(experiment: Experiment, store: SpectraStore, state: Path, epochs: list[dict[str, float]]) -> Checkpoint:
    """Make the checkpoint from the best weights of the newest state."""
    folder = _newest(state)[0]
    if folder is None:
        raise CheckpointError(f"training left no state in {state}; run it again")
    model = DenseAutoencoder(experiment.train.model, store.grid.pixels)
    sha256 = json.loads((folder / "state.json").read_bytes())["sha256"]["best.safetensors"]
    model.load_state_dict(read_tensors(folder / "best.safetensors", sha256))
    facts = {"epochs": epochs, "store": store.digest, "torch": torch.__version__}
    return Checkpoint(model.eval(), experiment.train.model, store.grid, store.recipe, facts)


class Feed:
    """The training spectra of a store, read chunk by chunk and mixed; each worker sees its own share.

    The validation set is drawn by a hash of the row, so that it does not depend on shards or workers. Chunks come in a
    new order every epoch, sixteen are mixed at a time, and the next sixteen are read meanwhile.

    Arguments:
        path: of the store.
        settings: batch size, validation share, cache.
        seed: of the validation set and of the order.
        rank: of this worker.
        world: number of workers.
    """

    def __init__(self, path: str, settings: Train, seed: int, rank: int = 0, world: int = 1) -> None:
        self.store = SpectraStore.open(path)
        self.settings = settings
        self._seed = seed
        self._rank, self._world = rank, world
        usable = self.store.column("status") == 0
        held = _held(_hash(np.arange(self.store.rows, dtype=np.uint64), seed), usable, settings.validation)
        self.training: Bool[np.ndarray, "rows"] = usable & ~held
        self.validation: Bool[np.ndarray, "rows"] = usable & held
        self._batch = max(1, min(settings.batch, int(self.training.sum())) // world)
        self.steps = max(1, int(self.training.sum()) // (self._batch * world))
        chunk = self.store.chunk_rows
        # A chunk never crosses a shard: shards are whole numbers of chunks.
        self._chunks = [(start, min(start + chunk, self.store.rows)) for start in range(0, self.store.rows, chunk)]
        self._cache: dict[int, tuple[Float32[np.ndarray, "n pixels"], ...]] = {}
        self._cache_left = settings.cache_gb * 1e9 / world

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Give this worker's batches of flux and ivar; every worker gives the same number."""
        rng = np.random.default_rng([self._seed, epoch, self._rank])
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._chunks))
        # A worker whose chunks were all set aside would never fill a batch, and the others would wait for it.
        order = order[[bool(self.training[slice(*self._chunks[index])].any()) for index in order]]
        mine = order[self._rank :: self._world]
        if len(mine) == 0:
            mine = order
        left = self.steps
        flux, ivar = (np.zeros((0, self.store.grid.pixels), np.float32) for _ in range(2))
        with ThreadPoolExecutor(1) as reader:
            pools = self._pools(mine)
            coming = reader.submit(self._pool, next(pools), self.training)
            while left:
                new = coming.result()
                # Workers whose share is short begin it again, so that no worker waits for another's gradients.
                coming = reader.submit(self._pool, next(pools), self.training)
                mixed = rng.permutation(len(flux) + len(new[0]))
                flux, ivar = (np.concatenate(pair)[mixed] for pair in ((flux, new[0]), (ivar, new[1])))
                while left and len(flux) >= self._batch:
                    yield torch.from_numpy(flux[: self._batch]), torch.from_numpy(ivar[: self._batch])
                    flux, ivar = flux[self._batch :], ivar[self._batch :]
                    left -= 1

    def validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give this worker's share of the validation set, in the store's order."""
        for index in range(self._rank, len(self._chunks), self._world):
            flux, ivar = self._pool([index], self.validation)
            yield torch.from_numpy(flux), torch.from_numpy(ivar)

    def center(self) -> tuple[Float32[Tensor, "pixels"], Float32[Tensor, "pixels"]]:
        """Give the mean spectrum of the training set and the scale that the model divides by.

        The same in every worker. A pixel far beyond the typical flux is left out: one cosmic ray of 1e30 in a million
        spectra would otherwise be the mean.
        """
        moments = Moments.zero(self.store.grid.pixels)
        wanted = max(1, _MEAN_SAMPLE // self.store.chunk_rows)
        step = max(1, len(self._chunks) // wanted)
        for index in range(0, len(self._chunks), step):
            flux, ivar = self._pool([index], self.training)
            if (ivar > 0).any():
                typical = np.median(np.abs(flux[ivar > 0]))
                moments += Moments.of(flux, (ivar > 0) & (np.abs(flux) <= _ABSURD * typical))
        mean = torch.from_numpy(moments.mean.astype(np.float32))
        if self.settings.model.scale == "unit":
            return mean, torch.ones_like(mean)
        # A mean near zero (no signal there) must not blow up noise; a thousandth of the typical level is the floor.
        return mean, mean.abs().clamp_min(1e-3 * float(mean.abs().median()) or 1.0)

    def _pools(self, mine: Int64[np.ndarray, "n"]) -> Iterator[list[int]]:
        while True:
            for start in range(0, len(mine), _POOL):
                yield [int(index) for index in mine[start : start + _POOL]]

    def _pool(
        self, indices: list[int], chosen: Bool[np.ndarray, "rows"]
    ) -> tuple[Float32[np.ndarray, "n pixels"], Float32[np.ndarray, "n pixels"]]:
        """Read chunks and keep the chosen spectra; masked pixels are set to zero."""
        parts = []
        for index in indices:
            start, stop = self._chunks[index]
            keep = chosen[start:stop]
            parts.append([values[keep] for values in self._read(index)])
        flux, ivar = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        return np.where(ivar > 0, flux, np.float32(0)), ivar

    def _read(self, index: int) -> tuple[Float32[np.ndarray, "n pixels"], ...]:
        if index in self._cache:
            return self._cache[index]
        start, stop = self._chunks[index]
        chunk = tuple(self.store.base.read(field, start, stop) for field in ("flux", "ivar"))
        size = sum(values.nbytes for values in chunk)
        if size <= self._cache_left:
            self._cache[index] = chunk
            self._cache_left -= size
        return chunk


def _held(draw: Float64[np.ndarray, "n"], usable: Bool[np.ndarray, "rows"], share: float) -> Bool[np.ndarray, "rows"]:
    """Choose the validation set: the rows drawn below its share, and of few spectra one at least on either side."""
    held = draw < share
    candidates = np.flatnonzero(usable)
    if len(candidates) >= 2:
        held[candidates[np.argmin(draw[candidates])]] = True
        held[candidates[np.argmax(draw[candidates])]] = False
    return held


def _hash(rows: UInt64[np.ndarray, "n"], seed: int) -> Float64[np.ndarray, "n"]:
    """Give each row a number in [0, 1) that looks random (splitmix64 of row and seed)."""
    with np.errstate(over="ignore"):
        mixed = rows * np.uint64(0x9E3779B97F4A7C15) + np.uint64((seed * 0xD1342543DE82EF95 + 1) % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))).astype(np.float64) / 2.0**64


def _record(run: Run, checkpoint: Checkpoint, epochs: list[dict[str, float]], feed: Feed, store: SpectraStore) -> None:
    """Put the curves, examples of reconstructions and chi-squared along wavelength into MLflow."""
    matplotlib.use("Agg")
    curves = Figure(figsize=(7, 4), layout="constrained")
    axes = curves.subplots()
    for name in ("train_chi2", "validation_chi2"):
        axes.plot([epoch[name] for epoch in epochs], label=name.replace("_chi2", ""))
    axes.set(xlabel="epoch", ylabel="χ² per pixel", yscale="log")
    axes.legend()
    run.figure(curves, "curves.png")
    rows = np.flatnonzero(feed.validation)[:512]
    spectra = store.take(rows)
    flux, ivar = (torch.from_numpy(values) for values in (spectra.flux, spectra.ivar))
    with torch.inference_mode():
        reconstruction = checkpoint.model(torch.where(ivar > 0, flux, 0.0), ivar)[0].numpy()
    run.figure(_examples(spectra, reconstruction), "reconstructions.png")
    good = spectra.good
    chi2 = np.where(good, spectra.flux - reconstruction, 0.0) ** 2 * spectra.ivar
    along = Figure(figsize=(9, 3.5), layout="constrained")
    axes = along.subplots()
    axes.plot(store.grid.wave, chi2.sum(axis=0) / np.maximum(good.sum(axis=0), 1), lw=0.7)
    axes.axhline(1.0, color="black", lw=0.5)
    axes.set(xlabel="wavelength (Å, vacuum)", ylabel="validation χ² per pixel", yscale="log")
    run.figure(along, "chi2_along_wavelength.png")


def _examples(spectra: Spectra, reconstruction: Float32[np.ndarray, "n pixels"]) -> Figure:
    figure = Figure(figsize=(9, 9), layout="constrained")
    shown = min(4, len(spectra))
    for index, axes in enumerate(np.atleast_1d(figure.subplots(shown, 1, sharex=True))):
        axes.plot(spectra.grid.wave, np.where(spectra.good[index], spectra.flux[index], np.nan), lw=0.5, color="gray")
        axes.plot(spectra.grid.wave, reconstruction[index], lw=0.8)
        axes.set_ylabel(f"row {spectra.rows[index]}")
    axes.set_xlabel("wavelength (Å, vacuum)")
    return figure
