"""A small simulated experiment for the tests of the stages."""

import json
from pathlib import Path
from typing import Any

from distspec.config import Experiment

SMALL: dict[str, Any] = {
    "name": "small",
    "seed": 5,
    "ingest": {
        "source": {"kind": "simulate", "spectra": 700, "anomalies": 0.05},
        "prepare": {"grid": {"scale": "log", "first": 3600.0, "last": 7400.0, "pixels": 240}},
        "shard_rows": 128,
        "chunk_rows": 64,
    },
    "train": {"model": {"hidden": [32], "latents": 4}, "epochs": 4, "batch": 64},
    "score": {"top": 50},
    "explain": {
        "scores": ["mse", "chi2"],
        "methods": [{"kind": "lime", "samples": 200, "segments": {"kind": "uniform", "count": 40}}],
        "fraction": 0.05,
    },
    "evaluate": {"hosts": 0},
    "report": {"spectra": 2, "table": 10},
    "runtime": {"workers": 2},
}


def small(output: Path, **changes: Any) -> Experiment:
    """Give the small experiment with another output and top-level sections changed."""
    tree = json.loads(json.dumps(SMALL)) | {"output": str(output)}
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
    return Experiment.model_validate_json(json.dumps(tree))


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
