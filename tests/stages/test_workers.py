"""What starts with every worker is light: the classes that live there come without the driver's libraries."""

import json
import subprocess
import sys
from importlib import resources

import pytest

NEVER = {"mlflow", "bokeh", "matplotlib", "jinja2", "captum", "zuko", "sklearn", "astropy", "scipy.stats"}
"""The driver's own libraries, and those that only some settings need."""

WITH_RAY = {"ray", "pandas", "pyarrow"}
"""What Ray Train and Ray Tune bring themselves."""

LOOK = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps([*sys.modules]))
"""


def modules_with(*names: str) -> set[str]:
    """Name all modules that a fresh process has once some are imported."""
    command = [sys.executable, "-c", LOOK, *names]
    return set(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


@pytest.mark.slow
def test_workers_start_without_the_libraries_of_the_driver() -> None:
    folders = [folder.name for folder in resources.files("distspec.stages").iterdir() if folder.is_dir()]
    stages = {name for name in folders if (resources.files("distspec.stages") / name / "workers.py").is_file()}
    assert {"ingest", "train", "score", "explain"} <= stages
    by_ray, by_arrow = {"train", "tune"}, {"export"}
    light = stages - by_ray - by_arrow
    assert not modules_with(*(f"distspec.stages.{name}.workers" for name in light)) & (NEVER | WITH_RAY)
    # What writes Parquet needs Arrow.
    assert not modules_with(*(f"distspec.stages.{name}.workers" for name in stages & by_arrow)) & (NEVER | {"ray"})
    assert not modules_with(*(f"distspec.stages.{name}.workers" for name in stages & by_ray)) & NEVER
