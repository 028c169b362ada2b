from pathlib import Path

import numpy as np

from distspec.config import Experiment
from distspec.detectors.model import ModelDetector, ModelScores
from distspec.explainers.lime import Lime
from distspec.pipeline import Products
from distspec.stages.explain import explain
from distspec.store import SpectraStore
from tests.small import contents


def test_the_top_of_each_score_is_explained_best_first(done: tuple[Experiment, Products]) -> None:
    experiment, made = done
    assert set(made.explanations) == {"mse", "chi2"}
    for name, layer in made.explanations.items():
        values = made.scores.read(name)
        order = np.argsort(-values, kind="stable")[: int(np.ceil(0.05 * np.isfinite(values).sum()))]
        np.testing.assert_array_equal(layer.read("row"), order)
        assert layer.read("weights").shape == (len(order), 40)
        assert len(layer.attributes["segment_of"]) == made.store.grid.pixels
        assert np.isfinite(layer.read("weights")).all()
        assert (layer.read("r2") <= 1).all()
    assert experiment.explain.segments == 40


def test_workers_explain_as_one_process_does(done: tuple[Experiment, Products]) -> None:
    experiment, made = done
    layer = made.explanations["mse"]
    rows = layer.read("row")[:3]
    detector = ModelDetector(ModelScores(made.checkpoint, experiment.score), "mse")
    local = Lime(experiment.explain, made.store.grid.pixels, experiment.seed).explain(
        detector.score, made.store.take(rows)
    )
    np.testing.assert_allclose(layer.read("weights")[:3], local.weights, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(layer.read("r2")[:3], local.r2, atol=1e-3)
    np.testing.assert_allclose(layer.read("intercept")[:3], local.intercept, rtol=1e-4)
    assert local.pixel_weights.shape == (3, made.store.grid.pixels)


def test_only_unfinished_explanations_are_made_again(done: tuple[Experiment, Products]) -> None:
    experiment, made = done
    folder = Path(made.store.path) / "layers" / made.explanations["mse"].name
    before = contents(folder)
    stamp = (folder / "weights/c/0/0").stat().st_mtime_ns
    (folder / "commits/c/1").unlink()
    explain(experiment, SpectraStore.open(made.store.path, write=True), made.checkpoint, made.scores)
    assert contents(folder) == before
    assert (folder / "weights/c/0/0").stat().st_mtime_ns == stamp
