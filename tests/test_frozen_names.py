"""Names do not change: what was made yesterday is found, read and gone on with tomorrow.

A small experiment with every part switched on goes through the command line. All names that it leaves and prints must
be those of `tests/frozen/names.json`: files, layers and their fields, columns of tables, keys of facts, runs, labels,
and anchors of the page. Digests that follow from settings alone are frozen as they are. Those that follow from trained
weights too differ among processors: they are written as <digest>, and how they are made is frozen for layers that are
made up. Left out for the same reason is whatever counts or measures: N stands for numbers of spectra.
"""

import csv
import difflib
import io
import json
import os
import re
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from distspec import cli
from distspec.config import Experiment, digest, dump, load, presets
from distspec.results import layout
from distspec.store import Inventory, Layer, SpectraStore
from tests.support.surveys import make_layer, make_survey, write_rows

FROZEN = Path(__file__).parent / "frozen" / "names.json"

OUTPUT = "frozen"

EVERYTHING: dict[str, Any] = {
    "name": "frozen",
    "output": OUTPUT,
    "seed": 5,
    "ingest": {
        "source": {"kind": "simulate", "spectra": 260, "anomalies": 0.1},
        "prepare": {
            "grid": {"scale": "log", "first": 3600.0, "last": 7400.0, "pixels": 160},
            "sample": {"missing_max": 0.1, "impute": True, "snr_quantile": 0.02},
        },
        "values": [{"path": "values.csv", "prefix": "other_"}],
        "shard_rows": 512,
        "chunk_rows": 64,
    },
    "train": {
        "model": {"hidden": [16], "latents": 3},
        "epochs": 2,
        "batch": 64,
        "validation": 0.2,
        "second": {"epochs": 1, "batch": 64},
        "density": {"kind": "sliced", "layers": 2, "labels": ["class"]},
    },
    "score": {"top": 20, "metrics": ["mad"]},
    "detect": {
        "detectors": [
            {"kind": "pca", "components": 2, "window": 800.0},
            {"kind": "forest", "trees": 4, "trees_per_draw": 4, "bins": 20},
            {"kind": "isolation", "trees": 5, "bins": 20},
            {"kind": "fisher", "components": 2, "gaussians": 2},
        ],
        "sample": 100,
    },
    "compare": {"top": 20, "sizes": [10, 20], "bias": 20},
    "explain": {
        "scores": ["mse", "density"],
        "methods": [
            {"kind": "lime", "samples": 40, "segments": {"kind": "uniform", "count": 8}},
            {"kind": "lime", "name": "lime_lines", "samples": 40, "segments": {"kind": "lines", "width": 500.0}},
            {"kind": "imo", "windows": [16, 64], "baselines": 2},
            {"kind": "gradient"},
            {"kind": "gradient_input"},
            {"kind": "integrated_gradients", "steps": 2},
            {"kind": "expected_gradients", "steps": 2, "baselines": 2},
            {"kind": "ablation"},
            {"kind": "occlusion", "window": 32, "stride": 32},
        ],
        "fraction": 0.02,
        "ascent": {"steps": 4, "length": 0.5, "points": 2},
    },
    "cluster": {"k": 2},
    "evaluate": {
        "hosts": 4,
        "kinds": ["extreme-lines"],
        "strengths": [1.0],
        "levels": [0.05],
        "explained": 1,
        "strata": 2,
        "bootstrap": 10,
    },
    "report": {"spectra": 1, "table": 5},
    "runtime": {"workers": 1},
}
"""One shard, and one worker beside the driver."""

SECTIONS = ("ingest", "train", "tune", "score", "detect", "compare", "explain", "cluster", "evaluate")
"""Settings that name what is on disk."""

OF_WEIGHTS = re.compile(
    r"((?:score|explain-\w+|lines|ascent|ensemble|compare|cluster|evaluate)-|(?:comparison|clusters|evaluation)/)"
    r"[0-9a-f]{12}\b"
)
"""Names whose digest covers trained weights."""

UNKNOWN_TO_SOME = {"n_joint", "n_low", "n_high", "mean_overlap", "smallest_p", "silhouette", "rand"}
"""Tracked numbers that no run has where they cannot be told, which hangs on the scores."""

FIRST_ID = 39_632_000_000_000_000
"""Of the simulated spectra with this seed."""


def everything() -> Experiment:
    return Experiment.model_validate_json(json.dumps(EVERYTHING))


def plain(text: str) -> str:
    return OF_WEIGHTS.sub(r"\1<digest>", text)


# --- settings alone ---------------------------------------------------------------------------------------------------


def settings() -> dict[str, dict[str, str]]:
    """Give the digest of each section of each preset, and of its recipe and its store's identity."""
    found = {}
    for name in (None, *sorted(presets())):
        source = [] if name in (None, "demo") else ["ingest.source.kind=sdss", "ingest.source.path=somewhere"]
        experiment = load(name, source)
        parts = {section: digest(getattr(experiment, section)) for section in SECTIONS}
        parts |= {"recipe": layout.recipe_digest(experiment), "store": digest(layout.store_identity(experiment))}
        found[name or "defaults"] = parts
    return found


def made_up(folder: Path) -> dict[str, Any]:
    """Give the names of all results for scores that never were, before and after their store has grown."""
    experiment, listed = everything(), "a" * 64
    files = Inventory(["a.fits", "b.fits"], np.array([10, 20]), np.array([0, 1]), np.array([10, -1]))
    store = make_survey(folder, {"z": np.zeros(30)}, shard_rows=20)
    found: dict[str, Any] = {
        "store": layout.store_digest(experiment, files),
        "store path": layout.store_path(experiment),
        "model": str(layout.model_folder(experiment, "store")),
        "tuning": str(layout.tuning_folder(experiment, experiment.train, "store")),
        "tuned": str(layout.tuned_path(experiment)),
        "scores": layout.score_layer(experiment, "f" * 64),
        "report": str(layout.report_path(experiment)),
        "table": str(layout.table_path(experiment)),
        "ledger": str(layout.ledger_path(experiment)),
    }
    for detector in experiment.detect.detectors:
        found[detector.name] = str(layout.detector_folder(experiment, detector, "store"))
        found[f"{detector.name} layer"] = layout.detect_layer(experiment, detector, "store")
    found["of scores"] = of_scores(experiment, scored(store), listed)
    store.extend(10, Inventory(["c.fits"], np.array([30]), np.array([2]), np.array([10])))
    ids, status = np.arange(40, dtype=np.int64), np.zeros(40, np.int32)
    write_rows(store, {"id": ids, "status": status, "z": np.zeros(40)})
    found["of scores that have grown"] = of_scores(experiment, scored(store), listed)
    return found


def scored(store: SpectraStore) -> list[Layer]:
    """Write layers of a model's and of a detector's scores."""
    values = np.zeros(store.rows)
    return [
        make_layer(store, "score-0123456789ab", {"mse": values, "density": values}, model="f" * 64),
        make_layer(store, "detect-pca-0123456789ab", {"pca": values}, detector="e" * 64),
    ]


def of_scores(experiment: Experiment, layers: list[Layer], listed: str) -> dict[str, str]:
    scores, names = layers[0], ["mse", "density", "pca"]
    ensemble = layout.ensemble_layer("store", layers, names)
    found = {
        f"{method.name}": layout.explain_layer(experiment, method, [scores, scores])
        for method in experiment.explain.methods
    }
    first = experiment.explain.methods[0]
    return found | {
        "lime of a list": layout.explain_layer(experiment, first, [scores, scores], listed),
        "lines": layout.lines_layer(experiment, [scores, scores]),
        "ascent": layout.ascent_layer(experiment, scores),
        "comparison": str(layout.compare_folder(experiment, "store", layers, names)),
        "ensemble": ensemble,
        "ensemble folder": str(layout.ensemble_folder(experiment, ensemble)),
        "evaluation": str(layout.evaluation_folder(experiment, "store", layers)),
        "clusters": str(layout.cluster_folder(experiment, "store", scores, "mse")),
    }


# --- what a run leaves ------------------------------------------------------------------------------------------------


def files(output: Path) -> list[str]:
    """List folders, each with its files; MLflow's own are left out."""
    folders = defaultdict(list)
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output)
        if path.is_file() and name.parts[0] not in ("mlflow.db", "mlartifacts"):
            # An array of the store is one folder, its chunks included.
            folder, chunk, last = str(name).rpartition("/c/")
            folder, last = (folder, f"c/{last}") if chunk else (str(name.parent), name.name)
            folders[folder].append(last)
    return [plain(f"{folder}/: {', '.join(sorted(names))}") for folder, names in sorted(folders.items())]


def layers(store: Path) -> dict[str, Any]:
    """Give fields and attributes of the layers, read as whoever has no distspec reads them."""
    found = {}
    for path in sorted([store / "base", *(store / "layers").iterdir()]):
        if path.is_dir():
            meta = json.loads((path / "zarr.json").read_bytes())["attributes"]["distspec"]
            fields = [f"{key}: {kind}{shape or ''}" for key, (kind, shape) in meta["fields"].items()]
            found[plain(path.name)] = {
                "schema": meta["schema"],
                "fields": fields,
                "attributes": ", ".join(sorted(meta["attributes"])),
            }
    meta = json.loads((store / "zarr.json").read_bytes())["attributes"]["distspec"]
    found["store"] = {key: meta[key] for key in ("schema", "digest", "recipe", "frame", "chunk_rows")}
    return found | {"store's attributes": sorted(meta)}


def tables(output: Path) -> dict[str, list[str]]:
    """Give the columns of all tables."""
    found = {}
    for path in sorted(output.rglob("*.csv")):
        if "mlartifacts" not in path.parts:
            with path.open(newline="", encoding="utf-8") as stream:
                found[plain(str(path.relative_to(output)))] = next(csv.reader(stream))
    schema = pq.read_schema(output / "catalog.parquet")
    return found | {"catalog.parquet": [f"{field.name}: {field.type}" for field in schema]}


def facts(output: Path) -> dict[str, list[str]]:
    """Give the keys of all JSON files."""
    return {
        plain(str(path.relative_to(output))): list(json.loads(path.read_bytes()))
        for path in sorted(output.rglob("*.json"))
        if not {"mlartifacts", "store.zarr"} & set(path.parts)
    }


def runs(output: Path) -> dict[str, Any]:
    """Give the tracked runs and the registered model, in the order in which they were made."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{output.resolve() / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.get_experiment_by_name(EVERYTHING["name"])
    found: dict[str, Any] = {}
    for run in sorted(client.search_runs([experiment.experiment_id]), key=lambda run: run.info.start_time):
        artifacts = output / "mlartifacts" / run.info.run_id / "artifacts"
        tags = {key: value for key, value in run.data.tags.items() if key.startswith("distspec.")}
        found[plain(run.info.run_name)] = {
            "stage": tags["distspec.stage"],
            "status": run.info.status,
            "tags": ", ".join(sorted(tags)),
            "data": " ".join(f"{one.dataset.name} {one.dataset.digest}" for one in run.inputs.dataset_inputs),
            "settings": digest(dict(sorted(run.data.params.items()))),
            "metrics": sorted(run.data.metrics.keys() - UNKNOWN_TO_SOME),
            "files": sorted(str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file()),
        }
    for model in client.search_registered_models():
        (version,) = client.search_model_versions(f"name = '{model.name}'")
        found[f"model {model.name}"] = {"aliases": sorted(model.aliases), "tags": sorted(version.tags)}
    return found


def printed(said: str) -> list[str]:
    """Give what was printed; numbers of spectra are left out."""
    return [re.sub(r"(?<= )\d+\b", "N", plain(line)) for line in said.splitlines()]


def page(text: str) -> dict[str, list[str]]:
    """Give links, anchors, headings of sections and labels of facts; the rest hangs on what was found."""
    text = re.sub(r"<(script|style)\b.*?</\1>|<div [^>]*data-root-id=[^>]*>", "", text, flags=re.DOTALL)
    contents = re.search(r"<nav.*?</nav>", text, flags=re.DOTALL)
    return {
        "links": [" ".join(link) for link in re.findall(r'href="(#.*?)">(.*?)</a>', contents[0] if contents else "")],
        "anchors": list(dict.fromkeys(re.sub(r"\d+", "N", name) for name in re.findall(r'\bid="(.*?)"', text))),
        "headings": re.findall(r"<h[12]>(.*?)</h[12]>", text),
        "labels": re.findall(r"<dt>(.+?)</dt>", text.partition("<article")[0]),
    }


@pytest.fixture(scope="module")
def found(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All names that the experiment leaves and prints."""
    folder = tmp_path_factory.mktemp("frozen")
    with pytest.MonkeyPatch.context() as patch:
        # Relative places, so that names hold none of this machine.
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        rows = "".join(f"{FIRST_ID + row},{row},{row / 8},a\n" for row in range(0, 200, 2))
        Path("values.csv").write_text(f"id,number,[Fe/H],kind\n{rows}", "utf-8")
        os.utime("values.csv", ns=(0, 0))
        Path("frozen.toml").write_text(dump(everything()), "utf-8")
        said = [call(patch, verb, "frozen.toml") for verb in ("run", "export")]
        output = Path(OUTPUT)
        return {
            "printed": printed("".join(said)),
            "files": files(output),
            "layers": layers(output / "store.zarr"),
            "tables": tables(output),
            "facts": facts(output),
            "runs": runs(output),
            "page": page((output / "report.html").read_text("utf-8")),
        }


def call(patch: pytest.MonkeyPatch, *words: str) -> str:
    """Run the command line in this process and give what it printed."""
    patch.setattr(sys, "argv", ["distspec", *words])
    with redirect_stdout(io.StringIO()) as said:
        try:
            cli.main()
        except SystemExit as leaving:
            assert not leaving.code
    return said.getvalue()


# --- tests ------------------------------------------------------------------------------------------------------------


def require(part: str, now: Any, folder: Path) -> None:
    """Compare with what is frozen; where it differs, say how, and add it to a new file of all that is frozen."""
    frozen, new = json.loads(FROZEN.read_bytes()), folder / FROZEN.name
    if frozen.get(part) == now:
        return
    changed = json.loads(new.read_bytes()) if new.is_file() else frozen
    new.write_text(json.dumps(changed | {part: now}, indent=1, ensure_ascii=False) + "\n", "utf-8")
    before, after = (json.dumps(tree, indent=1, ensure_ascii=False) for tree in (frozen.get(part), now))
    changes = difflib.unified_diff(before.splitlines(), after.splitlines(), "frozen", "now", lineterm="", n=2)
    pytest.fail("\n".join([*changes, f"if this is meant, copy {new} to {FROZEN}"]), pytrace=False)


@pytest.fixture
def basetemp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def test_digests_of_settings_are_frozen(basetemp: Path) -> None:
    require("settings", settings(), basetemp)


def test_digests_of_results_are_frozen(tmp_path: Path, basetemp: Path) -> None:
    require("made up", made_up(tmp_path), basetemp)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["printed", "files", "layers", "tables", "facts", "runs", "page"])
def test_names_of_a_run_are_frozen(part: str, found: dict[str, Any], basetemp: Path) -> None:
    require(part, found[part], basetemp)
