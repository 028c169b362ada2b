"""The demo as a new user runs it."""

import re
import sys
from pathlib import Path

import pytest

from distspec.results.scores import Scores
from distspec.results.truth import pointing, recovery
from distspec.sources.simulation.anomalies import STRONG
from distspec.store import SpectraStore
from tests.support.processes import PATIENCE, finished


def demo(folder: Path, *overrides: str) -> str:
    done = finished([sys.executable, "-m", "distspec", "demo", *overrides], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
def test_a_small_demo_goes_the_whole_way_and_is_quiet(tmp_path: Path) -> None:
    methods = "explain.methods=[{kind='lime', samples=200}, {kind='imo', windows=[16, 64], baselines=2}]"
    fewer = ["ingest.source.spectra=1200", "train.epochs=4", methods, "evaluate.hosts=8", "detect.sample=800"]
    said = demo(tmp_path, *fewer, "evaluate.explained=1", "evaluate.strengths=[1.0]")
    assert re.search(r"store +distspec-demo/store.zarr: 1200 spectra, \d+ set aside", said)
    assert "report   distspec-demo/report.html" in said
    assert "runs     distspec ui demo" in said
    assert {path.name for path in tmp_path.iterdir()} == {"distspec-demo"}
    page = (tmp_path / "distspec-demo/report.html").read_text("utf-8")
    assert "extreme-lines" in page
    assert 'id="compare"' in page and 'id="evaluation"' in page


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
def test_the_demo_finds_the_strong_anomalies_and_points_at_them(tmp_path: Path) -> None:
    demo(tmp_path)
    store = SpectraStore.open(tmp_path / "distspec-demo/store.zarr")
    scores = store.layer(next(name for name in store.layers() if name.startswith("score")))
    found = recovery(store, Scores([scores]), 0.02)
    best = found.best(STRONG)
    assert found.recall(best, STRONG) > 0.6
    (explained,) = pointing(store, store.layer(next(one for one in store.layers() if one.startswith("explain-lime"))))
    hits = sum(explained.heaviest[kind] for kind in STRONG if kind in explained.heaviest)
    total = sum(explained.explained[kind] for kind in STRONG if kind in explained.explained)
    assert hits / total > 0.6
