"""LIME has known answers: the surrogate of the `lime` package, linear scores, and a line whose place is known."""

from typing import Any

import numpy as np
import pytest
from astropy.convolution import Gaussian1DKernel, convolve
from hypothesis import given
from hypothesis import strategies as st
from lime.lime_base import LimeBase
from scipy.ndimage import gaussian_filter1d
from sklearn.linear_model import Ridge
from sklearn.metrics import pairwise_distances

from distspec.config import (
    Flat,
    Gaussians,
    Lime,
    LineSegments,
    Reconstructed,
    SameShape,
    Scale,
    SegmentMean,
    Slic,
    Unchanged,
    Uniform,
)
from distspec.errors import ConfigError
from distspec.explainers.lime import LimeExplainer, Surrogate
from distspec.explainers.perturbations import perturb
from distspec.explainers.segmentation import line_segments, slic_segments
from distspec.models.checkpoint import Checkpoint
from distspec.spectra import LIGHT_SPEED, Spectra, WaveGrid
from distspec.spectra.lines.wavelengths import EMISSION
from distspec.spectra.segments import uniform_segments
from tests.support.asked import Asked, all_good, linear, of_model

pytestmark = pytest.mark.numeric


def segment_sums(values: np.ndarray, segment_of: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(segment_of, weights=row) for row in values])


NAMES = ("error", "intercept", "r2", "prediction", "floor", "samples")


def same(first: Any, second: Any) -> bool:
    return first.weights.tobytes() == second.weights.tobytes() and all(
        first.more[name].tobytes() == second.more[name].tobytes() for name in NAMES
    )


def lime_of(spectra: Spectra, segments: int = 20, seed: int = 0, **settings: Any) -> LimeExplainer:
    settings = {"perturbation": Scale()} | settings
    return LimeExplainer(Lime(segments=Uniform(count=segments), **settings), spectra.grid, seed)


def changed(spectra: Spectra, lime: LimeExplainer) -> np.ndarray:
    return perturb(spectra, lime.segment_of, lime.settings.perturbation, lime.settings.smoothing)


# --- segments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "count", "width", "last"),
    [(64, 65, 58, 61), (110, 111, 34, 33), (128, 129, 29, 61), (150, 151, 25, 23), (188, 189, 20, 13)],
)
def test_segments_are_those_of_the_reference(wanted: int, count: int, width: int, last: int) -> None:
    sizes = np.bincount(uniform_segments(3773, wanted))
    assert len(sizes) == count
    assert (sizes[:-1] == width).all()
    assert sizes[-1] == last


@given(pixels=st.integers(1, 5000), share=st.floats(0, 1))
def test_segments_partition_the_pixels(pixels: int, share: float) -> None:
    segments = max(1, round(share * pixels))
    segment_of = uniform_segments(pixels, segments)
    sizes = np.bincount(segment_of)
    assert len(segment_of) == pixels
    assert segment_of[0] == 0
    assert set(np.diff(segment_of)) <= {0, 1}
    assert (sizes[:segments] == pixels // segments).all()
    assert len(sizes) == segments + (pixels % segments > 0)


@pytest.mark.parametrize("segments", [0, 8])
def test_impossible_segments_are_refused(segments: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 7"):
        uniform_segments(7, segments)


# --- surrogate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segments", "ones", "start", "on", "kernel", "r2", "intercept", "first", "rest", "prediction"),
    [
        (151, 377238, "00101110", [71, 87, 72, 80, 76], 2513.291560, 0.999997534, 2.999830,
         1.7e-5, [0.839967, 0.907872, 0.140610], 2.917998),
        (129, 322523, "10110010", [60, 72, 66, 62, 70], 2516.341488, 0.999997402, 3.000257,
         -6.3e-5, [0.840136, 0.907963, 0.140761], 4.909673),
        (65, 162955, "00000110", [33, 28, 31, 39, 35], 2526.976666, 0.999997666, 3.000730,
         1.4e-4, [0.840248, 0.908013, 0.140817], 4.015780),
    ],
)  # fmt: skip
def test_surrogate_gives_the_test_vectors(
    segments: int, ones: int, start: str, on: list[int], kernel: float, r2: float, intercept: float,
    first: float, rest: list[float], prediction: float,
) -> None:  # fmt: skip
    # Every number is asked for to the digits that the table prints.
    surrogate = Surrogate(segments, 5000, 0, kernel_width=0.25, ridge=1.0)
    assert surrogate.masks.sum() == ones
    assert surrogate.masks[0].all()
    assert surrogate.masks[1, :8].tolist() == [digit == "1" for digit in start]
    assert surrogate.masks[1:6].sum(axis=1).tolist() == on
    assert surrogate.kernel.sum() == pytest.approx(kernel, abs=5.1e-7)
    labels = 3 + surrogate.masks @ np.sin(np.arange(segments))
    fit = surrogate.fit(labels[None])
    coefficients = fit.coefficients[0]
    assert fit.intercept[0] == pytest.approx(intercept, abs=5.1e-7)
    assert fit.r2[0] == pytest.approx(r2, abs=5.1e-10)
    assert fit.prediction[0] == pytest.approx(prediction, abs=5.1e-7)
    assert coefficients[0] == pytest.approx(first, abs=5.1e-6 if abs(first) > 1e-4 else 5.1e-7)
    np.testing.assert_allclose(coefficients[1:4], rest, rtol=0, atol=5.1e-7)


@pytest.mark.parametrize(("segments", "samples", "seed"), [(151, 2000, 0), (20, 64, 5), (7, 300, 1)])
def test_surrogate_equals_that_of_the_lime_package(
    rng: np.random.Generator, segments: int, samples: int, seed: int
) -> None:
    surrogate = Surrogate(segments, samples, seed, kernel_width=0.25, ridge=1.0)
    masks = surrogate.masks.astype(float)
    labels = rng.normal(5, 2, (3, samples))
    distances = pairwise_distances(masks, masks[:1], metric="cosine").ravel()
    base = LimeBase(lambda d: np.sqrt(np.exp(-(d**2) / 0.25**2)), random_state=0)
    coefficients, _, intercept, r2, prediction = surrogate.fit(labels)
    for row in range(3):
        theirs = base.explain_instance_with_data(
            masks, labels[row][:, None], distances, 0, 10_000, model_regressor=Ridge(alpha=1)
        )
        expected = np.empty(segments)
        for feature, weight in theirs[1]:
            expected[feature] = weight
        np.testing.assert_allclose(coefficients[row], expected, rtol=1e-8, atol=1e-8 * abs(expected).max())
        assert intercept[row] == pytest.approx(theirs[0], rel=1e-8)
        assert r2[row] == pytest.approx(theirs[2], rel=1e-8)
        assert prediction[row] == pytest.approx(float(theirs[3][0]), rel=1e-8)


def test_surrogate_without_ridge_is_exact_on_linear_labels(rng: np.random.Generator) -> None:
    surrogate = Surrogate(30, 200, 0, kernel_width=0.25, ridge=0.0)
    slopes = rng.normal(size=(4, 30))
    coefficients, _, intercept, r2, prediction = surrogate.fit(slopes @ surrogate.masks.T + 2.0)
    np.testing.assert_allclose(coefficients, slopes, atol=1e-10)
    np.testing.assert_allclose(intercept, 2.0, atol=1e-9)
    np.testing.assert_allclose(r2, 1.0, atol=1e-12)
    np.testing.assert_allclose(prediction, 2.0 + slopes.sum(axis=1), atol=1e-9)


@pytest.mark.parametrize("level", [0.0, 1 / 3, 7.7, 1e5 + 0.1])
def test_a_constant_score_has_no_weights_and_an_r2_of_one(level: float) -> None:
    # Both sums of squares are rounding errors here; their ratio must not be shown as R².
    coefficients, error, intercept, r2, _ = Surrogate(151, 5000, 0, 0.25, 1.0).fit(np.full((1, 5000), level))
    np.testing.assert_allclose(coefficients, 0, atol=1e-9 * max(level, 1))
    np.testing.assert_allclose(error, 0, atol=1e-9 * max(level, 1))
    np.testing.assert_allclose(intercept, level, rtol=1e-9)
    assert r2.tolist() == [1.0]


def test_masks_depend_on_the_seed_alone() -> None:
    first, again, other = (Surrogate(20, 64, seed, 0.25, 1.0).masks for seed in (4, 4, 5))
    assert (first == again).all()
    assert (first != other).any()


ALL = [
    Scale(),
    Scale(same_noise=False),
    Flat(),
    SegmentMean(),
    SegmentMean(same_noise=False, sigma=0.1),
    Gaussians(),
    Gaussians(same_noise=False),
    SameShape(),
    Unchanged(),
]


# --- perturbation ----------------------------------------------------------------------------------------------------


def test_scale_draws_the_shape_towards_its_median(spectra: Spectra) -> None:
    good = all_good(spectra)
    found = perturb(good, uniform_segments(300, 20), Scale(factor=0.6), 3.0)
    kernel = Gaussian1DKernel(3)
    assert kernel.shape == (25,)
    for row, flux in enumerate(good.flux.astype(np.float64)):
        smooth = convolve(flux, kernel, boundary="extend")
        median = np.median(smooth)
        expected = (smooth - median) * 0.6 + median + (flux - smooth)
        # Astropy samples the same Gaussian, but its kernel's sum is normalised in single steps: 1e-6 is float32.
        np.testing.assert_allclose(found[row], expected, rtol=2e-6)
        other = gaussian_filter1d(flux, 3, mode="nearest", truncate=4)
        np.testing.assert_allclose(found[row], flux - 0.4 * (other - np.median(other)), rtol=1e-6)


def test_flat_keeps_the_noise_on_a_level(spectra: Spectra) -> None:
    good = all_good(spectra)
    found = perturb(good, uniform_segments(300, 20), Flat(level=1.1), 3.0)
    flux = good.flux.astype(np.float64)
    noise = flux - gaussian_filter1d(flux, 3, axis=1, mode="nearest", truncate=4)
    np.testing.assert_allclose(found, 1.1 + noise, rtol=1e-6)


def test_with_mean_keeps_the_noise_on_the_segments_means(spectra: Spectra) -> None:
    segment_of = uniform_segments(300, 7)  # 42 pixels each and a rest of 6
    good = all_good(spectra)
    found = perturb(good, segment_of, SegmentMean(), 3.0)
    flux = good.flux.astype(np.float64)
    noise = flux - gaussian_filter1d(flux, 3, axis=1, mode="nearest", truncate=4)
    for segment in range(8):
        inside = segment_of == segment
        expected = flux[:, inside].mean(axis=1, keepdims=True) + noise[:, inside]
        np.testing.assert_allclose(found[:, inside], expected, rtol=1e-6)


def test_with_mean_takes_good_pixels_only(spectra: Spectra) -> None:
    # A straight line of flux 2 has no noise and a mean of 2, whatever the masked pixels hold; one segment is all bad.
    flux = np.where(spectra.good, np.float32(2), np.float32(1e4))
    ivar = spectra.ivar.copy()
    ivar[:, :15] = 0
    some = Spectra(spectra.rows, flux, ivar, spectra.grid)
    found = perturb(some, uniform_segments(300, 20), SegmentMean(), 3.0)
    np.testing.assert_allclose(found[ivar > 0], 2.0, rtol=1e-6)


@pytest.mark.parametrize("kind", ALL, ids=lambda one: one.kind)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30, 0.0])
def test_masked_pixels_change_no_perturbed_pixel(spectra: Spectra, kind: Any, garbage: float) -> None:
    segment_of = uniform_segments(300, 20)
    other = Spectra(spectra.rows, np.where(spectra.good, spectra.flux, np.float32(garbage)), spectra.ivar, spectra.grid)
    first, second = (perturb(batch, segment_of, kind, 3.0) for batch in (spectra, other))
    assert first[spectra.good].tobytes() == second[spectra.good].tobytes()
    assert np.isfinite(first[spectra.good]).all()
    np.testing.assert_array_equal(second[~spectra.good], other.flux[~spectra.good])


# --- the whole explanation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Scale(), Flat(), SegmentMean(), Gaussians()], ids=lambda one: one.kind)
def test_lime_recovers_the_coefficients_of_a_linear_score(
    spectra: Spectra, rng: np.random.Generator, kind: Any
) -> None:
    lime = lime_of(spectra, perturbation=kind, samples=400, ridge=1e-9)
    slopes = rng.normal(size=300)
    some = spectra[:6]
    explanation = lime.explain(linear(slopes), some)
    switched = np.where(some.good, some.flux.astype(np.float64) - changed(some, lime), 0)
    expected = segment_sums(switched * slopes, lime.segment_of)
    np.testing.assert_allclose(explanation.weights[:, 0], expected, atol=3e-5)
    assert abs(expected).max() > 0.02
    np.testing.assert_allclose(explanation.more["prediction"], linear(slopes)(some), atol=1e-4)
    np.testing.assert_allclose(explanation.more["r2"], 1, atol=1e-5)
    assert explanation.rows.tolist() == some.rows.tolist()
    assert explanation.pixel_weights.shape == (6, 1, 300)
    assert (explanation.pixel_weights[..., :15] == explanation.weights[..., :1]).all()


def test_the_papers_ridge_shrinks_weights_little(spectra: Spectra, rng: np.random.Generator) -> None:
    lime = lime_of(spectra, samples=5000, perturbation=Flat(level=0.0))
    slopes = rng.normal(size=300)
    some = all_good(spectra)[:3]
    weights = lime.explain(linear(slopes), some).weights[:, 0]
    switched = some.flux - changed(some, lime)
    expected = segment_sums(switched * slopes, lime.segment_of)
    assert np.abs(weights - expected).max() < 0.01 * abs(expected).max()


def test_the_toy_regressor_has_the_known_answer(spectra: Spectra) -> None:
    # The score sum(flux - 1), flux switched to 1 + noise: a weight is the segment's sum of smooth flux - 1.
    lime = lime_of(spectra, samples=400, perturbation=Flat(level=1.0), ridge=0.0)
    some = all_good(spectra)[:4]
    explanation = lime.explain(Asked(lambda s: (s.flux.astype(np.float64) - 1).sum(axis=1)), some)
    smooth = gaussian_filter1d(some.flux.astype(np.float64), 3, axis=1, mode="nearest", truncate=4)
    np.testing.assert_allclose(explanation.weights[:, 0], segment_sums(smooth - 1, lime.segment_of), atol=1e-4)


@pytest.mark.parametrize("kind", [Scale(factor=1.0), Unchanged()], ids=lambda one: one.kind)
def test_a_perturbation_that_changes_nothing_explains_nothing(
    spectra: Spectra, checkpoint: Checkpoint, kind: Any
) -> None:
    scores = of_model(checkpoint, "mse", "chi2")
    explanation = lime_of(spectra, samples=100, perturbation=kind).explain(scores, spectra[:4])
    level = scores(spectra[:4])
    assert np.abs(explanation.weights).max() < 1e-5 * level.min()
    np.testing.assert_allclose(explanation.more["prediction"], level, rtol=1e-5)
    # The floor is what such a perturbation would leave.
    assert (explanation.more["floor"] < 1e-5 * level).all()


@pytest.mark.parametrize("name", ["mse", "relative_filtered_trimmed", "chi2"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_masked_pixels_change_no_bit_of_an_explanation(
    spectra: Spectra, checkpoint: Checkpoint, device: str, name: str, garbage: float
) -> None:
    scores = of_model(checkpoint, name, device=device)
    lime = lime_of(spectra, samples=64)
    some = spectra[:3]
    other = Spectra(some.rows, np.where(some.good, some.flux, np.float32(garbage)), some.ivar, some.grid)
    first, second = (lime.explain(scores, batch) for batch in (some, other))
    assert same(first, second)
    assert np.isfinite(first.weights).all()


def test_an_explanation_does_not_depend_on_its_batch(spectra: Spectra, checkpoint: Checkpoint, device: str) -> None:
    scores = of_model(checkpoint, "mse", "relative", device=device)
    lime = lime_of(spectra, samples=200)
    together = lime.explain(scores, spectra[:7])
    # Spectrum by spectrum it is the same work, so that not a bit differs.
    for part in ([0], [3, 4], [6]):
        alone = lime.explain(scores, spectra[part])
        assert alone.weights.tobytes() == together.weights[part].tobytes()
        assert alone.more["error"].tobytes() == together.more["error"][part].tobytes()
    turned = lime.explain(scores, spectra[:7][::-1])
    assert turned.rows.tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert turned.weights[::-1].tobytes() == together.weights.tobytes()
    assert same(lime_of(spectra, samples=200).explain(scores, spectra[:7]), together)


@pytest.mark.parametrize("pixel", [7, 52, 151, 299])
def test_a_planted_line_makes_its_own_segment_the_heaviest(spectra: Spectra, pixel: int) -> None:
    # The score's model knows smooth spectra only, so that the line is what it fails to reconstruct.
    flux = np.ones((1, 300), np.float32)
    flux[0, max(pixel - 1, 0) : pixel + 2] += 5
    planted = Spectra(np.array([11]), flux, np.full_like(flux, 400), spectra.grid)

    def score(batch: Spectra) -> np.ndarray:
        return np.sqrt(np.square(batch.flux - 1).sum(axis=1))

    weights = lime_of(spectra, samples=1000).explain(Asked(score), planted).weights[0, 0]
    order = np.argsort(weights)
    assert order[-1] == pixel // 15
    assert weights[order[-1]] > 5 * abs(weights[order[:-1]]).max()


def test_redshifts_and_rows_reach_the_score(spectra: Spectra) -> None:
    moved = Spectra(spectra.rows + 100, spectra.flux, spectra.ivar, spectra.grid, np.linspace(0, 1, len(spectra)))
    seen = []

    def score(batch: Spectra) -> np.ndarray:
        assert len(set(batch.rows)) == 1
        assert (batch.redshift == moved.redshift[batch.rows[0] - 100]).all()
        assert (batch.ivar == moved.ivar[batch.rows[0] - 100]).all()
        if len(batch) == 50:  # the first mask keeps all
            np.testing.assert_array_equal(batch.flux[0], moved.flux[batch.rows[0] - 100])
        seen.append((int(batch.rows[0]), len(batch)))
        return batch.redshift

    explanation = lime_of(spectra, segments=10, samples=50).explain(Asked(score), moved[[4, 2]])
    assert seen == [(104, 50), (104, 64), (102, 50), (102, 64)]
    assert explanation.rows.tolist() == [104, 102]
    np.testing.assert_allclose(explanation.more["prediction"][:, 0], moved.redshift[[4, 2]], rtol=1e-6)


def test_more_segments_than_pixels_become_one_each(spectra: Spectra) -> None:
    lime = lime_of(spectra, segments=1000, samples=10)
    assert lime.regions == 300
    assert lime.segment_of.tolist() == list(range(300))


# --- how sure the weights are ----------------------------------------------------------------------------------------


def test_standard_errors_are_those_of_other_masks(spectra: Spectra) -> None:
    """Of a score that no linear model fits, weights of other masks scatter by their errors."""
    some = all_good(spectra)[:1]
    scores = Asked(lambda s: np.square(s.flux[:, :40].sum(axis=1) - s.flux[:, 200:].sum(axis=1)))
    many = [lime_of(some, samples=300, seed=seed, perturbation=Flat()).explain(scores, some) for seed in range(60)]
    weights = np.stack([one.weights[0, 0] for one in many])
    errors = np.stack([one.more["error"][0, 0] for one in many])
    heavy = np.abs(weights.mean(axis=0)) > 0
    ratio = weights.std(axis=0, ddof=1)[heavy] / np.sqrt(np.square(errors).mean(axis=0))[heavy]
    assert 0.85 < np.median(ratio) < 1.15
    assert 0.6 < ratio.min() < ratio.max() < 1.4


def test_without_more_samples_than_segments_errors_are_not_known(spectra: Spectra) -> None:
    explanation = lime_of(spectra, samples=21).explain(linear(np.ones(300)), spectra[:1])
    assert np.isnan(explanation.more["error"]).all()
    assert np.isfinite(explanation.weights).all()


def test_without_a_ridge_too_few_samples_are_refused_by_their_settings() -> None:
    with pytest.raises(ConfigError, match="cannot tell 20 segments apart by 5 samples; raise samples or ridge"):
        Surrogate(20, 5, 0, kernel_width=0.25, ridge=0.0)


def test_a_noisy_score_has_the_noise_of_its_null_perturbation_as_floor(spectra: Spectra) -> None:
    rng = np.random.default_rng(7)
    noisy = Asked(lambda s: rng.normal(0.0, 0.3, len(s)))
    found = [lime_of(spectra, samples=1000, perturbation=Unchanged()).explain(noisy, spectra[:1]) for _ in range(20)]
    spread = np.sqrt(np.mean([np.square(one.weights).mean() for one in found]))
    floor = np.mean([one.more["floor"] for one in found])
    assert floor == pytest.approx(spread, rel=0.1)


def test_sampling_stops_when_weights_have_settled(spectra: Spectra) -> None:
    easy, hard = linear(np.sin(np.arange(300.0))), Asked(lambda s: np.square(s.flux).sum(axis=1) ** 3)
    lime = lime_of(spectra, samples=4000, settle=0.1, perturbation=Flat())
    quick, slow = (lime.explain(scores, spectra[:2]) for scores in (easy, hard))
    assert quick.more["samples"].tolist() == [250, 250]
    assert (slow.more["samples"] > 250).all()
    for one in (quick, slow):
        unsettled = one.more["error"].max(axis=2) > 0.1 * np.abs(one.weights).max(axis=2)
        assert (one.more["samples"][unsettled[:, 0]] == 4000).all()
    # What is found is what as many samples from the start give.
    again = lime_of(spectra, samples=250, perturbation=Flat()).explain(easy, spectra[:2])
    np.testing.assert_array_equal(again.weights, quick.weights)


# --- other perturbations ---------------------------------------------------------------------------------------------


def test_gaussians_stand_on_the_middle_of_each_segment() -> None:
    grid = WaveGrid("linear", 4000.0, 1.0, 207)
    flat = Spectra(np.arange(1), np.ones((1, 207), np.float32), np.ones((1, 207), np.float32), grid)
    found = perturb(flat, uniform_segments(207, 10), Gaussians(amplitude=0.5), 3.0)[0] - 1
    pixel = np.arange(20)
    bump = 0.5 * np.exp(-0.5 * ((pixel - 9.5) / 2.5) ** 2)
    np.testing.assert_allclose(found[:200].reshape(10, 20), np.tile(bump, (10, 1)), atol=1e-6)
    # The rest of 7 pixels is less than half as wide as the others.
    assert (found[200:] == 0).all()


def test_white_noise_depends_on_seed_and_row_alone(spectra: Spectra) -> None:
    segment_of = uniform_segments(300, 20)
    whole = perturb(spectra, segment_of, SameShape(sigma=0.2), 3.0, seed=3)
    np.testing.assert_array_equal(perturb(spectra[[5, 2]], segment_of, SameShape(sigma=0.2), 3.0, 3), whole[[5, 2]])
    other = perturb(spectra, segment_of, SameShape(sigma=0.2), 3.0, seed=4)
    assert (other != whole)[spectra.good].mean() > 0.99
    some = all_good(spectra)
    flux = some.flux.astype(np.float64)
    shape = gaussian_filter1d(flux, 3, axis=1, mode="nearest", truncate=4)
    noise = perturb(some, segment_of, SameShape(sigma=0.2), 3.0) - shape
    assert noise.std() == pytest.approx(0.2, rel=0.03)
    level = perturb(some, segment_of, Flat(level=2.0, same_noise=False, sigma=0.1), 3.0)
    assert level.mean() == pytest.approx(2.0, abs=0.01)
    assert level.std() == pytest.approx(0.1, rel=0.03)


def test_the_reconstruction_in_its_place_tells_what_is_not_reconstructed(
    spectra: Spectra, checkpoint: Checkpoint
) -> None:
    some, segment_of = all_good(spectra)[:3], uniform_segments(300, 20)
    scores = of_model(checkpoint, "mse")
    found = perturb(some, segment_of, Reconstructed(), 3.0, reconstruct=scores.reconstruct)
    np.testing.assert_allclose(found, scores.reconstruct(some), rtol=1e-6)
    with pytest.raises(ValueError, match="without a model"):
        perturb(some, segment_of, Reconstructed(), 3.0)
    # A model that gives ones: the score is the length of x - 1, and the weights are the squares of each segment.
    flat = Asked(lambda s: np.square(s.flux - 1).sum(axis=1), reconstruct=lambda s: np.ones_like(s.flux))
    lime = lime_of(some, samples=400, perturbation=Reconstructed(), ridge=0.0)
    expected = segment_sums(np.square(some.flux.astype(np.float64) - 1), segment_of)
    np.testing.assert_allclose(lime.explain(flat, some).weights[:, 0], expected, atol=1e-4)


# --- other segments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("redshift", [None, 0.0, 0.13])
def test_a_line_has_its_own_segment(redshift: float | None) -> None:
    grid = WaveGrid.between("log", 3800.0, 9000.0, 2000)
    settings = LineSegments(velocity=500.0, width=60.0)
    segment_of = line_segments(grid, settings, redshift)
    assert set(np.diff(segment_of)) == {0, 1}
    line = EMISSION["[O III] 5008"] * (1 + (redshift or 0))
    own = segment_of == segment_of[int(np.abs(grid.wave - line).argmin())]
    np.testing.assert_array_equal(own, np.abs(grid.wave - line) <= line * 500 / LIGHT_SPEED)
    # Halpha and [N II] are 7 Angstrom apart in windows of 11: one segment.
    stretch = 1 + (redshift or 0)
    pair = [int(np.abs(grid.wave - EMISSION[name] * stretch).argmin()) for name in ("H alpha", "[N II] 6585")]
    assert len(set(segment_of[pair])) == 1
    lines = np.array(list(EMISSION.values())) * stretch
    inside = (np.abs(grid.wave[:, None] - lines) <= lines * 500 / LIGHT_SPEED).any(axis=1)
    widths = np.bincount(segment_of, weights=np.diff(grid.edges))
    continuum = np.unique(segment_of[~inside])
    assert widths[continuum].max() <= 60 * stretch
    assert not set(continuum) & set(segment_of[inside])


def test_without_a_redshift_there_are_pieces_of_continuum_only() -> None:
    grid = WaveGrid.between("linear", 4000.0, 5000.0, 500)
    segment_of = line_segments(grid, LineSegments(width=100.0), float("nan"))
    sizes = np.bincount(segment_of)
    assert len(sizes) == 11
    assert np.ptp(sizes) <= 1


def test_superpixels_part_a_step_and_are_numbered_in_order(rng: np.random.Generator) -> None:
    flux = np.where(np.arange(300) < 140, 1.0, 3.0) + 0.01 * rng.normal(size=300)
    found = slic_segments(flux, Slic(count=12, sigma=0.0, compactness=0.1))
    assert found[0] == 0
    assert set(np.diff(found)) == {0, 1}
    assert found[139] != found[140]
    assert slic_segments(np.ones(300), Slic(count=5)).max() >= 0


@pytest.mark.parametrize("kind", [Slic(count=20), LineSegments()], ids=lambda one: one.kind)
def test_segments_of_their_own_are_told_pixel_by_pixel(spectra: Spectra, kind: Any, rng: np.random.Generator) -> None:
    moved = Spectra(spectra.rows, spectra.flux, spectra.ivar, spectra.grid, np.linspace(0, 0.3, len(spectra)))
    lime = LimeExplainer(Lime(segments=kind, samples=400, perturbation=Flat(), ridge=1e-9), spectra.grid, 0, rest=False)
    slopes = rng.normal(size=300)
    some = moved[[3, 30]]
    explanation = lime.explain(linear(slopes), some)
    assert explanation.weights.shape == (2, 1, 300)
    switched = np.where(some.good, some.flux - changed(some, lime), 0) * slopes
    for index in range(2):
        weights = explanation.weights[index, 0]
        borders = np.flatnonzero(np.diff(weights)) + 1
        assert 5 < len(borders) < 120
        for part in np.split(np.arange(300), borders):
            # Those of a segment's pixels add up to its weight.
            assert weights[part].sum() == pytest.approx(switched[index, part].sum(), abs=5e-5)
    garbage = Spectra(some.rows, np.where(some.good, some.flux, np.float32(1e30)), some.ivar, some.grid, some.redshift)
    assert same(lime.explain(linear(slopes), garbage), explanation)
