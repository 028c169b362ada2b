"""Bad and altered spectra from the recipe to the score: what must change nothing, and what must change something.

The laws of the scores alone stand in tests/detectors, those of the stages in tests/stages.
"""

from typing import Any

import numpy as np
import pytest

from distspec.config import Cuts, Grid, Prepare, Score, Sky
from distspec.detectors.neural.scores import ModelScores
from distspec.models.checkpoint import Checkpoint
from distspec.prepare.recipe import Recipe
from distspec.spectra import Columns, Spectra, WaveGrid

SURVEY = WaveGrid("log", 3400.0, 1e-4, 4000)
RECIPE = Prepare(grid=Grid(first=3600.0, last=7200.0, pixels=300), sky=Sky(mode="none"), cuts=Cuts(coverage_min=0.0))


@pytest.fixture
def observed(rng: np.random.Generator) -> tuple[Spectra, Columns]:
    flux = 5 + np.sin(SURVEY.wave / 300) + rng.normal(0, 0.3, (12, SURVEY.pixels))
    ivar = np.where(rng.random(flux.shape) < 0.03, 0, rng.uniform(2, 20, flux.shape))
    columns: Columns = {
        "z": np.linspace(0.01, 0.06, 12),
        "zwarn": np.zeros(12, np.int64),
        "class": np.full(12, "GALAXY"),
        "status": np.zeros(12, np.int32),
    }
    return Spectra(np.arange(12), flux.astype(np.float32), ivar.astype(np.float32), SURVEY), columns


@pytest.fixture
def score(checkpoint: Checkpoint) -> Any:
    scores, recipe = ModelScores(checkpoint, Score(), "cpu"), Recipe(RECIPE, SURVEY)
    assert recipe.grid.pixels == checkpoint.grid.pixels

    def chain(spectra: Spectra, columns: Columns) -> np.ndarray:
        prepared, _ = recipe(spectra, columns)
        on_grid = Spectra(prepared.rows, prepared.flux, prepared.ivar, checkpoint.grid)
        return np.asarray(scores(on_grid)[0])

    return chain


def test_b2_masked_pixels_have_no_influence_on_any_score(observed: Any, score: Any) -> None:
    spectra, columns = observed
    before = score(spectra, columns)
    for rubbish in (np.nan, np.inf, -1e30, 3e38):
        flux = np.where(spectra.ivar > 0, spectra.flux, np.float32(rubbish))
        assert score(Spectra(spectra.rows, flux, spectra.ivar, SURVEY), columns).tobytes() == before.tobytes()


def test_b11_duplicates_score_the_same(observed: Any, score: Any) -> None:
    spectra, columns = observed
    twice = np.repeat(np.arange(12), 2)
    scores = score(spectra[twice], {name: column[twice] for name, column in columns.items()})
    np.testing.assert_allclose(scores[::2], scores[1::2], rtol=2e-6)


def test_b12_order_and_batch_do_not_matter(observed: Any, score: Any, rng: np.random.Generator) -> None:
    spectra, columns = observed
    whole = score(spectra, columns)
    for index in (rng.permutation(12), np.array([7]), np.arange(3, 9)):
        part = score(spectra[index], {name: column[index] for name, column in columns.items()})
        np.testing.assert_allclose(part, whole[index], rtol=2e-6)


def test_b13_a_factor_changes_no_score_and_a_shift_does(observed: Any, score: Any) -> None:
    """The recipe divides by the median, so scores know no brightness; they know every wavelength."""
    spectra, columns = observed
    whole = score(spectra, columns)
    for factor in (8.0, 0.125):  # powers of two: exact
        bright = Spectra(spectra.rows, np.float32(spectra.flux * factor), np.float32(spectra.ivar / factor**2), SURVEY)
        assert score(bright, columns).tobytes() == whole.tobytes()
    bright = Spectra(spectra.rows, np.float32(spectra.flux * 3), np.float32(spectra.ivar / 9), SURVEY)
    np.testing.assert_allclose(score(bright, columns), whole, rtol=1e-5)
    shifted = Spectra(spectra.rows, np.roll(spectra.flux, 13, axis=1), np.roll(spectra.ivar, 13, axis=1), SURVEY)
    assert (score(shifted, columns) != whole).all()


def test_b14_an_artefact_in_survey_pixels_raises_the_score(observed: Any, score: Any) -> None:
    spectra, columns = observed
    flux = spectra.flux.copy()
    near = np.abs(SURVEY.wave - 5500) < 15
    flux[4, near] += 60
    ivar = np.where(near, np.maximum(spectra.ivar, 1), spectra.ivar).astype(np.float32)
    before = score(Spectra(spectra.rows, spectra.flux, ivar, SURVEY), columns)
    after = score(Spectra(spectra.rows, flux, ivar, SURVEY), columns)
    assert after[4, 0] > before[4, 0]
    assert after[4, 0] == after[:, 0].max()
    np.testing.assert_allclose(np.delete(after, 4, axis=0), np.delete(before, 4, axis=0), rtol=2e-6)
