from pathlib import Path

import numpy as np
import pytest
import torch

from distspec.config import Experiment
from distspec.detectors.model import ModelDetector, ModelScores
from distspec.explainers.ascent import Path as Way
from distspec.explainers.ascent import ascend, growth
from distspec.explainers.lime import Lime
from distspec.layout import ascent_layer, explain_layer
from distspec.models.checkpoint import Checkpoint
from distspec.pipeline import Products
from distspec.scores import Scores
from distspec.stages.explain import ascents_of, explain, follow, ordinary_covariance
from distspec.store import SpectraStore
from tests.small import contents, small


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
    explain(experiment, SpectraStore.open(made.store.path, write=True), made.checkpoint, Scores([made.scores]))
    assert contents(folder) == before
    assert (folder / "weights/c/0/0").stat().st_mtime_ns == stamp


# --- the way to higher probability -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def direct(whole: tuple[Experiment, Products]) -> tuple[Experiment, Products, Way]:
    """The ways of the first unit of work, made without the stage.

    A whole one: rounding depends on the batch, and a way that follows a crease repeats every difference.
    """
    experiment, made = whole
    checkpoint = Checkpoint.load(made.checkpoint.folder)
    rows = made.ascents.read("row")[: made.ascents.shard_rows]
    latents = torch.from_numpy(made.scores.take("latents", rows)).double()
    covariance = torch.from_numpy(ordinary_covariance(made.scores))
    settings = experiment.explain.ascent
    return (
        experiment,
        made,
        ascend(
            checkpoint.density.log_prob, latents, steps=settings.steps, length=settings.length, covariance=covariance
        ),
    )


def test_the_top_of_the_density_is_followed_first_then_that_of_the_other_scores(
    whole: tuple[Experiment, Products],
) -> None:
    _, made = whole
    tops = [made.explanations[name].read("row").tolist() for name in ("density", "chi2")]
    expected = list(dict.fromkeys(tops[0] + tops[1]))
    assert made.ascents.read("row").tolist() == expected
    assert len(expected) > made.ascents.shard_rows  # two shards, so that actors are at work
    score = -made.ascents.read("log_prob")[:, 0]
    np.testing.assert_allclose(score, made.scores.take("density", np.array(expected)), rtol=1e-5, atol=1e-4)


def test_ways_are_those_of_a_direct_ascent(direct: tuple[Experiment, Products, Way]) -> None:
    experiment, made, path = direct
    layer = made.ascents
    part = slice(0, layer.shard_rows)
    np.testing.assert_allclose(layer.read("log_prob")[part], path.log_prob, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(layer.read("latents")[part], path.latents, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(layer.read("arc")[part], path.arc, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(layer.read("taken")[part], path.taken)
    assert (layer.read("log_prob")[:, -1] > layer.read("log_prob")[:, 0]).any()
    decode = made.checkpoint.model.decode
    grown = growth(path, lambda z: decode(z.float()))
    np.testing.assert_allclose(layer.read("growth")[part], grown, rtol=1e-3, atol=1e-3)
    spectra = layer.read("spectra")
    assert spectra.shape[1] == experiment.explain.ascent.points
    np.testing.assert_allclose(spectra[:, -1] - spectra[:, 0], layer.read("growth"), atol=1e-5)
    half = path.evenly(3)[:, 1]
    with torch.no_grad():
        np.testing.assert_allclose(spectra[part, 1], decode(half.float()), rtol=1e-3, atol=1e-3)
    # The way starts at what the model makes of the spectrum.
    rows = layer.read("row")[part]
    reconstruction = ModelScores(made.checkpoint, experiment.score).reconstruct(made.store.take(rows))
    np.testing.assert_allclose(spectra[part, 0], reconstruction, rtol=1e-4, atol=1e-4)


def test_the_classes_at_both_ends_are_the_most_probable(direct: tuple[Experiment, Products, Way]) -> None:
    _, made, path = direct
    layer = made.ascents
    posterior = made.scores.take("posterior", layer.read("row"))
    np.testing.assert_array_equal(layer.read("class")[:, 0], posterior.argmax(axis=1))
    np.testing.assert_allclose(layer.read("class_probability")[:, 0], posterior.max(axis=1), rtol=1e-4)
    end = made.checkpoint.density.posterior(path.latents[:, -1])
    np.testing.assert_allclose(layer.read("class_probability")[: len(end), 1], end.max(dim=1).values, atol=1e-3)
    assert layer.attributes["classes"] == list(made.checkpoint.density.names)


def test_only_unfinished_ways_are_made_again(whole: tuple[Experiment, Products]) -> None:
    experiment, made = whole
    folder = Path(made.store.path) / "layers" / made.ascents.name
    before = contents(folder)
    stamp = (folder / "arc/c/0/0").stat().st_mtime_ns
    (folder / "commits/c/1").unlink()
    layer = follow(experiment, SpectraStore.open(made.store.path, write=True), made.checkpoint, made.scores)
    assert layer.pending() == []
    assert contents(folder) == before
    assert (folder / "arc/c/0/0").stat().st_mtime_ns == stamp


def test_without_a_density_or_when_told_so_nothing_is_followed(
    done: tuple[Experiment, Products], whole: tuple[Experiment, Products]
) -> None:
    experiment, made = done
    assert made.ascents is None
    assert ascents_of(experiment, made.store, made.scores) is None
    assert not [name for name in made.store.layers() if name.startswith("ascent")]
    experiment, made = whole
    off = small(Path(experiment.output), explain={"ascent": False})
    assert off.explain.ascent is None
    assert follow(off, made.store, made.checkpoint, made.scores) is None
    assert ascents_of(off, made.store, made.scores) is None


def test_names_change_with_what_they_depend_on_alone(whole: tuple[Experiment, Products]) -> None:
    experiment, made = whole

    def named(**changes: object) -> tuple[str, str]:
        explain_settings = experiment.explain.model_copy(update=changes)
        changed = experiment.model_copy(update={"explain": explain_settings})
        return ascent_layer(changed, made.scores), explain_layer(changed, "chi2", made.scores)

    way, weights = named()
    assert named(samples=7)[0] == way
    assert named(samples=7)[1] != weights
    longer = experiment.explain.ascent.model_copy(update={"steps": 21})
    assert named(ascent=longer)[0] != way
    assert named(ascent=longer)[1] == weights
    assert named(scores=("density",))[0] != way


def test_ordinary_latents_are_those_of_the_sample_without_its_outliers(whole: tuple[Experiment, Products]) -> None:
    _, made = whole
    latents, score = made.scores.read("latents").astype(float), made.scores.read("density")
    known = ~np.isnan(score)
    kept = known & (score <= np.quantile(score[known], 0.99))
    np.testing.assert_allclose(ordinary_covariance(made.scores), np.cov(latents[kept].T), rtol=1e-6)
