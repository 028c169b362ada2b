"""Every stage on stores of growing length: wall and driver time, memory, growth; up to fifty million spectra.

Run by hand: `python tests/bench/fifty_million.py --rows 1000000 50000000 --keep /tmp/fifty`; README.md here says what
is measured.
"""

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch

from distspec import sources
from distspec.config import Dense, Experiment
from distspec.models.autoencoders.dense import DenseAutoencoder
from distspec.models.checkpoint import Checkpoint
from distspec.pipeline import run
from distspec.results.layout import store_path
from distspec.runtime import workers
from distspec.runtime.cluster import connect
from distspec.runtime.pool import kept_workers
from distspec.runtime.workers import map_items
from distspec.spectra import Spectra
from distspec.stages.ingest import stage as ingest_stage
from distspec.stages.ingest.row_plan import new_files
from distspec.stages.ingest.workers import counts_of
from distspec.store import SpectraStore

STAGES = ("score", "detect", "compare", "explain", "cluster", "report", "export")


def main() -> None:
    """Measure each length in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000, 1_000_000])
    parser.add_argument("--pixels", type=int, default=24)
    parser.add_argument("--shard-rows", type=int, default=16_384)
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--keep", help="folder that keeps the stores")
    parser.add_argument("--json")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = Path(options.keep or tempfile.mkdtemp(prefix="distspec-bench-"))
    if options.one:
        print(json.dumps(measure(folder, options.rows[0], options.pixels, options.shard_rows, options.stages)))
        return
    try:
        found = {}
        for rows in options.rows:
            command = [sys.executable, __file__, "--one", "--rows", str(rows), "--pixels", str(options.pixels)]
            command += ["--shard-rows", str(options.shard_rows), "--keep", str(folder / str(rows))]
            said = subprocess.run([*command, "--stages", *options.stages], stdout=subprocess.PIPE, check=True)
            found[rows] = json.loads(said.stdout.splitlines()[-1])
            print(as_table(found), flush=True)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


def experiment_of(folder: Path, rows: int, pixels: int, shard_rows: int) -> Experiment:
    tree = {
        "name": "fifty-million",
        "output": str(folder / "out"),
        "ingest": {
            "source": {"kind": "simulate", "spectra": rows},
            "prepare": {
                "dust": {"kind": "none"},
                "grid": {"scale": "log", "first": 3600.0, "last": 7400.0, "pixels": pixels},
            },
            "shard_rows": shard_rows,
            "chunk_rows": min(shard_rows, 1024),
        },
        "score": {"checkpoint": str(folder / "model"), "top": 1000},
        "detect": {"detectors": [{"kind": "pca", "components": 4}], "sample": 20_000},
        "explain": {
            "scores": ["mse", "pca"],
            "methods": [{"kind": "lime", "samples": 100, "segments": {"kind": "uniform", "count": 8}}],
            "limit": 100,
        },
        "evaluate": {"hosts": 0},
        "report": {"spectra": 4, "table": 50},
    }
    return Experiment.model_validate_json(json.dumps(tree))


class Filler:
    """Writes shards of spectra that cost little to draw: a slope, noise, and a few that are odd; lives in a worker."""

    def __init__(self, path: str) -> None:
        self._store = SpectraStore.open(path, write=True)

    def __call__(self, shard: int) -> None:
        store = self._store
        rows = np.arange(*store.base.bounds(shard))
        rng = np.random.default_rng(shard)
        phase = np.linspace(-1, 1, store.grid.pixels, dtype=np.float32)
        flux = 1 + rng.normal(0, 0.2, (len(rows), 1)).astype(np.float32) * phase
        flux += rng.normal(0, 0.05, flux.shape).astype(np.float32)
        odd = rng.random(len(rows)) < 1e-3
        flux[odd, store.grid.pixels // 2] += 5
        columns: dict[str, Any] = {}
        for name, (dtype, shape) in store.base.fields.items():
            name = name.removeprefix("columns/")
            if name in ("flux", "ivar"):
                continue
            if dtype == "string":
                kinds = np.array({"class": ["GALAXY", "QSO"], "anomaly": ["", "cosmic-ray"]}.get(name, [""]))
                columns[name] = kinds[odd.astype(int) % len(kinds)]
            elif name == "id":
                columns[name] = rows + 2**60
            elif np.dtype(dtype).kind == "f":
                columns[name] = rng.uniform(0.05, 0.3, (len(rows), *shape)).astype(dtype)
            else:
                columns[name] = np.zeros((len(rows), *shape), dtype)
        ivar = np.full(flux.shape, 400, np.float32)
        store.write(shard, Spectra(rows, flux.astype(np.float32), ivar, store.grid), columns)


def filled(experiment: Experiment) -> SpectraStore:
    """Make the store, or open it where it is there."""
    path = store_path(experiment)
    if not SpectraStore.is_finished(path):
        source = sources.build(experiment.ingest.source, experiment.seed, Path(experiment.output))
        inventory = new_files(source.files(), None, path, partial(counts_of, source), lambda index: False)
        vars(ingest_stage)["_create"](experiment, source, inventory)
    store = SpectraStore.open(path, write=True)
    for _ in map_items(Filler, (path,), store.pending(), experiment.runtime, "fill"):
        pass
    if not store.finished:
        store.freeze(None)
        store.mark_finished()
    return SpectraStore.open(path)


def model_for(store: SpectraStore, folder: Path) -> None:
    if not (folder / "model" / "model.json").is_file():
        torch.manual_seed(0)
        settings = Dense(hidden=(16,), latents=4)
        model = DenseAutoencoder(settings, store.grid)
        model.mean += 1.0
        Checkpoint(model.eval(), settings, store.grid, store.recipe).save(folder / "model")


@dataclass
class Watch:
    """What workers take, looked at while they live: seconds of each process, and the largest resident memory, bytes."""

    seconds: dict[tuple[int, float], float] = field(default_factory=dict)
    memory: int = 0

    def look(self) -> None:
        for process in psutil.process_iter(["pid", "create_time", "cmdline", "cpu_times", "memory_info"]):
            told = process.info
            if told["cmdline"] and told["cmdline"][0].startswith("ray::") and told["cpu_times"] is not None:
                key = (told["pid"], told["create_time"])
                self.seconds[key] = told["cpu_times"].user + told["cpu_times"].system
                self.memory = max(self.memory, told["memory_info"].rss)


@contextmanager
def watched() -> Iterator[Watch]:
    watch, done = Watch(), threading.Event()
    watch.look()
    before = sum(watch.seconds.values())

    def look() -> None:
        while not done.wait(1.0):
            watch.look()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        done.set()
        thread.join()
        watch.look()
        watch.seconds[0, 0.0] = -before


def measure(folder: Path, rows: int, pixels: int, shard_rows: int, stages: tuple[str, ...]) -> dict[str, Any]:
    """Fill the store and run the stages one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    experiment = experiment_of(folder, rows, pixels, shard_rows)
    connect(experiment.runtime)
    found: dict[str, Any] = {}
    passed = [0]
    unpack = workers.unpack

    def counted(packed: bytes) -> Any:
        passed[0] += len(packed)
        return unpack(packed)

    with kept_workers(), patch.object(workers, "unpack", counted):
        begun = time.perf_counter()
        store = filled(experiment)
        model_for(store, folder)
        print(f"{rows} rows in {store.shards} shards: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
        for stage in stages:
            passed[0], begun, own = 0, time.perf_counter(), time.process_time()
            with watched() as watch:
                run(experiment, stage)
            seconds = time.perf_counter() - begun
            found[stage] = {
                "seconds": round(seconds, 1),
                "driver_cpu": round(time.process_time() - own, 1),
                "worker_cpu": round(sum(watch.seconds.values()), 1),
                "driver_peak_GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
                "worker_peak_GB": round(watch.memory / 1e9, 2),
                "bytes_per_shard": round(passed[0] / store.shards),
            }
            print(f"  {stage}: {found[stage]}", file=sys.stderr, flush=True)
    return found | {"shards": store.shards}


def as_table(found: dict[int, dict[str, Any]]) -> str:
    """Lay the figures out, with the growth from the length before."""
    lines = [
        f"{'rows':>10} {'stage':>8} {'wall s':>8} {'driver s':>9} {'workers s':>10} {'driver %':>9} {'driver GB':>10} "
        f"{'worker GB':>10} {'bytes/shard':>12} {'exponent':>9}"
    ]
    before: tuple[int, dict[str, Any]] | None = None
    for rows, stages in found.items():
        for stage, told in stages.items():
            if stage == "shards":
                continue
            share = told["driver_cpu"] / max(told["driver_cpu"] + told["worker_cpu"], 1e-9)
            grows = ""
            if before is not None:
                grows = f"{math.log(told['seconds'] / before[1][stage]['seconds']) / math.log(rows / before[0]):.2f}"
            lines.append(
                f"{rows:>10} {stage:>8} {told['seconds']:>8} {told['driver_cpu']:>9} {told['worker_cpu']:>10} "
                f"{100 * share:>9.1f} {told['driver_peak_GB']:>10} {told['worker_peak_GB']:>10} "
                f"{told['bytes_per_shard']:>12} {grows:>9}"
            )
        before = rows, stages
    return "\n".join(lines)


if __name__ == "__main__":
    main()
