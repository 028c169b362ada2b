"""Spectra ingested in a second, beside a bare read of the same files, and the memory that it takes at 1x and 10x.

Run by hand: `python tests/bench/ingest_throughput.py --keep /tmp/bench`; README.md here says what is measured.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from astropy.io import fits

from distspec import sources
from distspec.config import Experiment, Simulate, load
from distspec.runtime.cluster import connect
from distspec.sources import Piece
from distspec.sources.simulation.survey import SimulatedSurvey
from distspec.stages.ingest import stage
from tests.bench.score_throughput import commit, cpu_model, rates
from tests.support.survey_files import DESI_ARMS, write_desi, write_sdss

TARGETS = 500
CASES = {"desi 1000 px": ("desi", "pae"), "desi 7781 px": ("desi", "desi"), "sdss 1000 px": ("sdss", "pae")}
WIDE = ["ingest.prepare.cuts.z_min=-1.0", "ingest.prepare.cuts.z_max=9.0", "ingest.prepare.normalize.kind=median"]


def main() -> None:
    """Make the files, time all forms in turns, weigh two sizes, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20, help="coadds of 500 spectra; as many times 50 spec files")
    parser.add_argument("--repeat", type=int, default=3, help="turns; ratios are taken within a turn")
    parser.add_argument("--keep", help="folder that keeps the files between runs")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    folder = Path(options.keep or tempfile.mkdtemp(prefix="distspec-bench-"))
    try:
        write_files(folder, options.files)
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "load": os.getloadavg()},
            "memory": {size: weigh(folder, size, options.files) for size in ("1x", "10x")},
            "turns": {case: measure(folder, case, options.repeat) for case in CASES},
        }
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(as_table(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


def write_files(folder: Path, files: int) -> None:
    """Write the same simulated objects as coadds and as spec files, and a tenth of the coadds apart."""
    if (folder / "done").is_file() and (folder / "done").read_text() == str(files):
        return
    survey = SimulatedSurvey(Simulate(spectra=files * TARGETS), 1)
    coadds = write_desi(survey, folder / "desi", targets_per_file=TARGETS)
    for path in coadds:
        # As in the survey's own files, four fifths of which are resolution matrices.
        for arm, grid in DESI_ARMS.items():
            matrix = np.full((TARGETS, 11, grid.pixels), 0.1, np.float32)
            fits.append(path, matrix, fits.Header([("EXTNAME", f"{arm}_RESOLUTION")]))
    write_sdss(survey, folder / "sdss", range(files * 50))
    (folder / "desi-1x").mkdir(exist_ok=True)
    for path in coadds[: max(files // 10, 1)]:
        for name in (path, path.with_name(path.name.replace("coadd", "redrock"))):
            if not (folder / "desi-1x" / name.name).exists():
                os.link(name, folder / "desi-1x" / name.name)
    (folder / "done").write_text(str(files))


def settings(folder: Path, case: str, source: Path) -> list[str]:
    """Give the words of the command line: the preset, cuts that let all through, shards enough for a steady state."""
    kind, preset = CASES[case]
    words = [preset, f"output={folder / 'out'}", f"ingest.source.kind={kind}", f"ingest.source.path={source}"]
    rows = 500 if kind == "desi" else 100
    words += [f"ingest.shard_rows={rows}", f"ingest.chunk_rows={rows // 4}"]
    return words + (WIDE if preset == "pae" else [])


def measure(folder: Path, case: str, repeat: int) -> list[dict[str, float]]:
    """Time all forms of one case, in turns; spectra in a second."""
    kind, _ = CASES[case]
    words = settings(folder, case, folder / kind)
    experiment = load(words[0], words[1:])
    files = sorted((folder / kind).glob("coadd-*.fits" if kind == "desi" else "spec-*.fits"))
    count = len(files) * (TARGETS if kind == "desi" else 1)
    connect(experiment.runtime)
    forms: dict[str, Callable[[], object]] = {
        "bytes": lambda: [path.read_bytes() for path in files],
        "bare read": lambda: [bare_read(path, kind) for path in files],
        "our reader": lambda: our_reader(experiment),
    }
    turns = []
    for _ in range(repeat):
        turn = {}
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            turn[name] = count / (time.perf_counter() - start)
        found = rates(distspec(experiment), os.cpu_count() or 1)
        turn |= {"distspec steady": found["steady"], "distspec whole": found["whole"]}
        turns.append(turn)
        print(f"  {case}: {turn}", file=sys.stderr, flush=True)
    return turns


def bare_read(path: Path, kind: str) -> object:
    """Read what a spectrum is made of, by astropy, and do nothing with it."""
    with fits.open(path, memmap=False) as units:
        if kind == "desi":
            return [np.asarray(units[f"{arm}_{part}"].data) for arm in "BRZ" for part in ("FLUX", "IVAR", "MASK")]
        return [np.asarray(units[1].data[name]) for name in ("flux", "ivar", "and_mask", "loglam")]


def our_reader(experiment: Experiment) -> None:
    source = sources.build(experiment.ingest.source, 0, Path(experiment.output))
    for entry in source.files():
        source.read(Piece(entry.name, 0, entry.count or source.count(entry.name)))


def distspec(experiment: Experiment) -> list[tuple[float, int]]:
    """Run the stage as a user does, into an empty output."""
    # Only the store: the tracking database stays open in this process.
    shutil.rmtree(Path(experiment.output) / "store.zarr", ignore_errors=True)
    marks = [(time.perf_counter(), 0)]
    inner = vars(stage)["map_items"]

    def watched(factory: Any, arguments: Any, items: Any, *rest: Any) -> Iterator[Any]:
        for result in inner(factory, arguments, items, *rest):
            if factory is stage.Ingester:
                marks.append((time.perf_counter(), experiment.ingest.shard_rows))
            yield result

    with patch.object(stage, "map_items", watched):
        stage.ingest(experiment)
    return [*marks, (time.perf_counter(), 0)]


def weigh(folder: Path, size: str, files: int) -> dict[str, float]:
    """Ingest in a process of its own and note the largest resident memory of the driver and of a worker, MB."""
    source = folder / ("desi-1x" if size == "1x" else "desi")
    shutil.rmtree(folder / "out", ignore_errors=True)
    words = ["ingest", *settings(folder, "desi 1000 px", source)]
    process = subprocess.Popen([sys.executable, "-m", "distspec", *words], stdout=subprocess.DEVNULL)
    peaks = {"driver": 0.0, "worker": 0.0}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            peaks["driver"] = max(peaks["driver"], resident(process.pid))
            peaks["worker"] = max([peaks["worker"], *map(resident, workers(process.pid))])

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    ended.set()
    watcher.join()
    if status:
        raise SystemExit(f"ingest ended with status {status}")
    spectra = files * TARGETS if size == "10x" else max(files // 10, 1) * TARGETS
    return {"spectra": spectra, **peaks}


def resident(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0.0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def workers(driver: int) -> list[int]:
    """Find Ray's workers that hold our work, below the driver."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                names[int(entry.name)] = (entry / "cmdline").read_text()
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue

    def below(pid: int) -> bool:
        return pid == driver or (pid in parents and parents[pid] > 1 and below(parents[pid]))

    return [pid for pid, name in names.items() if "MapWorker" in name and below(pid)]


def as_table(report: dict[str, Any]) -> str:
    lines = [f"{report['date']}, commit {report['commit']}, {report['machine']}", "", "peak resident memory, MB"]
    for size, found in report["memory"].items():
        lines.append(
            f"  {size:4}{found['spectra']:8,} spectra: driver {found['driver']:.0f}, worker {found['worker']:.0f}"
        )
    lines += ["", f"{'spectra in a second':24}{'median':>9}{'lowest':>9}{'highest':>9}   distspec steady over it"]
    for case, turns in report["turns"].items():
        lines.append(case)
        for name in turns[0]:
            found = [turn[name] for turn in turns]
            ratios = [turn["distspec steady"] / turn[name] for turn in turns]
            middle, ratio = statistics.median(found), statistics.median(ratios)
            lines.append(f"  {name:22}{middle:9,.0f}{min(found):9,.0f}{max(found):9,.0f}   {ratio:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
