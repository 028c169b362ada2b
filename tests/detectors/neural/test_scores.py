"""Other latents of a spectrum decode in the unit of the store, at its redshift and as bright as its reconstruction."""

import numpy as np
import pytest
import torch

from distspec import models
from distspec.config import Architecture, Convolutional, Dense, Redshifted, Score, Variational
from distspec.detectors.neural.scores import ModelScores
from distspec.models.checkpoint import Checkpoint
from distspec.spectra import Spectra, WaveGrid
from tests.conftest import make_spectra

GRID = WaveGrid.between("log", 3600.0, 7200.0, 160)


@pytest.mark.parametrize("two_stage", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        Dense(hidden=(16,), latents=3),
        Variational(hidden=(16,), latents=3),
        Convolutional(channels=(4, 2)),
        Convolutional(channels=(4, 2), scaling="range"),
        Redshifted(hidden=(16,), latents=3),
        Redshifted(hidden=(16,), latents=3, fit_amplitude=True),
    ],
    ids=["dense", "variational", "convolutional", "convolutional-range", "redshifted", "redshifted-fit"],
)
def test_a_spectrums_own_latents_decode_to_its_reconstruction(
    settings: Architecture, two_stage: bool, rng: np.random.Generator
) -> None:
    torch.manual_seed(1)
    model = models.build(settings, GRID, two_stage=two_stage)
    plain = make_spectra(rng, GRID, 6)
    redshift = np.linspace(0.0, 0.3, 6) if settings.kind == "redshifted" else None
    spectra = Spectra(plain.rows, 7.0 * plain.flux, plain.ivar, GRID, redshift)
    scores = ModelScores(Checkpoint(model.eval(), settings, GRID, "recipe"), Score())
    latents = torch.from_numpy(scores(spectra).latents)
    decoded = scores.decoder(spectra)(latents)
    assert not decoded.requires_grad
    np.testing.assert_allclose(decoded, scores.reconstruct(spectra), rtol=1e-4, atol=1e-4)


def test_pixels_beyond_the_reach_of_a_rest_frame_model_are_not_judged(rng: np.random.Generator) -> None:
    torch.manual_seed(1)
    settings = Redshifted(hidden=(16,), latents=3, z_max=0.2)
    model = models.build(settings, GRID).eval()
    plain = make_spectra(rng, GRID, 4)
    spectra = Spectra(plain.rows, plain.flux, plain.ivar, GRID, np.array([0.1, 0.2, 0.3, 0.5]))
    scores = ModelScores(Checkpoint(model, settings, GRID, "recipe"), Score())
    rest = GRID.wave / (1 + spectra.redshift[:, None])
    judged = spectra.good & (rest >= GRID.wave[0] / 1.2)
    left = np.where(judged, spectra.flux - scores.reconstruct(spectra), 0.0)
    expected = (left**2 * spectra.ivar).sum(axis=1) / judged.sum(axis=1)
    assert judged.sum(axis=1)[3] < 0.8 * judged.sum(axis=1)[0]
    np.testing.assert_allclose(scores.some(spectra, ("chi2",))[:, 0], expected, rtol=1e-4)
    np.testing.assert_allclose(scores(spectra).scores[:, scores.names.index("chi2")], expected, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("redshifted", [False, True])
def test_scores_on_a_gpu_are_those_of_the_processor(rng: np.random.Generator, device: str, redshifted: bool) -> None:
    torch.manual_seed(1)
    settings = Redshifted(hidden=(16,), latents=3) if redshifted else Dense(hidden=(16,), latents=3)
    plain = make_spectra(rng, GRID, 50)
    spectra = Spectra(plain.rows, plain.flux, plain.ivar, GRID, np.linspace(0, 0.3, 50) if redshifted else None)
    here, there = (
        ModelScores(Checkpoint(models.build(settings, GRID).eval(), settings, GRID, "recipe"), Score(batch=7), place)
        for place in ("cpu", device)
    )
    there.model.load_state_dict(here.model.state_dict())
    for one, two in zip(here(spectra), there(spectra), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(here.some(spectra, ("mse",)), there.some(spectra, ("mse",)), rtol=1e-3)
    assert there.some(spectra[:0], ("mse",)).shape == (0, 1)
