"""What Ray Train adds to a training, how long the model waits for data, and what a second worker changes.

Run by hand: `python tests/bench/train_overhead.py --keep /tmp/bench`; README.md here says what is measured.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient

from distspec.config import Experiment, load
from distspec.models.autoencoders.dense import DenseAutoencoder, masked_chi2
from distspec.models.training.feed import Feed
from distspec.models.training.loop import Reconstruction, fit
from distspec.runtime.cluster import connect
from distspec.runtime.tracking import tracking_uri
from distspec.stages.ingest.stage import ingest
from distspec.stages.train.stage import train
from distspec.store import SpectraStore

LEFT_OUT = 1
"""First epochs of each form, which read the store and warm up."""


def main() -> None:
    """Train in all forms, in turns, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spectra", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--keep", help="folder for the store; none removes it")
    parser.add_argument("--json")
    options = parser.parse_args()
    folder = Path(options.keep or tempfile.mkdtemp(prefix="distspec-bench-"))
    # What Ray gives a worker of one core; all forms get the same.
    torch.set_num_threads(1)
    try:
        report = measure(options, folder)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(report, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


def settings(options: argparse.Namespace, folder: Path, output: str, *overrides: str) -> Experiment:
    given = [
        f"output={folder / output}",
        f"ingest.store={folder / f'store-{options.spectra}.zarr'}",
        "ingest.source.kind=simulate",
        f"ingest.source.spectra={options.spectra}",
        "ingest.prepare.dust.kind=column",
        "ingest.shard_rows=4096",
        f"train.epochs={options.epochs}",
        "train.patience=1000",
        "train.schedule=constant",
    ]
    return load(None, [*given, *overrides])


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Take turns; each form trains the same network on the same spectra."""
    first = settings(options, folder, "ingest")
    Path(first.output).mkdir(parents=True, exist_ok=True)
    connect(first.runtime)
    store = ingest(first)
    forms: dict[str, list[dict[str, float]]] = {}
    for turn in range(options.repeat):
        memory = first
        streamed = settings(options, folder, "ingest", "train.cache_gb=0")
        took = {
            "plain torch": plain(memory, store),
            "the loop alone": alone(memory, store, folder / f"alone-{turn}"),
            "Ray Train, one worker": by_ray(options, folder, f"one-{turn}", store, "train.workers=1"),
            "the loop alone, streamed": alone(streamed, store, folder / f"streamed-{turn}"),
            "Ray Train, two workers": by_ray(options, folder, f"two-{turn}", store, "train.workers=2"),
        }
        for name, numbers in took.items():
            forms.setdefault(name, []).append(numbers)
    base, loop = (forms[name] for name in ("plain torch", "the loop alone"))
    ray = forms["Ray Train, one worker"]
    ratio = [one["seconds"] / other["seconds"] for one, other in zip(ray, loop, strict=True)]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg(), "torch": torch.__version__},
        "spectra": store.rows,
        "forms": forms,
        "ray_over_loop": {"median": statistics.median(ratio), "turns": ratio},
        "loop_over_plain": [one["seconds"] / other["seconds"] for one, other in zip(loop, base, strict=True)],
    }


def steady(seconds: list[float]) -> float:
    return statistics.median(seconds[LEFT_OUT:])


def plain(experiment: Experiment, store: SpectraStore) -> dict[str, float]:
    """Train as one would by hand: everything in memory, a new permutation every epoch, nothing kept."""
    feed = Feed(store.path, experiment.train, experiment.seed)
    flux, ivar = (torch.from_numpy(store.base.read(name)[feed.training]) for name in ("flux", "ivar"))
    flux[ivar <= 0] = 0
    held, weight = (torch.from_numpy(store.base.read(name)[feed.validation]) for name in ("flux", "ivar"))
    held[weight <= 0] = 0
    torch.manual_seed(0)
    model = DenseAutoencoder(experiment.train.model, store.grid)  # type: ignore[arg-type]
    model.settle(feed.mean())
    optimizer = torch.optim.Adam(model.parameters(), lr=experiment.train.learning_rate)
    seconds, chi2 = [], 0.0
    for _ in range(experiment.train.epochs):
        begun = time.perf_counter()
        for index in torch.randperm(len(flux)).split(feed.batch)[: feed.steps]:
            optimizer.zero_grad()
            total, count = masked_chi2(flux[index], ivar[index], model(flux[index], ivar[index])[0])
            (total / count).backward()
            optimizer.step()
        with torch.no_grad():
            total, count = masked_chi2(held, weight, model(held, weight)[0])
            chi2 = float(total / count)
        seconds.append(time.perf_counter() - begun)
    return {"seconds": steady(seconds), "validation_loss": chi2}


def alone(experiment: Experiment, store: SpectraStore, state: Path) -> dict[str, float]:
    """Train by the project's own loop in this process, without Ray."""
    shutil.rmtree(state, ignore_errors=True)
    feed = Feed(store.path, experiment.train, experiment.seed)
    torch.manual_seed(experiment.seed)
    model = DenseAutoencoder(experiment.train.model, store.grid)  # type: ignore[arg-type]
    model.settle(feed.mean())
    objective = Reconstruction(model, "chi2")
    epochs = fit(model, objective, feed, experiment.train, state, experiment.seed)
    return summary(epochs)


def by_ray(
    options: argparse.Namespace, folder: Path, name: str, store: SpectraStore, *overrides: str
) -> dict[str, float]:
    """Train by `distspec train` and read the epochs' numbers from MLflow."""
    shutil.rmtree(folder / name, ignore_errors=True)
    experiment = settings(options, folder, name, *overrides)
    Path(experiment.output).mkdir(parents=True)
    begun = time.perf_counter()
    train(experiment, store)
    whole = time.perf_counter() - begun
    client = MlflowClient(tracking_uri(experiment))
    found = client.get_experiment_by_name(experiment.name)
    run = client.search_runs([found.experiment_id])[0]
    columns = {
        key: [point.value for point in sorted(client.get_metric_history(run.info.run_id, key), key=lambda p: p.step)]
        for key in ("seconds", "waiting", "validation_loss")
    }
    return summary([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]) | {
        "whole": whole
    }


def summary(epochs: list[dict[str, float]]) -> dict[str, float]:
    waiting = [epoch["waiting"] for epoch in epochs[LEFT_OUT:]]
    return {
        "seconds": steady([epoch["seconds"] for epoch in epochs]),
        "waiting": statistics.median(waiting),
        "validation_loss": epochs[-1]["validation_loss"],
    }


if __name__ == "__main__":
    main()
