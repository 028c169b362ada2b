"""The scores against a plain implementation of their definition, and the laws that hold for any model."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distspec.config import Dense, Score
from distspec.detectors.neural.reconstruction import SCORES, reconstruction_scores, scores_of
from distspec.detectors.neural.scores import ModelDetector, ModelScores
from distspec.errors import ConfigError
from distspec.models.autoencoders.dense import DenseAutoencoder
from distspec.models.checkpoint import Checkpoint
from distspec.spectra import Spectra, WaveGrid
from distspec.spectra.lines.wavelengths import EMISSION, near_lines

pytestmark = pytest.mark.numeric

ROUNDING = 2e-6
"""A row's place in a batch changes the order in which matrix products add; this much the scores may then differ."""


def plain_scores(
    flux: np.ndarray,
    ivar: np.ndarray,
    reconstruction: np.ndarray,
    away: np.ndarray,
    settings: Score,
    names: tuple[str, ...] = SCORES[:8],
    power: float = 2.0,
) -> np.ndarray:
    """Do what the definition says, one spectrum and one score at a time, in double precision."""
    table = np.full((len(flux), 9), np.nan)
    for row in range(len(flux)):
        good = ivar[row] > 0
        if not good.any():
            continue
        for column, name in enumerate(names):
            keep = good & away[row % len(away)] if "filtered" in name else good
            x, y = flux[row, keep].astype(float), reconstruction[row, keep].astype(float)
            r = np.abs(y - x)
            if "trimmed" in name and len(r):
                kept = int(0.01 * settings.trim_percentage * len(r))
                chosen = np.argpartition(r, kept - 1)[:kept] if kept else np.zeros(0, int)
                x, r = x[chosen], r[chosen]
            q = r**power
            if "relative" in name:
                q = q / (np.maximum(x, 0) + settings.epsilon)
            table[row, column] = q.sum() ** (1 / power)
        d = flux[row, good].astype(float) - reconstruction[row, good].astype(float)
        table[row, 8] = (d**2 * ivar[row, good]).sum() / good.sum()
    return table


def computed(
    flux: np.ndarray, ivar: np.ndarray, reconstruction: np.ndarray, away: np.ndarray, settings: Score | None = None
) -> np.ndarray:
    tensors = (torch.from_numpy(np.ascontiguousarray(values)) for values in (flux, ivar, reconstruction, away))
    return reconstruction_scores(*tensors, settings or Score()).numpy()


def sample(rng: np.random.Generator, count: int, pixels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Fluxes on both sides of zero, residuals over three decades, masked pixels, rows with different filters."""
    flux = rng.normal(0.7, 1, (count, pixels)).astype(np.float32)
    ivar = (rng.uniform(1, 100, flux.shape) * (rng.random(flux.shape) > 0.1)).astype(np.float32)
    residual = rng.normal(size=flux.shape) * 10 ** rng.uniform(-2, 1, flux.shape)
    return flux, ivar, (flux + residual).astype(np.float32), rng.random(flux.shape) > 0.05


def sure(rng: np.random.Generator, pixels: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One ordinary spectrum, all good and away from lines."""
    flux = np.ones((1, pixels), np.float32)
    reconstruction = (flux + 0.1 * rng.normal(size=flux.shape)).astype(np.float32)
    return flux, np.full_like(flux, 100), reconstruction, np.ones((1, pixels), bool)


@pytest.fixture
def scores(checkpoint: Checkpoint, device: str) -> ModelScores:
    return ModelScores(checkpoint, Score(batch=16), device)


# --- definition ------------------------------------------------------------------------------------------------------


def test_the_names_are_the_nine_scores_in_order() -> None:
    assert SCORES == (
        "mse",
        "mse_filtered",
        "mse_trimmed",
        "mse_filtered_trimmed",
        "relative",
        "relative_filtered",
        "relative_trimmed",
        "relative_filtered_trimmed",
        "chi2",
    )


@pytest.mark.parametrize("percentage", [97.0, 50.0, 100.0])
def test_the_metrics_that_are_asked_for_follow_with_their_own_exponent(
    rng: np.random.Generator, percentage: float
) -> None:
    flux, ivar, reconstruction, away = sample(rng, 25, 120)
    flux[3, 5], ivar[3, 5], ivar[7] = np.nan, 0, 0
    settings = Score(metrics=("mad", "lp"), trim_percentage=percentage)
    names = scores_of(settings)
    found = computed(flux, ivar, reconstruction, away, settings)
    assert names[:9] == SCORES and len(names) == found.shape[1] == 25
    assert names[9] == "mad" and names[16] == "mad_relative_filtered_trimmed" and names[17] == "lp"
    for start, power in ((9, 1.0), (17, 0.33)):
        mine = names[start : start + 8]
        expected = plain_scores(flux, ivar, reconstruction, away, settings, mine, power)[:, :8]
        np.testing.assert_allclose(found[:, start : start + 8], expected, rtol=1e-5)
    assert np.isnan(found[7]).all() and np.isfinite(np.delete(found, 7, axis=0)).all()


@pytest.mark.parametrize("pixels", [1, 2, 33, 34, 300])
@pytest.mark.parametrize("percentage", [97.0, 50.0, 100.0, 1.0])
@pytest.mark.parametrize("common", [False, True])
def test_all_scores_equal_their_definition(
    rng: np.random.Generator, pixels: int, percentage: float, common: bool
) -> None:
    flux, ivar, reconstruction, away = sample(rng, 25, pixels)
    if common:
        away = away[:1]
    settings = Score(trim_percentage=percentage)
    with np.errstate(all="raise"):
        expected = plain_scores(flux, ivar, reconstruction, away, settings)
    found = computed(flux, ivar, reconstruction, away, settings)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-30)
    assert found.dtype == np.float32


@settings(deadline=None)
@given(pixels=st.integers(1, 400), percentage=st.floats(0.5, 100))
def test_trimming_keeps_a_truncated_share(pixels: int, percentage: float) -> None:
    # Residuals of one: the square of the score counts the pixels that are kept.
    ones = np.ones((1, pixels), np.float32)
    found = computed(0 * ones, ones, ones, ones > 0, Score(trim_percentage=percentage))
    assert round(float(found[0, 2]) ** 2) == int(0.01 * percentage * pixels)


def test_the_paper_grid_keeps_3659_pixels_of_3773() -> None:
    ones = np.ones((1, 3773), np.float32)
    assert round(float(computed(0 * ones, ones, ones, ones > 0)[0, 2]) ** 2) == 3659


def test_trimming_acts_after_the_filter() -> None:
    # 100 pixels; the three largest residuals are near lines. Filtered, 97 remain and int(94.09) of them are kept.
    flux = np.zeros((1, 100), np.float32)
    ivar = np.ones_like(flux)
    away = np.ones((1, 100), bool)
    away[0, :3] = False
    reconstruction = np.ones_like(flux)
    reconstruction[0, :3] = 100
    reconstruction[0, 3:6] = 10
    found = dict(zip(SCORES, computed(flux, ivar, reconstruction, away)[0], strict=True))
    assert found["mse_trimmed"] == pytest.approx(np.sqrt(94 + 3 * 100))
    assert found["mse_filtered"] == pytest.approx(np.sqrt(94 + 3 * 100))
    assert found["mse_filtered_trimmed"] == pytest.approx(np.sqrt(94))


def test_trimming_acts_before_the_flux_weights() -> None:
    # The largest residual lies on a bright pixel, the largest weighted one on a faint pixel: the first is dropped.
    flux = np.ones((1, 33), np.float32)
    reconstruction = flux + np.float32(0.5)
    flux[0, 0], reconstruction[0, 0] = 1e6, 1e6 + 4
    flux[0, 1], reconstruction[0, 1] = 0.0, 2.0
    found = dict(zip(SCORES, computed(flux, np.ones_like(flux), reconstruction, flux > -1)[0], strict=True))
    expected = 4 / 1e-3 + 31 * 0.25 / 1.001  # int(0.97 * 33) = 32 are kept
    assert found["relative_trimmed"] == pytest.approx(np.sqrt(expected), rel=1e-5)


def test_keeping_everything_is_not_trimming(rng: np.random.Generator) -> None:
    found = computed(*sample(rng, 10, 80), Score(trim_percentage=100.0))
    for plain, trimmed in ((0, 2), (1, 3), (4, 6), (5, 7)):
        assert (found[:, plain] == found[:, trimmed]).all()


def test_negative_fluxes_weigh_like_zero(rng: np.random.Generator) -> None:
    flux, ivar, reconstruction, away = sure(rng)
    dark = computed(0 * flux, ivar, reconstruction - flux, away)
    darker = computed(0 * flux - 3, ivar, reconstruction - flux - 3, away)
    assert np.isfinite(darker).all()
    np.testing.assert_allclose(darker, dark, rtol=1e-5)


def test_chi2_is_the_weighted_square_per_good_pixel(rng: np.random.Generator) -> None:
    flux, ivar, reconstruction, away = sample(rng, 6, 50)
    found = computed(flux, ivar, reconstruction, away)[:, SCORES.index("chi2")]
    expected = (ivar * (flux.astype(float) - reconstruction) ** 2).sum(axis=1) / (ivar > 0).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_chi2_of_pure_noise_is_near_one(rng: np.random.Generator) -> None:
    truth = np.ones((200, 500), np.float32)
    sigma = rng.uniform(0.01, 0.5, truth.shape)
    flux = (truth + sigma * rng.normal(size=truth.shape)).astype(np.float32)
    found = computed(flux, (sigma**-2).astype(np.float32), truth, truth > 0)[:, 8]
    # The variance of chi-squared per pixel is 2 / pixels.
    assert abs(found.mean() - 1) < 4 * np.sqrt(2 / 500 / 200)
    assert found.std() == pytest.approx(np.sqrt(2 / 500), rel=0.2)


# --- extremes --------------------------------------------------------------------------------------------------------


def test_a_perfect_reconstruction_scores_zero(rng: np.random.Generator) -> None:
    flux, ivar, _, away = sample(rng, 5, 40)
    assert (computed(flux, ivar, flux, away) == 0).all()


@pytest.mark.parametrize("spike", [1e19, -1e19, 1e25, 1e30, -1e30, 3e38])
def test_a_spike_overflows_nothing_and_is_trimmed_away(rng: np.random.Generator, spike: float) -> None:
    flux, ivar, reconstruction, away = sure(rng)
    away[0, 5] = False
    calm = computed(flux, ivar, reconstruction, away)[0]
    flux[0, 5] = spike
    found = computed(flux, ivar, reconstruction, away)[0]
    assert np.isfinite(found).all()
    assert found[SCORES.index("mse")] == pytest.approx(abs(spike), rel=1e-6)
    assert found[SCORES.index("chi2")] > 1e37 or abs(spike) < 1e20
    weighted = np.sqrt(spike) if spike > 0 else -spike / np.sqrt(1e-3)
    assert found[SCORES.index("relative")] == pytest.approx(min(weighted, 3.4028235e38), rel=1e-6)
    # What is left when the spike's pixel is filtered or trimmed is an ordinary spectrum's score, and not zero.
    for column, name in enumerate(SCORES[:8]):
        if "filtered" in name:
            assert found[column] == calm[column], name
        elif "trimmed" in name:
            assert 0.7 * calm[column] < found[column] <= 1.1 * calm[column], name


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-20])
def test_tiny_residuals_do_not_vanish(size: float) -> None:
    flux = np.zeros((1, 100), np.float32)
    reconstruction = np.full_like(flux, size)
    found = computed(flux, np.ones_like(flux), reconstruction, flux == 0)[0]
    assert found[0] == pytest.approx(10 * float(np.float32(size)), rel=1e-6)


def test_a_spectrum_without_a_good_pixel_has_no_score_and_disturbs_none(rng: np.random.Generator) -> None:
    flux, ivar, reconstruction, away = sample(rng, 6, 60)
    before = computed(flux, ivar, reconstruction, away)
    ivar[2] = 0
    flux[2] = np.nan
    after = computed(flux, ivar, reconstruction, away)
    assert np.isnan(after[2]).all()
    others = [0, 1, 3, 4, 5]
    assert after[others].tobytes() == before[others].tobytes()


def test_of_equal_residuals_the_choice_does_not_depend_on_the_batch(rng: np.random.Generator) -> None:
    # Few different residuals on many different fluxes: which of the equal ones is dropped changes the weighted scores.
    flux = rng.uniform(0.5, 1.5, (8, 1000)).astype(np.float32).round(3)
    residual = rng.integers(0, 4, flux.shape) / np.float32(4)
    reconstruction = (flux.astype(np.float64) + residual).astype(np.float32)
    flux = (reconstruction - residual).astype(np.float32)
    reconstruction = flux + residual.astype(np.float32)
    ivar = (rng.random(flux.shape) > np.linspace(0, 0.7, 8)[:, None]).astype(np.float32)
    away = rng.random(flux.shape) > 0.1
    together = computed(flux, ivar, reconstruction, away)
    for row in range(8):
        part = slice(row, row + 1)
        alone = computed(flux[part], ivar[part], reconstruction[part], away[part])
        np.testing.assert_allclose(alone, together[part], rtol=1e-6)


# --- a model's scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30, -7.0])
def test_masked_pixels_change_no_bit(spectra: Spectra, scores: ModelScores, garbage: float) -> None:
    assert (~spectra.good).any(axis=1).sum() > 30
    other = Spectra(spectra.rows, np.where(spectra.good, spectra.flux, np.float32(garbage)), spectra.ivar, spectra.grid)
    (first, first_latents, *_), (second, second_latents, *_) = scores(spectra), scores(other)
    assert np.isfinite(first).all()
    assert first.tobytes() == second.tobytes()
    assert first_latents.tobytes() == second_latents.tobytes()
    assert scores.reconstruct(spectra).tobytes() == scores.reconstruct(other).tobytes()


@pytest.mark.slow
@settings(deadline=None)
@given(data=st.data())
def test_any_value_in_a_masked_pixel_changes_no_bit(data: st.DataObject) -> None:
    generator = np.random.default_rng(1)
    flux, ivar, reconstruction, away = sample(generator, 3, 40)
    fill = data.draw(st.lists(st.floats(width=32), min_size=120, max_size=120))
    other = np.where(ivar > 0, flux, np.array(fill, np.float32).reshape(3, 40))
    changed = computed(other, ivar, reconstruction, away)
    assert changed.tobytes() == computed(flux, ivar, reconstruction, away).tobytes()


def test_the_scores_are_those_of_the_models_reconstruction(spectra: Spectra, scores: ModelScores) -> None:
    found, latents, *_ = scores(spectra)
    away = ~near_lines(spectra.grid, 250.0)
    assert 0 < (~away).sum() < 60
    expected = plain_scores(spectra.flux, spectra.ivar, scores.reconstruct(spectra), away, Score())
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.shape == (40, 9)
    assert latents.shape == (40, 4)
    assert found.dtype == latents.dtype == np.float32


def test_errors_are_mean_and_root_mean_square_of_what_is_left(spectra: Spectra, scores: ModelScores) -> None:
    found, left = scores(spectra), spectra.flux - scores.reconstruct(spectra)
    for row, (residual, good) in enumerate(zip(left.astype(float), spectra.good, strict=True)):
        assert found.difference[row] == pytest.approx(residual[good].mean(), rel=1e-4, abs=1e-6)
        assert found.rmse[row] == pytest.approx(np.sqrt((residual[good] ** 2).mean()), rel=1e-5)
    blind = Spectra(spectra.rows[:1], spectra.flux[:1], np.zeros_like(spectra.ivar[:1]), spectra.grid)
    assert np.isnan(scores(blind).rmse).all() and np.isnan(scores(blind).difference).all()


def test_scores_do_not_depend_on_the_batch(spectra: Spectra, checkpoint: Checkpoint, device: str) -> None:
    scores = ModelScores(checkpoint, Score(batch=8), device)
    whole, latents, *_ = scores(spectra)
    # Cut where the passes through the model are cut anyway, nothing can differ.
    parts = [scores(spectra[start : start + 16]) for start in range(0, 40, 16)]
    assert np.concatenate([part[0] for part in parts]).tobytes() == whole.tobytes()
    assert np.concatenate([part[1] for part in parts]).tobytes() == latents.tobytes()
    # Elsewhere the model's matrix products add in another order.
    for cut in (1, 3, 21):
        parts = [scores(spectra[:cut]), scores(spectra[cut:])]
        np.testing.assert_allclose(np.concatenate([part[0] for part in parts]), whole, rtol=ROUNDING)
    large, *_ = ModelScores(checkpoint, Score(batch=1000), device)(spectra)
    np.testing.assert_allclose(large, whole, rtol=ROUNDING)


def test_scores_follow_a_permutation_of_rows(spectra: Spectra, scores: ModelScores, rng: np.random.Generator) -> None:
    order = rng.permutation(len(spectra))
    np.testing.assert_allclose(scores(spectra[order])[0], scores(spectra)[0][order], rtol=ROUNDING)


def test_duplicates_get_the_same_scores(spectra: Spectra, scores: ModelScores, rng: np.random.Generator) -> None:
    found, latents, *_ = scores(spectra[np.repeat(np.arange(8), 2)])
    np.testing.assert_allclose(found[::2], found[1::2], rtol=ROUNDING)
    np.testing.assert_allclose(latents[::2], latents[1::2], atol=1e-6)
    # From the same reconstruction no bit differs.
    twice = (np.repeat(values, 2, axis=0) for values in sample(rng, 8, 200))
    exact = computed(*twice)
    assert exact[::2].tobytes() == exact[1::2].tobytes()


def test_a_line_raises_every_score_that_sees_it(spectra: Spectra, scores: ModelScores, device: str) -> None:
    # 16 pixels: more than the 9 that trimming drops, away from every filtered line.
    near = near_lines(spectra.grid, 250.0)[0]
    place = next(start for start in range(60, 250) if not near[start - 2 : start + 18].any())
    flux = spectra.flux.copy()
    flux[:, place : place + 16] += 3
    lined = Spectra(spectra.rows, flux, spectra.ivar, spectra.grid)
    before, after = scores(spectra)[0], scores(lined)[0]
    for column, name in enumerate(SCORES):
        if "relative" not in name:
            assert (after[:, column] > before[:, column]).all(), name
        # A bright line weighs less by its own flux, but still raises the score.
        assert np.median(after[:, column]) > np.median(before[:, column]), name


def blind(grid: WaveGrid) -> Checkpoint:
    """A model that answers 1 everywhere, whatever it sees."""
    settings = Dense(hidden=(), latents=1)
    model = DenseAutoencoder(settings, grid)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.mean += 1
    return Checkpoint(model.eval(), settings, grid, "recipe")


def test_a_difference_on_line_pixels_leaves_filtered_scores_alone(spectra: Spectra, device: str) -> None:
    scores = ModelScores(blind(spectra.grid), Score(), device)
    near = near_lines(spectra.grid, 250.0)[0]
    flux = spectra.flux.copy()
    flux[:, near] += np.float32(3)
    lined = Spectra(spectra.rows, flux, spectra.ivar, spectra.grid)
    before, after = scores(spectra)[0], scores(lined)[0]
    seen = (spectra.good & near).any(axis=1)
    assert seen.all()
    for column, name in enumerate(SCORES):
        if "filtered" in name:
            assert before[:, column].tobytes() == after[:, column].tobytes(), name
        elif "trimmed" not in name:
            assert (before[:, column] != after[:, column]).all(), name


def test_in_the_observed_frame_the_filter_moves_with_the_redshift(spectra: Spectra, device: str) -> None:
    # Every spectrum gets a spike at its own H beta; a batch of 16 must take its own rows' redshifts.
    scores = ModelScores(blind(spectra.grid), Score(batch=16), device)
    redshift = np.linspace(0.0, 0.4, len(spectra))
    pixel = np.rint(spectra.grid.position(EMISSION["H beta"] * (1 + redshift))).astype(int)
    here = (np.arange(len(spectra)), pixel)
    ivar = spectra.ivar.copy()
    ivar[here] = 100
    flux = spectra.flux.copy()
    flux[here] = 1
    calm = Spectra(spectra.rows, flux.copy(), ivar, spectra.grid, redshift)
    flux[here] = 50
    spiked = Spectra(spectra.rows, flux, ivar, spectra.grid, redshift)
    column = SCORES.index("mse_filtered")
    within = near_lines(spectra.grid, 250.0, redshift)[here]
    assert within.sum() > 15  # a pixel is 695 km/s wide: the centre of the nearest one may lie outside the window
    before, after = scores(calm)[0][:, column], scores(spiked)[0][:, column]
    assert (before[within] == after[within]).all()
    assert (after[~within] > before[~within]).all()
    resting = Spectra(spectra.rows, flux, ivar, spectra.grid)
    assert (scores(resting)[0][1:, column] > after[1:]).sum() > 10
    # Without a redshift nothing is known of the lines, and nothing is filtered.
    unknown = Spectra(spectra.rows, flux, ivar, spectra.grid, np.full(len(spectra), np.nan))
    found = scores(unknown)[0]
    assert (found[:, column] == found[:, SCORES.index("mse")]).all()


def test_a_detector_is_one_column(spectra: Spectra, scores: ModelScores) -> None:
    table = scores(spectra)[0]
    for column, name in enumerate(SCORES):
        found: Any = ModelDetector(scores, name).score(spectra)
        assert found.tobytes() == np.ascontiguousarray(table[:, column]).tobytes()
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
    with pytest.raises(ConfigError, match="the model has no score .no such score., only mse, .*chi2;"):
        ModelDetector(scores, "no such score")


def test_no_spectra_have_no_scores(spectra: Spectra, scores: ModelScores) -> None:
    found, *_ = scores(spectra[:0])
    assert found.shape == (0, 9)


def test_scoring_leaves_its_input_as_it_is(spectra: Spectra, scores: ModelScores) -> None:
    flux, ivar = spectra.flux.copy(), spectra.ivar.copy()
    scores(spectra)
    assert spectra.flux.tobytes() == flux.tobytes()
    assert spectra.ivar.tobytes() == ivar.tobytes()
    # A repeated row shares its memory, which torch must not write to.
    repeated = Spectra(
        np.zeros(5, np.int64), np.repeat(flux[:1], 5, 0), np.broadcast_to(ivar[:1], (5, 300)), spectra.grid
    )
    found = scores(repeated)[0]
    np.testing.assert_allclose(found, np.broadcast_to(found[:1], (5, 9)), rtol=ROUNDING)
