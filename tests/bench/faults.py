"""Every fault in every stage on a cluster of two nodes: how it ends, after how long, and whether results are the same.

Run by hand: `python -m tests.bench.faults --json faults.json`; README.md here says what is measured.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil

from distspec.config import Experiment
from distspec.pipeline import Products, given_up, run
from distspec.runtime.cluster import connect
from distspec.stages.detect import stage as detect_stage
from distspec.stages.evaluate import stage as evaluate_stage
from distspec.stages.explain import stage as explain_stage
from distspec.stages.ingest import stage as ingest_stage
from distspec.stages.score import stage as score_stage
from distspec.stages.train import attempts as train_attempts
from distspec.store import Layer
from tests.support.faults import Fault, Struck
from tests.support.small import small

STAGES = ("ingest", "train", "score", "detect", "explain", "evaluate")
WORKERS = {
    "ingest": (ingest_stage, "Ingester"),
    "score": (score_stage, "Scorer"),
    "detect": (detect_stage, "DetectorScorer"),
    "explain": (explain_stage, "ExplainWorker"),
    "evaluate": (evaluate_stage, "Injector"),
}
"""Where the class of a stage's workers is looked up."""

FAULTS = ("none", "worker", "node", "late", "exit", "sleep", "memory")
"""Nothing; a worker killed; a node's raylet killed; a second node that joins late; a row that ends its process, never
ends, or takes memory until it is killed."""

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "tests.bench.faults")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
"""Workers import the faults."""

PATIENCE = 1500.0
"""Seconds after which a stage counts as hung. A row that never ends is waited for in every item that holds it."""

HOST = 5
"""Place of the host that a fault of `evaluate` strikes."""


def main() -> None:
    """Make what each stage starts from, then try every fault in a process and on a cluster of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--faults", nargs="+", default=FAULTS, choices=FAULTS)
    parser.add_argument("--json")
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "STAGE", "FAULT"), help=argparse.SUPPRESS)
    parser.add_argument("--before", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.before:
        before(Path(options.before))
        return
    if options.one:
        folder, stage, fault = options.one
        print(json.dumps(one(Path(folder), stage, fault)), flush=True)
        # Nothing that is left of a broken cluster may keep this process.
        os._exit(0)
    with tempfile.TemporaryDirectory(prefix="distspec-faults-") as name:
        folder = Path(name)
        subprocess.run([*COMMAND, "--before", name], env=ENVIRONMENT, cwd=ROOT, check=True)
        found: dict[str, dict[str, Any]] = {}
        for stage in options.stages:
            found[stage] = {}
            for fault in dict.fromkeys(["none", *options.faults]):
                found[stage][fault] = tried(folder, stage, fault)
                print(f"{stage:>9} {fault:>7}: {outcome(found[stage][fault], found[stage]['none'])}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


def experiment_of(output: Path, **runtime: Any) -> Experiment:
    return small(
        output,
        train={"model": {"hidden": [32], "latents": 4}, "epochs": 12, "batch": 64, "workers": {"min": 1, "max": 2}},
        detect={"detectors": [{"kind": "pca", "components": 3}], "sample": 200},
        evaluate={"hosts": 40, "kinds": ["cosmic-ray", "extreme-lines"], "strengths": [1.0], "explained": 8},
        runtime={"item_seconds": 20.0} | runtime,
    )


def before(folder: Path) -> None:
    """Run all stages undisturbed, and keep the output as it was before each."""
    out = folder / "out"
    out.mkdir()
    for stage in STAGES:
        shutil.copytree(out, folder / f"before-{stage}")
        made = run(experiment_of(out, workers=2), stage)
        if stage == "explain":
            rows = next(iter(made.explanations.values())).read("row")
            (folder / "explained.json").write_text(json.dumps(rows.tolist()))


def tried(folder: Path, stage: str, fault: str) -> dict[str, Any]:
    begun = time.perf_counter()
    command = [*COMMAND, "--one", str(folder), stage, fault]
    # Ray's own watch over memory, set so that a few gigabytes more than what is taken now are too much.
    memory = psutil.virtual_memory()
    threshold = min(0.95, 1 - memory.available / memory.total + 3e9 / memory.total)
    watch = {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "250"}
    environment = ENVIRONMENT | (watch if fault == "memory" else {})
    options: dict[str, Any] = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": PATIENCE, "check": False}
    try:
        ended = subprocess.run(command, env=environment, **options)
    except subprocess.TimeoutExpired:
        return {"seconds": PATIENCE, "error": f"did not end in {PATIENCE:.0f} s"}
    if ended.returncode:
        return {"seconds": time.perf_counter() - begun, "error": (ended.stderr.strip() or "?").splitlines()[-1]}
    told: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return told


def outcome(found: dict[str, Any], quiet: dict[str, Any]) -> str:
    """Say in a line how it ended."""
    seconds = f"{found['seconds']:.0f} s"
    if "error" in found:
        return f"{seconds}, ended with: {found['error']}"
    lost = [row for rows in found["lost"].values() for row in rows]
    same = "same bits" if found["digests"] == quiet.get("digests") else "OTHER RESULTS"
    if lost:
        kept = [name for name, digest in found["kept"].items() if quiet["kept"][name] != digest]
        same = "all others the same bits" if not kept else f"OTHER RESULTS in {', '.join(kept)}"
    return f"{seconds}, {same}" + (f", set aside by name: {lost}" if lost else "")


def one(folder: Path, stage: str, fault: str) -> dict[str, Any]:
    """Run one stage with one fault on a cluster of two nodes."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(1 if fault == "late" else 2)]
    work = folder / f"{stage}-{fault}"
    shutil.copytree(folder / f"before-{stage}", work)
    experiment = experiment_of(work, address=cluster.address)
    row = struck_row(folder, stage)
    slow = 1.0 if fault in ("worker", "node", "late") else 0.0
    acts: dict[str, Callable[[], Any]] = {
        "worker": kill_a_worker,
        "node": lambda: cluster.remove_node(nodes[-1], allow_graceful=False),
        "late": lambda: cluster.add_node(num_cpus=1),
    }
    with ExitStack() as stack:
        if stage == "train":
            stack.enter_context(
                patch.object(train_attempts, "train_loop_of_worker", partial(struck_loop, fault, str(work)))
            )
        else:
            module, name = WORKERS[stage]
            kind = fault if fault in ("exit", "sleep", "memory") else "exit"
            wrong = Fault(kind, row if kind == fault else -1, slow)  # type: ignore[arg-type]
            stack.enter_context(patch.object(module, name, partial(Struck, vars(module)[name], wrong)))
        connect(experiment.runtime)
        ended: list[Products | BaseException] = []
        # In a thread, since Ray adds nodes in the main one alone.
        running = threading.Thread(target=lambda: ended.append(outcome_of(experiment, stage)))
        begun = time.perf_counter()
        running.start()
        if fault in acts:
            when_at_work(acts[fault], stage, work, running)
        running.join()
        seconds = time.perf_counter() - begun
    (made,) = ended
    if isinstance(made, BaseException):
        raise made
    lost = given_up(made)
    arrays = results(made, stage)
    skip = HOST if stage == "evaluate" else row
    return {
        "seconds": seconds,
        "lost": {what: list(rows) for what, rows in lost.items()},
        "digests": {name: digest(values) for name, values in arrays.items()},
        "kept": {name: digest(without(values, skip)) for name, values in arrays.items()},
    }


def outcome_of(experiment: Experiment, stage: str) -> Products | BaseException:
    try:
        return run(experiment, stage)
    except BaseException as error:
        return error


def struck_row(folder: Path, stage: str) -> int:
    """Choose the row that a fault strikes: one that is explained, or a place among the hosts."""
    if stage == "evaluate":
        return HOST
    return (
        300 if stage in ("ingest", "score", "detect") else int(json.loads((folder / "explained.json").read_text())[1])
    )


def when_at_work(act: Callable[[], Any], stage: str, work: Path, running: threading.Thread) -> None:
    """Do something once workers are in the middle of their work; nothing if it has ended before."""

    def begun() -> bool:
        return len(list((work / "training").glob("*/first/*"))) >= 2 if stage == "train" else bool(working())

    while running.is_alive() and not begun():
        time.sleep(0.1)
    if stage != "train":
        time.sleep(2.0)
    if not running.is_alive():
        raise RuntimeError("the stage ended before anything could happen to it")
    act()


def working() -> list[psutil.Process]:
    names = ("ray::_Actor.apply", "ray::RayTrainWorker")
    return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] and p.info["cmdline"][0].startswith(names)]


def kill_a_worker() -> None:
    working()[0].kill()


def struck_loop(fault: str, mark: str, config: dict[str, Any]) -> None:
    """Train, but the first time that this is done in one worker something happens there after some seconds."""
    from distspec.stages.train.workers import train_loop_of_worker

    first = Path(mark) / "struck"
    if fault in ("exit", "sleep", "memory"):
        try:
            first.touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            if fault == "sleep":
                time.sleep(1e6)
            threading.Timer(3.0, Fault(fault, 0).strike, ((0,),)).start()  # type: ignore[arg-type]
    train_loop_of_worker(config)


def results(made: Products, stage: str) -> dict[str, Any]:
    """Give what a stage made, as arrays with a row for each spectrum where it has that."""
    layers: dict[str, Layer | None] = {}
    if stage == "ingest" and made.store is not None:
        layers = {"base": made.store.base}
    elif stage == "score":
        layers = {"scores": made.scores}
    elif stage == "detect":
        layers = dict(made.detected)
    elif stage == "explain":
        layers = {**made.explanations, "lines": made.lines}
    elif stage == "train" and made.checkpoint is not None:
        return {"model": made.checkpoint.sha256}
    elif made.evaluation is not None:
        told = {key: value for key, value in made.evaluation.content.items() if key not in ("store", "model")}
        return {"evaluation": json.dumps(told, sort_keys=True)}
    # By the row of the store, where a layer holds a list.
    found = {}
    for name, layer in layers.items():
        if layer is not None:
            rows = layer.read("row") if "row" in layer.fields else np.arange(layer.rows)
            found |= {f"{name}/{field}": (rows, layer.read(field)) for field in layer.fields}
    return found


def without(values: Any, row: int) -> Any:
    if isinstance(values, tuple):
        rows, array = values
        return rows[rows != row], array[rows != row]
    return "" if isinstance(values, str) and values.startswith("{") else values


def digest(values: Any) -> str:
    if isinstance(values, tuple):
        parts = [part.tolist() if part.dtype.kind in "OTU" else part.tobytes() for part in values]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
    return hashlib.sha256(str(values).encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
