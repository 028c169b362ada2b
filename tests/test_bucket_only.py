"""Nodes that share nothing but a bucket: from survey files in it to the page in it, on Ray's own cluster for tests.

Its workers start in another folder, with another HOME and without the variables that lead to the bucket.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distspec.addresses import BucketPath, address_of
from distspec.config import Experiment, Simulate, dump
from distspec.pipeline import run
from distspec.sources.simulation.survey import SimulatedSurvey
from distspec.store import SpectraStore
from tests.support.processes import finished, started
from tests.support.small import small
from tests.support.survey_files import write_plates, write_specobj

CLUSTER = """
import os, sys
import ray
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
print(cluster.address, flush=True)
sys.stdin.read()
os._exit(0)
"""

ROWS = 160


def without(*beginnings: str) -> dict[str, str]:
    """Give the environment without some variables; those of Ray would tell of this process's own."""
    return {name: value for name, value in os.environ.items() if not name.startswith(beginnings)}


@contextmanager
def cluster_elsewhere(folder: Path) -> Iterator[str]:
    """Start two nodes in a folder of their own, in which HOME is, too; give their address."""
    folder.mkdir()
    environment = without("AWS_", "RAY_") | {"HOME": str(folder), "RAY_worker_niceness": "0"}
    pipes = {"stdin": -1, "stdout": -1}
    with started([sys.executable, "-c", CLUSTER], cwd=folder, env=environment, **pipes) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plates and their catalogue."""
    folder = tmp_path_factory.mktemp("survey")
    simulated = SimulatedSurvey(Simulate(spectra=ROWS, anomalies=0.05), 3)
    write_plates(simulated, folder / "plates")
    write_specobj(simulated, folder / "specObj.fits")
    return folder


def experiment_of(survey: str, output: str, **runtime: Any) -> Experiment:
    return small(
        output,  # type: ignore[arg-type]
        ingest={
            "source": {
                "kind": "sdss",
                "path": f"{survey}/plates",
                "layout": "plate",
                "catalog": f"{survey}/specObj.fits",
                "wanted": {"where": [{"column": "SN_MEDIAN_ALL", "above": 2.0}]},
            },
            "prepare": {
                "grid": {"scale": "log", "first": 3900.0, "last": 7000.0, "pixels": 240},
                "dust": {"kind": "none"},
            },
            "shard_rows": 64,
            "chunk_rows": 32,
        },
        train={
            "model": {"hidden": [32], "latents": 4},
            "epochs": 3,
            "batch": 64,
            "workers": 2,
            "density": {"kind": "sliced", "layers": 3},
        },
        detect={"detectors": [{"kind": "pca", "components": 3}, {"kind": "forest", "trees": 4}], "sample": 100},
        compare={"top": 20},
        evaluate={"hosts": 6, "kinds": ["cosmic-ray"], "strengths": [1.0], "explained": 1},
        runtime={"workers": 2} | runtime,
    )


def upload(folder: Path, place: BucketPath) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            (place / file.relative_to(folder).as_posix()).upload(file)


@pytest.mark.slow
def test_a_cluster_that_shares_only_a_bucket_makes_what_one_machine_makes(
    ray_session: None, bucket: str, survey: Path, tmp_path: Path
) -> None:
    place = address_of(f"{bucket}/{tmp_path.name}")
    assert isinstance(place, BucketPath)
    upload(survey, place)
    driver = tmp_path / "driver"
    driver.mkdir()
    variables = sorted(name for name in os.environ if name.startswith("AWS_"))
    with cluster_elsewhere(tmp_path / "elsewhere") as address:
        there = experiment_of(str(place), f"{place}/run", address=address, env_vars=variables)
        (driver / "e.toml").write_text(dump(there), "utf-8")
        environment = without("RAY_") | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
        ended = finished([sys.executable, "-m", "distspec", "run", "e.toml"], cwd=driver, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    # Nothing was written to where workers or the driver are.
    assert [path.name for path in driver.iterdir()] == ["e.toml"]
    assert not any((tmp_path / "elsewhere").rglob("*distspec-output*"))
    here = experiment_of(str(survey), str(tmp_path / "here"))
    run(here)
    ours, theirs = (SpectraStore.open(f"{one.output}/store.zarr") for one in (here, there))
    assert ours.rows > 60
    assert ours.layers() == theirs.layers()
    for layer, other in zip(ours.all_layers(), theirs.all_layers(), strict=True):
        for field in layer.fields:
            np.testing.assert_array_equal(layer.read(field), other.read(field), err_msg=f"{layer.name} {field}")
    for name in ("anomalies.csv", "ledger.csv"):
        assert (place / "run" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert (place / "run" / "report.html").stat().st_size > 1_000_000
    left = {path.name for path in (place / "run").iterdir()}
    assert left >= {"catalogs", "clusters", "comparison", "detectors", "evaluation", "experiment.toml", "models"}
    assert "training" not in left
