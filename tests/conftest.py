"""Fixtures that every test may ask for."""

import json
import os
import re
import urllib.request

# Before a library starts its threads, and for programs that tests start too: in many small operations they would only
# wait for each other. A run under OMP_NUM_THREADS=4 shows what threads change.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from threadpoolctl import threadpool_limits
from xdist.scheduler import LoadFileScheduling

from distspec.config import Dense, Experiment
from distspec.models.autoencoders.dense import DenseAutoencoder
from distspec.models.checkpoint import Checkpoint
from distspec.pipeline import Products, run
from distspec.spectra import Spectra, WaveGrid
from distspec.store import SpectraStore, StoreSpec
from tests.support.small import small

LIME = {"kind": "lime", "segments": {"kind": "uniform", "count": 20}}

# How long an example takes says something about the machine and what else it does.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

REAL_DATA = Path(__file__).parents[2] / "shared" / "data" / "real"
"""Real survey files beside the checkout; tests that need them skip where they are absent."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--device", default="cpu", help="torch device of the model tests: cpu or cuda")


LONG = {"fitted", "ready", "studied"}
"""Fixtures of one file that take so long that the tests that ask for them are slow."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if LONG & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "gpu" in item.keywords and config.getoption("--device") == "cpu":
            item.add_marker(pytest.mark.skip(reason="needs a GPU: run with --device cuda"))
    # The long ones first, so that both processes end at about the same time.
    items.sort(key=lambda item: not ROOM_OF_RUNS & set(item.path.parts))


ROOM_OF_RUNS = {"stages", "runtime", "test_pipeline.py", "test_frozen_names.py"}
"""Where tests start Ray."""


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """A file is one process's, and all files that share an experiment are, so that it is made once."""

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "runs" if shares_an_experiment(config.rootpath / file) else file

    return ByFile(config, log)


@cache
def shares_an_experiment(file: Path) -> bool:
    return file.is_file() and bool(re.search(r"\b(whole|done): tuple\[Experiment, Products\]", file.read_text("utf-8")))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("--device"))


@pytest.fixture
def four_threads() -> Iterator[None]:
    """Give this process four threads in every pool, as a driver has on a larger machine."""
    threads = torch.get_num_threads()
    with threadpool_limits(limits=4):
        torch.set_num_threads(4)
        yield
        torch.set_num_threads(threads)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20_26)


@pytest.fixture
def real_data() -> Path:
    folder = Path(os.environ.get("DISTSPEC_REAL_DATA", REAL_DATA))
    if not folder.is_dir():
        pytest.skip(f"no real survey files at {folder}")
    return folder


@pytest.fixture
def grid() -> WaveGrid:
    return WaveGrid.between("log", 3600.0, 7200.0, 300)


@pytest.fixture
def spectra(rng: np.random.Generator, grid: WaveGrid) -> Spectra:
    """Forty smooth spectra with noise; one pixel in twenty is masked and holds garbage."""
    return make_spectra(rng, grid, 40)


def make_spectra(rng: np.random.Generator, grid: WaveGrid, count: int) -> Spectra:
    phase = np.linspace(0, 3, grid.pixels)
    shape = 1 + 0.3 * np.sin(phase + rng.uniform(0, 6, (count, 1))) + 0.2 * rng.normal(size=(count, 1)) * phase / 3
    sigma = rng.uniform(0.02, 0.08, (count, 1)) * np.ones(grid.pixels)
    flux = (shape + sigma * rng.normal(size=shape.shape)).astype(np.float32)
    ivar = (sigma**-2).astype(np.float32)
    masked = rng.random(flux.shape) < 0.05
    flux[masked] = 1e4
    ivar[masked] = 0
    return Spectra(np.arange(count), flux, ivar, grid)


def make_store(
    path: Path | str, spectra: Spectra, *, shard_rows: int, chunk_rows: int, status: Any = None, look: bool = True
) -> SpectraStore:
    """Write spectra into a store with the columns that the stages ask for; unless told otherwise, finish it."""
    count = len(spectra)
    columns = {
        "id": np.arange(count, dtype=np.int64) + 2**60 + 1,
        "z": np.linspace(0.01, 0.2, count),
        "status": np.zeros(count, np.int32) if status is None else status,
    }
    store = SpectraStore.create(
        path,
        StoreSpec(
            grid=spectra.grid,
            frame="rest",
            rows=count,
            shard_rows=shard_rows,
            chunk_rows=chunk_rows,
            columns={"id": ("i8", ()), "z": ("f8", ()), "status": ("i4", ())},
            digest="store",
            recipe="recipe",
            settings={},
        ),
    )
    for shard in store.pending():
        rows = slice(*store.base.bounds(shard))
        store.write(shard, spectra[rows], {name: values[rows] for name, values in columns.items()})
    if look:
        store.freeze(None)
        store.mark_finished()
    return store


@pytest.fixture
def store(tmp_path: Path, spectra: Spectra) -> SpectraStore:
    """The forty spectra in three shards; rows 3 and 20 are set aside."""
    status = np.zeros(40, np.int32)
    status[[3, 20]] = 2
    return make_store(tmp_path / "store.zarr", spectra, shard_rows=16, chunk_rows=8, status=status)


@pytest.fixture
def checkpoint(tmp_path: Path, grid: WaveGrid) -> Checkpoint:
    """A small model with random weights, saved."""
    torch.manual_seed(3)
    settings = Dense(hidden=(24,), latents=4)
    model = DenseAutoencoder(settings, grid)
    model.mean += 1.0
    return Checkpoint(model.eval(), settings, grid, "recipe").save(tmp_path / "model")


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """Settings small enough for a test, with everything under the test's own folder."""
    tree = {
        "name": "test",
        "output": str(tmp_path / "out"),
        "train": {"model": {"hidden": [16], "latents": 3}, "epochs": 3, "batch": 8, "validation": 0.25},
        "score": {"top": 10, "batch": 16},
        "explain": {"methods": [LIME | {"samples": 64}], "fraction": 0.25},
        "runtime": {"workers": 2},
    }
    return Experiment.model_validate_json(json.dumps(tree))


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray for all tests: it takes seconds to start. Four slots, so that three workers fit on two cores."""
    from distspec.config import Runtime
    from distspec.runtime.cluster import connect
    from distspec.runtime.pool import kept_workers

    connect(Runtime(workers=4))
    with kept_workers():
        yield
    import ray

    ray.shutdown()


@pytest.fixture(scope="session")
def done(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Products]:
    """The small experiment and what all its stages made."""
    experiment = small(tmp_path_factory.mktemp("done") / "out")
    return experiment, run(experiment)


@pytest.fixture(scope="session")
def whole(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Products]:
    """All there is in a run: two networks, a density by classes, relabelled; a detector; every stage and the report.

    One shard, so that the driver itself ingests and scores; one worker explains and evaluates. `done` takes two.
    """
    experiment = small(
        tmp_path_factory.mktemp("whole") / "out",
        name="whole",
        ingest={
            "source": {"kind": "simulate", "spectra": 500, "anomalies": 0.05},
            "shard_rows": 512,
            "chunk_rows": 64,
        },
        train={
            "model": {"hidden": [32], "latents": 4},
            "epochs": 3,
            "batch": 64,
            "second": {"epochs": 2, "batch": 64},
            "density": {"kind": "sliced", "layers": 4, "labels": ["class", "subclass"]},
        },
        explain={
            "scores": ["density", "chi2"],
            "methods": [LIME | {"samples": 100}, {"kind": "imo", "windows": [1, 16, 64], "baselines": 3}],
            "fraction": 0.033,
            "ascent": {"steps": 20, "length": 0.5, "points": 3},
        },
        detect={"detectors": [{"kind": "pca", "components": 3}], "sample": 200},
        compare={"top": 20},
        evaluate={"hosts": 6, "kinds": ["cosmic-ray", "extreme-lines"], "strengths": [1.0], "explained": 1},
        report={"score": "density", "spectra": 2, "table": 10},
        runtime={"workers": 1},
    )
    return experiment, run(experiment)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3-compatible server of our own, with one bucket; the environment leads there."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://127.0.0.1:{port}"
    facts = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in facts}
    os.environ.update(facts)
    urllib.request.urlopen(urllib.request.Request(f"{address}/surveys", method="PUT"))
    yield "s3://surveys"
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    server.stop()
