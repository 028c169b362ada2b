"""GB/s of spectra read from a store, beside the bare codec, zarr's own reader and memory-mapped numpy files.

Run by hand: `python tests/bench/store_read.py`; README.md here says what is measured.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import zarr
from numcodecs import blosc

from distspec.config import Prepare, Simulate
from distspec.prepare.recipe import Recipe
from distspec.sources.simulation.survey import SimulatedSurvey
from distspec.spectra import Spectra
from distspec.store import SpectraStore, StoreSpec, limit_threads
from tests.bench.score_throughput import commit, cpu_model

SHARD, CHUNK = 16_384, 1_024


def main() -> None:
    """Make the store, time all readers in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=4, help="of 16,384 spectra x 1,000 pixels: 131 MB decoded each")
    parser.add_argument("--repeat", type=int, default=7, help="turns; ratios are taken within a turn")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="distspec-bench-"))
    try:
        report = measure(folder, options.shards, options.repeat)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(as_table(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


def measure(folder: Path, shards: int, repeat: int) -> dict[str, object]:
    """Take all figures."""
    store = make(folder, shards)
    cores = os.cpu_count() or 1
    limit_threads(cores)
    packed = [chunks(Path(store.path) / "base" / field) for field in ("flux", "ivar")]
    forms: dict[str, Callable[[], None]] = {
        "distspec": lambda: through_distspec(store.path),
        "zarr": lambda: through_zarr(store.path),
        "bare codec": lambda: bare_codec(packed, cores),
        "memory map": lambda: memory_map(folder, shards),
    }
    size = 8e-9 * store.rows * store.grid.pixels
    rates: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(repeat + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            # The first turn brings the files into the page cache and memory into the process.
            if turn:
                rates[name].append(size / (time.perf_counter() - start))
    stored = sum(path.stat().st_size for path in Path(store.path).rglob("*") if path.is_file())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {"cpu": cpu_model(), "cores": cores, "load": os.getloadavg()},
        "gigabytes": size,
        "stored share": 1e-9 * stored / size,
        "rates": rates,
    }


def make(folder: Path, shards: int) -> SpectraStore:
    """Write simulated spectra, prepared as ingest does, and the same as plain numpy files."""
    survey = SimulatedSurvey(Simulate(spectra=4_096), 1)
    recipe = Recipe(Prepare(), survey.grid)
    prepared, columns = recipe(*survey.rows(0, 4_096))
    # Which spectra they are does not matter to a codec: the same ones fill each shard, turned around.
    tiled = [np.concatenate([np.roll(part, shift, axis=0) for shift in range(SHARD // 4_096)]) for part in
             (prepared.flux, prepared.ivar)]  # fmt: skip
    rows = SHARD * shards
    store = SpectraStore.create(
        folder / "store.zarr",
        StoreSpec(
            grid=recipe.grid,
            frame="rest",
            rows=rows,
            shard_rows=SHARD,
            chunk_rows=CHUNK,
            columns={"id": ("i8", ()), "status": ("i4", ())},
            digest="bench",
            recipe="bench",
            settings={},
        ),
    )
    for shard in range(shards):
        start, stop = store.base.bounds(shard)
        number = np.arange(start, stop)
        spectra = Spectra(number, tiled[0], tiled[1], recipe.grid)
        store.write(shard, spectra, {"id": number, "status": np.zeros(SHARD, np.int32)})
        for name, values in zip(("flux", "ivar"), tiled, strict=True):
            np.save(folder / f"{name}-{shard}.npy", values)
    store.freeze(None)
    store.mark_finished()
    return store


def through_distspec(path: str) -> None:
    store = SpectraStore.open(path)
    for shard in range(store.shards):
        store.read(shard)


def through_zarr(path: str) -> None:
    group = zarr.open_group(path, mode="r")["base"]
    for start in range(0, group["flux"].shape[0], SHARD):
        for name in ("flux", "ivar"):
            group[name][start : start + SHARD]


def chunks(folder: Path) -> list[list[bytes]]:
    """Take the compressed chunks of each shard into memory."""
    found = []
    for path in sorted(folder.rglob("c/*/0")):
        data = path.read_bytes()
        count = SHARD // CHUNK
        index = np.frombuffer(data[-(16 * count + 4) : -4], "<u8").reshape(count, 2)
        found.append([data[offset : offset + length - 4] for offset, length in index.tolist()])
    return found


def bare_codec(packed: list[list[list[bytes]]], threads: int) -> None:
    """Only decode, from memory to memory that is there: no file, no checksum."""
    pool = ThreadPoolExecutor(threads)
    out = OUT.setdefault("out", np.zeros((SHARD // CHUNK, CHUNK * 1_000), np.float32))
    for field in packed:
        for shard in field:
            list(pool.map(blosc.decompress, shard, out))
    pool.shutdown()


OUT: dict[str, np.ndarray] = {}


def memory_map(folder: Path, shards: int) -> None:
    """Copy the same numbers out of uncompressed, memory-mapped files; no checksum."""
    for shard in range(shards):
        for name in ("flux", "ivar"):
            np.array(np.load(folder / f"{name}-{shard}.npy", mmap_mode="r"))


def as_table(report: dict[str, object]) -> str:
    rates = report["rates"]
    assert isinstance(rates, dict)
    lines = [f"{report['date']}, commit {report['commit']}, {report['machine']}"]
    lines += [f"{report['gigabytes']:.2f} GB decoded, stored in {100 * float(str(report['stored share'])):.0f} % of it"]
    lines += [f"{'':12}{'GB/s':>7}{'lowest':>8}{'highest':>9}   distspec over it"]
    for name, found in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates["distspec"], found, strict=True)]
        lines.append(
            f"{name:12}{statistics.median(found):7.2f}{min(found):8.2f}{max(found):9.2f}   "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
