"""Spectra scored in a second, beside the plain loop that a user would write and beside the machine's own limits.

Run by hand: `python tests/bench/score_throughput.py --keep /tmp/bench`; README.md here says what is measured.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import zarr

from distspec.config import Dense, Experiment
from distspec.detectors.neural.reconstruction import SCORES, reconstruction_scores
from distspec.models.autoencoders.dense import DenseAutoencoder
from distspec.models.checkpoint import Checkpoint
from distspec.results.layout import score_layer, store_path
from distspec.runtime.cluster import connect
from distspec.runtime.tracking import Run
from distspec.spectra.lines.wavelengths import near_lines
from distspec.stages.ingest.stage import ingest
from distspec.stages.score import stage
from distspec.store import SpectraStore

Values = np.ndarray[Any, Any]

HIDDEN = (590, 100)
LATENTS = 10
BATCH = 1_024


def main() -> None:
    """Make the store and the model, time all forms in turns, print the table."""
    options = parse()
    folder = Path(options.keep or tempfile.mkdtemp(prefix="distspec-bench-"))
    try:
        report = measure(options, folder)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(as_table(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spectra", type=int, default=200_000)
    parser.add_argument("--pixels", type=int, default=1_000)
    parser.add_argument("--workers", type=int, default=0, help="actors; 0 takes one for each core")
    parser.add_argument("--repeat", type=int, default=3, help="turns; ratios are taken within a turn")
    parser.add_argument("--keep", help="folder that keeps the store between runs")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Take all figures."""
    experiment = settings_of(options, folder)
    fixed = {"Ray start": timed(lambda: connect(experiment.runtime))[0]}
    before = ready(experiment)
    seconds, store = timed(lambda: ingest(experiment))
    made = None if before else store.rows / seconds
    checkpoint = model_of(store, folder)
    cores = os.cpu_count() or 1
    torch.set_num_threads(cores)

    fixed["MLflow import and first run"] = timed(lambda: tracked(experiment, "first"))[0]
    fixed["later MLflow run"] = timed(lambda: tracked(experiment, "second"))[0]
    forms: dict[str, Callable[[], list[tuple[float, int]]]] = {
        "plain loop": lambda: plain_loop(store, checkpoint),
        "equal work": lambda: equal_work(store, checkpoint, experiment, folder),
        "distspec": lambda: distspec_run(store, checkpoint, experiment),
    }
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
    limits: dict[str, list[float]] = {"sgemm GFLOP/s": [], "decode GB/s": []}
    workers = options.workers or cores
    if store.shards <= workers:
        raise SystemExit(f"{store.shards} shards for {workers} workers leave no steady state; take more spectra")
    for _ in range(options.repeat):
        limits["sgemm GFLOP/s"].append(sgemm())
        limits["decode GB/s"].append(decode(store))
        for name, form in forms.items():
            turns[name].append(rates(form(), workers if name == "distspec" else 1))
            print(f"  {name}: {turns[name][-1]['steady']:,.0f} spectra/s", file=sys.stderr, flush=True)
    flops = 4 * sum(a * b for a, b in zip([store.grid.pixels, *HIDDEN], [*HIDDEN, LATENTS], strict=True))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {"cpu": cpu_model(), "cores": cores, "load": os.getloadavg()},
        "versions": {name: version(name) for name in ("ray", "zarr", "torch", "numpy")}
        | {"python": sys.version.split()[0]},
        "spectra": store.rows,
        "pixels": store.grid.pixels,
        "shards": store.shards,
        "workers": workers,
        "stored_GB": sum(f.stat().st_size for f in (Path(store.path) / "base").rglob("*") if f.is_file()) / 1e9,
        "ingest_spectra_per_second": made,
        "fixed": fixed,
        "turns": turns,
        "limits": limits,
        "flop_per_spectrum": flops,
    }


def settings_of(options: argparse.Namespace, folder: Path) -> Experiment:
    tree = {
        "name": "score-throughput",
        "output": str(folder),
        "ingest": {
            "source": {"kind": "simulate", "spectra": options.spectra},
            "prepare": {"dust": {"kind": "column"}, "grid": {"pixels": options.pixels}},
        },
        "score": {"batch": BATCH},
        "runtime": {"workers": options.workers},
    }
    return Experiment.model_validate_json(json.dumps(tree))


def tracked(experiment: Experiment, key: str) -> None:
    """Open and close a run, as each stage does."""
    with Run(experiment, "bench", key, {}):
        pass


def ready(experiment: Experiment) -> bool:
    """Tell whether an earlier run has made the whole store."""
    path = store_path(experiment)
    return SpectraStore.is_finished(path) and not SpectraStore.open(path).pending()


def model_of(store: SpectraStore, folder: Path) -> Checkpoint:
    """Save a network of the paper's size; its speed does not depend on its weights."""
    torch.manual_seed(0)
    settings = Dense(hidden=HIDDEN, latents=LATENTS)
    model = DenseAutoencoder(settings, store.grid)
    model.mean += 1.0
    return Checkpoint(model.eval(), settings, store.grid, store.recipe).save(folder / "model")


# --- the three forms: each gives the time of its start (0 rows) and of each finished shard ----------------------------


def distspec_run(store: SpectraStore, checkpoint: Checkpoint, experiment: Experiment) -> list[tuple[float, int]]:
    """Run the stage as a user does, on a store without this layer."""
    shutil.rmtree(Path(store.path) / "layers" / score_layer(experiment, checkpoint.sha256), ignore_errors=True)
    marks = [(time.perf_counter(), 0)]
    inner = vars(stage)["map_items"]

    def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
        for summary in inner(*arguments, **options):
            marks.append((time.perf_counter(), summary.scored + summary.set_aside))
            yield summary

    with patch.object(stage, "map_items", watched):
        stage.score(experiment, store, checkpoint)
    return [*marks, (time.perf_counter(), 0)]


@torch.inference_mode()
def plain_loop(store: SpectraStore, checkpoint: Checkpoint) -> list[tuple[float, int]]:
    """Do what one would write by hand: chi-squared and latents, nothing else, all cores in torch and zarr."""
    marks = [(time.perf_counter(), 0)]
    group = zarr.open_group(store.path, mode="r")["base"]
    chi2, latents = [], []
    for shard in range(store.shards):
        rows = slice(*store.base.bounds(shard))
        whole_flux, whole_ivar = torch.from_numpy(group["flux"][rows]), torch.from_numpy(group["ivar"][rows])
        for flux, ivar in zip(torch.split(whole_flux, BATCH), torch.split(whole_ivar, BATCH), strict=True):
            reconstruction, latent = checkpoint.model(flux, ivar)
            chi2.append(((flux - reconstruction).square() * ivar).sum(dim=1))
            latents.append(latent)
        marks.append((time.perf_counter(), len(whole_flux)))
    torch.cat(chi2), torch.cat(latents)
    return [*marks, (time.perf_counter(), 0)]


@torch.inference_mode()
def equal_work(
    store: SpectraStore, checkpoint: Checkpoint, experiment: Experiment, folder: Path
) -> list[tuple[float, int]]:
    """Do in one loop what distspec does: all nine scores and the latents, written with zarr."""
    marks = [(time.perf_counter(), 0)]
    group = zarr.open_group(store.path, mode="r")["base"]
    away = torch.from_numpy(~near_lines(store.grid, experiment.score.filter_velocity))
    out = zarr.open_group(folder / "by-hand.zarr", mode="w")
    shapes = dict.fromkeys(SCORES, (store.rows,)) | {"latents": (store.rows, LATENTS)}
    size = store.base.shard_rows
    for name, shape in shapes.items():
        out.create_array(name, shape=shape, chunks=(size, *shape[1:]), dtype="f4")
    for shard in range(store.shards):
        rows = slice(*store.base.bounds(shard))
        whole_flux, whole_ivar = torch.from_numpy(group["flux"][rows]), torch.from_numpy(group["ivar"][rows])
        scores, latents = [], []
        for flux, ivar in zip(torch.split(whole_flux, BATCH), torch.split(whole_ivar, BATCH), strict=True):
            reconstruction, latent = checkpoint.model(flux, ivar)
            scores.append(reconstruction_scores(flux, ivar, reconstruction, away, experiment.score))
            latents.append(latent)
        values = torch.cat(scores).numpy()
        for index, name in enumerate(SCORES):
            out[name][rows] = values[:, index]
        out["latents"][rows] = torch.cat(latents).numpy()
        marks.append((time.perf_counter(), len(whole_flux)))
    return [*marks, (time.perf_counter(), 0)]


def rates(marks: list[tuple[float, int]], workers: int) -> dict[str, float]:
    """Turn times of finished shards into figures; steady counts from when each worker has finished a shard."""
    start, stop = marks[0][0], marks[-1][0]
    done = marks[1:-1]
    settled, last = done[workers - 1][0], done[-1][0]
    steady = sum(rows for _, rows in done[workers:]) / (last - settled)
    total = sum(rows for _, rows in done)
    return {
        "wall": stop - start,
        "whole": total / (stop - start),
        "steady": steady,
        # What the wall holds beyond the work at the steady rate.
        "fixed": stop - start - total / steady,
        "to_first": done[0][0] - start,
        "after_last": stop - last,
    }


# --- the machine's limits ---------------------------------------------------------------------------------------------


def sgemm(size: int = 2_048, repeat: int = 8) -> float:
    """GFLOP/s of a large float32 matrix product on all cores, the best of some."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2e-9 * float(size) ** 3 / min(timed(lambda: a @ b)[0] for _ in range(repeat))


def decode(store: SpectraStore) -> float:
    """GB/s of flux and ivar read by a plain zarr loop that computes nothing."""
    group = zarr.open_group(store.path, mode="r")["base"]

    def read() -> int:
        rows = (slice(*store.base.bounds(shard)) for shard in range(store.shards))
        return sum(group[name][part].nbytes for part in rows for name in ("flux", "ivar"))

    seconds, size = timed(read)
    return float(1e-9 * size / seconds)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


# --- the report -------------------------------------------------------------------------------------------------------


def as_table(report: dict[str, Any]) -> str:
    """Lay the figures out; medians over the turns, ratios as medians of the ratios within a turn."""
    turns, machine = report["turns"], report["machine"]
    gigabytes = 8e-9 * report["pixels"]

    def middle(name: str, key: str) -> float:
        return float(statistics.median(turn[key] for turn in turns[name]))

    def ratio(name: str, key: str) -> str:
        each = [ours[key] / theirs[key] for ours, theirs in zip(turns["distspec"], turns[name], strict=True)]
        return f"{statistics.median(each):.2f} ({', '.join(f'{value:.2f}' for value in each)})"

    lines = [
        f"{report['date']}  commit {report['commit']}  {machine['cpu']}, {machine['cores']} cores, "
        f"load {machine['load'][0]:.1f}",
        ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        f"{report['spectra']:,} simulated spectra x {report['pixels']} pixels in {report['shards']} shards, "
        f"{report['stored_GB']:.2f} GB stored; {report['workers']} workers",
    ]
    if report["ingest_spectra_per_second"]:
        lines.append(f"simulated and ingested at {report['ingest_spectra_per_second']:,.0f} spectra/s")
    lines += ["", f"{'':12}{'steady /s':>11}{'GB/s':>7}{'end to end /s':>15}{'wall s':>8}{'fixed s':>9}"]
    for name in turns:
        steady = middle(name, "steady")
        lines.append(
            f"{name:12}{steady:>11,.0f}{steady * gigabytes:>7.2f}{middle(name, 'whole'):>15,.0f}"
            f"{middle(name, 'wall'):>8.1f}{middle(name, 'fixed'):>9.1f}"
        )
    lines += ["", "distspec over        steady                        end to end"]
    lines += [f"  {name:18} {ratio(name, 'steady'):29} {ratio(name, 'whole')}" for name in turns if name != "distspec"]
    flops = statistics.median(report["limits"]["sgemm GFLOP/s"])
    speed = statistics.median(report["limits"]["decode GB/s"])
    ours = middle("distspec", "steady")
    bound, feed = flops * 1e9 / report["flop_per_spectrum"], speed / gigabytes
    lines += [
        "",
        f"limits: sgemm {flops:.0f} GFLOP/s = {bound:,.0f} spectra/s (distspec {ours / bound:.0%}); "
        f"decode {speed:.2f} GB/s = {feed:,.0f} spectra/s (distspec {ours / feed:.0%})",
        f"fixed, s: {', '.join(f'{name} {value:.1f}' for name, value in report['fixed'].items())}; in each run: "
        f"to first shard {middle('distspec', 'to_first'):.1f}, after last {middle('distspec', 'after_last'):.1f}",
    ]
    return "\n".join(lines)


def commit() -> str:
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=False)
    return (found.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown processor"
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "?")


if __name__ == "__main__":
    main()
