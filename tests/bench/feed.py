"""GB/s that the feed of one training worker delivers, by the number of its readers, beside the bare read of the store.

Run by hand: `python tests/bench/feed.py`; README.md here says what is measured.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from distspec import models
from distspec.config import Train, load
from distspec.models.training.feed import Feed
from distspec.models.training.loop import Reconstruction, fit
from distspec.store import SpectraStore, limit_threads
from tests.bench.score_throughput import commit, cpu_model
from tests.bench.store_read import make

READERS = (1, 2, 3, 4)


def main() -> None:
    """Make the store, take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=4, help="of 16,384 spectra x 1,000 pixels: 131 MB decoded each")
    parser.add_argument("--batch", type=int, default=1_024, help="of the model that does nothing")
    parser.add_argument("--trained", type=int, default=24_576, help="spectra of an epoch of the network; 0 trains none")
    parser.add_argument("--repeat", type=int, default=5, help="turns; ratios are taken within a turn")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--keep", help="folder that keeps the store between runs")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"no {options.device} device here: nothing is measured")
    # What Ray gives a worker of one core.
    torch.set_num_threads(1)
    folder = Path(options.keep or tempfile.mkdtemp(prefix="distspec-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        report = measure(options, folder)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(as_table(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Take all figures."""
    place = folder / "store.zarr"
    store = SpectraStore.open(place) if SpectraStore.is_finished(place) else make(folder, options.shards)
    cores, load_before = os.cpu_count() or 1, os.getloadavg()
    rates: dict[str, list[float]] = {}
    waiting: dict[str, list[float]] = {}
    for turn in range(options.repeat + 1):
        found = {name: bare(store, threads) for name, threads in (("one thread", 1), ("all cores", cores))}
        found |= {str(readers): drained(store, options, readers, turn) for readers in READERS}
        # The first turn brings the files into the page cache and memory into the process.
        for name, rate in found.items() if turn else ():
            rates.setdefault(name, []).append(rate)
        for readers in READERS if turn and options.trained else ():
            waiting.setdefault(str(readers), []).append(trained(store, options, readers, folder / "state"))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {"cpu": cpu_model(), "cores": cores, "load": [load_before, os.getloadavg()]},
        "device": options.device if options.device == "cpu" else torch.cuda.get_device_name(),
        "GB/s": rates,
        "waiting": waiting,
    }


def bare(store: SpectraStore, threads: int) -> float:
    """Read all shards with so many threads and do nothing with them; GB/s."""
    limit_threads(threads)
    begun = time.perf_counter()
    for shard in range(store.shards):
        store.read(shard)
    return 8e-9 * store.rows * store.grid.pixels / (time.perf_counter() - begun)


def drained(store: SpectraStore, options: argparse.Namespace, readers: int, epoch: int) -> float:
    """Take all batches of an epoch and do nothing with them; GB/s on the device."""
    settings = Train(batch=options.batch, cache_gb=0, readers=readers)
    feed, count = Feed(store.path, settings, 1, device=options.device), 0
    begun = time.perf_counter()
    for flux, _, _ in feed.batches(epoch):
        count += len(flux)
    if feed.device.type == "cuda":
        torch.cuda.synchronize()
    return 8e-9 * count * store.grid.pixels / (time.perf_counter() - begun)


def trained(store: SpectraStore, options: argparse.Namespace, readers: int, state: Path) -> float:
    """Train the network of the preset `pae` for an epoch; the share of it in which there was no batch."""
    shutil.rmtree(state, ignore_errors=True)
    settings = load("pae").train.model_copy(update={"cache_gb": 0.0, "readers": readers, "epochs": 1})
    feed = Feed(store.path, settings, 1, device=options.device, limit=options.trained)
    torch.manual_seed(1)
    model = models.build(settings.model, store.grid).to(feed.device)
    model.settle(feed.mean().to(feed.device))  # type: ignore[operator]
    return fit(model, Reconstruction(model, settings.loss), feed, settings, state, 1)[-1]["waiting"]


def as_table(report: dict[str, Any]) -> str:
    """Set medians and spreads in columns; ratios are medians of those within a turn."""
    rates, waiting = report["GB/s"], report["waiting"]
    lines = [f"{report['machine']}, {report['device']}", f"{'':24}{'GB/s':>19}{'of one thread':>15}{'waiting':>24}"]
    for name, values in rates.items():
        label = f"{name} reader{'s' * (name != '1')}" if name.isdigit() else f"bare read, {name}"
        ratio = statistics.median(one / bare for one, bare in zip(values, rates["one thread"], strict=True))
        waits = spread([100 * share for share in waiting[name]], "%") if name in waiting else ""
        lines.append(f"{label:24}{spread(values):>19}{ratio:15.2f}{waits:>24}")
    return "\n".join(lines)


def spread(values: list[float], unit: str = "") -> str:
    digits = 1 if unit else 2
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f}-{high:.{digits}f})"


if __name__ == "__main__":
    main()
