"""Scores by the structure of a model equal those of versions that are written out; gradients equal differences."""

from typing import Any

import numpy as np
import pytest
import torch

from distspec import models
from distspec.config import Convolutional, Dense, Forest, Score, Sliced, Variational
from distspec.detectors.classical.forest import UnsupervisedForest
from distspec.detectors.explainable import Explainable
from distspec.detectors.neural.perturbed import QUADRATIC
from distspec.detectors.neural.scores import ModelScores
from distspec.errors import ConfigError
from distspec.models.autoencoders.dense import TwoStage
from distspec.models.autoencoders.ends import ends_of
from distspec.models.checkpoint import Checkpoint
from distspec.models.flows.density import LatentDensity
from distspec.models.flows.sliced import Sample, fit_sliced
from distspec.spectra import Spectra, WaveGrid
from distspec.spectra.perturbed import PerturbedSpectra

pytestmark = pytest.mark.numeric

SETTINGS = Score(metrics=("mad", "lp"), batch=64)


def density_of(model: Any, spectra: Spectra) -> LatentDensity:
    flux = torch.from_numpy(np.where(spectra.good, spectra.flux, np.float32(0)))
    with torch.no_grad():
        latents = model.encode(flux, torch.from_numpy(spectra.ivar))
    rows = torch.arange(len(latents))
    data = Sample(latents, torch.zeros_like(rows), rows, None)
    return LatentDensity(fit_sliced(Sliced(layers=3), data, data, 1, seed=0), ("all",)).eval()


def model_of(kind: str, grid: WaveGrid) -> Any:
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "dense": Dense(hidden=(24, 12), latents=4, scale="mean"),
        "flat": Dense(hidden=(), latents=4),
        "variational": Variational(hidden=(20, 10), latents=4),
        "convolutional": Convolutional(channels=(4, 2)),
    }
    if kind == "two":
        one, two = model_of("dense", grid), model_of("dense", grid)
        torch.nn.init.normal_(two.encoder[0].weight)  # another network, whose latents vary
        return TwoStage(one, two).eval()
    model = models.build(settings[kind], grid)
    model.settle(torch.linspace(0.5, 1.5, grid.pixels))
    return model.eval()


def scores_of(kind: str, spectra: Spectra) -> ModelScores:
    model = model_of(kind, spectra.grid)
    checkpoint = Checkpoint(model, Dense(), spectra.grid, "recipe", density=density_of(model, spectra))
    return ModelScores(checkpoint, SETTINGS)


def mixtures(spectra: Spectra, rng: np.random.Generator) -> dict[str, PerturbedSpectra]:
    pixels = spectra.grid.pixels
    one = spectra[[2]]
    cut = np.arange(pixels) // 13
    other = np.where(one.good[0], one.flux[0] * 0.9 + 0.1, np.nan).astype(np.float32)
    windows = np.stack([np.arange(pixels) // 16, np.arange(pixels) // 64 + (pixels - 1) // 16 + 1])
    windows[:, 5:9] = -1
    several = Spectra(np.arange(3), spectra.flux[:3], np.repeat(spectra.ivar[[7]], 3, axis=0), spectra.grid)
    return {
        "lime": PerturbedSpectra(one, other, cut[None], rng.random((200, cut[-1] + 1)) < 0.5),
        "imo": PerturbedSpectra(several, np.where(spectra.good[9], spectra.flux[9], 0).astype(np.float32), windows),
    }


@pytest.mark.parametrize("kind", ["dense", "flat", "variational", "two", "convolutional"])
@pytest.mark.parametrize("name", ["lime", "imo"])
def test_structure_gives_what_written_out_versions_give(
    kind: str, name: str, spectra: Spectra, rng: np.random.Generator
) -> None:
    model, mixture = scores_of(kind, spectra), mixtures(spectra, rng)[name]
    assert (ends_of(model.model) is None) == (kind == "convolutional")
    few = (QUADRATIC, ("chi2",), ("relative_trimmed", "mse"), ("density",), ("density", "mse_filtered"))
    for wanted in (model.names, *few):
        fast, plain = Explainable(wanted, model), Explainable(wanted, model, exact=False)
        count = mixture.versions
        found, expected = fast.versions(mixture)(0, count), plain.versions(mixture)(0, count)
        assert found.shape == (len(mixture.base), count, len(wanted))
        np.testing.assert_allclose(found, expected, rtol=2e-4)
        np.testing.assert_allclose(fast.versions(mixture)(5, 11), expected[:, 5:11], rtol=2e-4)
        written = np.concatenate([plain(mixture.spectra(0, 0, count))])
        np.testing.assert_allclose(written, expected[0], rtol=2e-4)


def test_what_is_written_out_is_the_mixture(spectra: Spectra, rng: np.random.Generator) -> None:
    mixture = mixtures(spectra, rng)["lime"]
    whole = mixture.spectra(0, 3, 6)
    for index, switched in enumerate(mixture.switched[3:6]):
        instead = switched[mixture.segment_of[0]]
        np.testing.assert_array_equal(whole.flux[index], np.where(instead, mixture.other, mixture.base.flux[0]))
    alone = mixtures(spectra, rng)["imo"]
    assert alone.versions == alone.segment_of.max() + 1
    for version in (0, 1, alone.versions - 1):
        changed = alone.spectra(1, version, version + 1).flux[0] != alone.base.flux[1]
        np.testing.assert_array_equal(changed, (alone.segment_of == version).any(axis=0))
        assert changed.any()


def test_masks_must_agree_and_shapes_must_fit(spectra: Spectra, rng: np.random.Generator) -> None:
    mixture = mixtures(spectra, rng)["imo"]
    different = PerturbedSpectra(spectra[:2], mixture.other, mixture.segment_of)
    with pytest.raises(ValueError, match="different masks"):
        Explainable(("mse",), scores_of("dense", spectra)).versions(different)
    with pytest.raises(ValueError, match="pixels"):
        PerturbedSpectra(spectra[:1], mixture.other[:-1], mixture.segment_of)
    with pytest.raises(ValueError, match="columns"):
        PerturbedSpectra(spectra[:1], mixture.other, mixture.segment_of, np.zeros((3, 2), bool))


def test_numbers_beyond_a_float_are_scored_as_plainly_as_ever(spectra: Spectra) -> None:
    model = scores_of("dense", spectra)
    flux = spectra.flux[[2]].copy()
    flux[0, spectra.good[2].argmax()] = 1e30
    one = Spectra(np.array([2]), flux, spectra.ivar[[2]], spectra.grid)
    mixture = PerturbedSpectra(
        one, np.ones(spectra.grid.pixels, np.float32), np.arange(spectra.grid.pixels)[None] // 50
    )
    found = Explainable(QUADRATIC, model).versions(mixture)(0, mixture.versions)
    expected = Explainable(QUADRATIC, model, exact=False).versions(mixture)(0, mixture.versions)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_classical_detectors_stand_beside_a_model(spectra: Spectra, rng: np.random.Generator) -> None:
    settings = Forest(trees=5, depth=4)
    forest = UnsupervisedForest.assemble(
        settings,
        spectra.grid,
        [UnsupervisedForest.grow(settings, spectra, 0, part) for part in range(UnsupervisedForest.parts(settings))],
    )
    while forest.looking:
        forest = forest.learn(forest.look(spectra))
    model = scores_of("dense", spectra)
    both = Explainable(("forest", "mse"), model, {"forest": forest})
    found = both(spectra)
    np.testing.assert_array_equal(found[:, 0], forest.score(spectra))
    np.testing.assert_array_equal(found[:, 1], model.some(spectra, ("mse",))[:, 0])
    mixture = mixtures(spectra, rng)["lime"]
    np.testing.assert_array_equal(both.versions(mixture)(0, 40)[0], both(mixture.spectra(0, 0, 40)))
    alone = Explainable(("forest",), None, {"forest": forest})
    assert not alone.has_model
    for question in (lambda: alone.reconstruct(spectra), lambda: alone.gradient_of("forest", spectra)):
        with pytest.raises(ConfigError, match="model"):
            question()
    with pytest.raises(ConfigError, match="no score 'isolation' to explain, only mse"):
        Explainable(("isolation",), model)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "variational", "two"])
def test_every_score_can_be_differentiated_and_equals_itself(kind: str, spectra: Spectra) -> None:
    model = scores_of(kind, spectra)
    scores = Explainable(model.names, model)
    expected = scores(spectra)
    for place, name in enumerate(model.names):
        function, others, flux = scores.gradient_of(name, spectra)
        leaf = flux.clone().requires_grad_()
        found = function(leaf, *others)
        np.testing.assert_allclose(found.detach(), expected[:, place], rtol=1e-4, err_msg=name)
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
        assert torch.isfinite(gradient).all(), name
        assert (gradient[torch.from_numpy(~spectra.good)] == 0).all(), name


def test_gradients_are_those_of_small_differences(spectra: Spectra) -> None:
    model = scores_of("dense", spectra)
    scores = Explainable(("mse", "chi2", "relative_filtered"), model)
    model.model.double()
    for name in scores.names:
        function, others, flux = scores.gradient_of(name, spectra[:3])
        others = tuple(None if one is None else one.double() if one.is_floating_point() else one for one in others)
        leaf = flux.double().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf, *others).sum(), leaf)
        pixel = int(np.flatnonzero(spectra.good[:3].all(axis=0))[40])
        step = torch.zeros_like(leaf)
        step[:, pixel] = 1e-5
        with torch.no_grad():
            slope = (function(leaf + step, *others) - function(leaf - step, *others)) / 2e-5
        np.testing.assert_allclose(gradient[:, pixel], slope, rtol=1e-5)
