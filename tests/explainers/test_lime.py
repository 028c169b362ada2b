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

from distspec.config import Explain, Score
from distspec.detectors.model import ModelDetector, ModelScores
from distspec.explainers import ScoreFunction
from distspec.explainers.lime import Lime, Surrogate, perturb, uniform_segments
from distspec.models.checkpoint import Checkpoint
from distspec.spectra import Spectra


def all_good(spectra: Spectra) -> Spectra:
    flux = np.where(spectra.good, spectra.flux, np.float32(1))
    return Spectra(spectra.rows, flux, np.full_like(flux, 400), spectra.grid)


def linear_score(weights: np.ndarray) -> ScoreFunction:
    return lambda spectra: (np.where(spectra.good, spectra.flux, 0).astype(np.float64) @ weights).astype(np.float32)


def segment_sums(values: np.ndarray, segment_of: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(segment_of, weights=row) for row in values])


def same(first: Any, second: Any) -> bool:
    names = ("weights", "intercept", "r2", "prediction")
    return all(getattr(first, name).tobytes() == getattr(second, name).tobytes() for name in names)


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
    found = [values[0] for values in surrogate.fit(labels[None])]
    coefficients = found[0]
    assert found[1] == pytest.approx(intercept, abs=5.1e-7)
    assert found[2] == pytest.approx(r2, abs=5.1e-10)
    assert found[3] == pytest.approx(prediction, abs=5.1e-7)
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
    coefficients, intercept, r2, prediction = surrogate.fit(labels)
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
    coefficients, intercept, r2, prediction = surrogate.fit(slopes @ surrogate.masks.T + 2.0)
    np.testing.assert_allclose(coefficients, slopes, atol=1e-10)
    np.testing.assert_allclose(intercept, 2.0, atol=1e-9)
    np.testing.assert_allclose(r2, 1.0, atol=1e-12)
    np.testing.assert_allclose(prediction, 2.0 + slopes.sum(axis=1), atol=1e-9)


@pytest.mark.parametrize("level", [0.0, 1 / 3, 7.7, 1e5 + 0.1])
def test_a_constant_score_has_no_weights_and_an_r2_of_one(level: float) -> None:
    # Both sums of squares are rounding errors here; their ratio must not be shown as R².
    coefficients, intercept, r2, _ = Surrogate(151, 5000, 0, 0.25, 1.0).fit(np.full((1, 5000), level))
    np.testing.assert_allclose(coefficients, 0, atol=1e-9 * max(level, 1))
    np.testing.assert_allclose(intercept, level, rtol=1e-9)
    assert r2.tolist() == [1.0]


def test_masks_depend_on_the_seed_alone() -> None:
    first, again, other = (Surrogate(20, 64, seed, 0.25, 1.0).masks for seed in (4, 4, 5))
    assert (first == again).all()
    assert (first != other).any()


# --- perturbation ----------------------------------------------------------------------------------------------------


def test_scale_draws_the_shape_towards_its_median(spectra: Spectra) -> None:
    good = all_good(spectra)
    found = perturb(good, uniform_segments(300, 20), Explain(factor=0.6))
    kernel = Gaussian1DKernel(3)
    assert kernel.shape == (25,)
    for row, flux in enumerate(good.flux.astype(np.float64)):
        smooth = convolve(flux, kernel, boundary="extend")
        median = np.median(flux)
        expected = (smooth - median) * 0.6 + median + (flux - smooth)
        # Astropy samples the same Gaussian, but its kernel's sum is normalised in single steps: 1e-6 is float32.
        np.testing.assert_allclose(found[row], expected, rtol=2e-6)
        other = gaussian_filter1d(flux, 3, mode="nearest", truncate=4)
        np.testing.assert_allclose(found[row], flux - 0.4 * (other - median), rtol=1e-6)


def test_flat_keeps_the_noise_on_a_level(spectra: Spectra) -> None:
    good = all_good(spectra)
    found = perturb(good, uniform_segments(300, 20), Explain(perturbation="flat", factor=1.1))
    flux = good.flux.astype(np.float64)
    noise = flux - gaussian_filter1d(flux, 3, axis=1, mode="nearest", truncate=4)
    np.testing.assert_allclose(found, 1.1 + noise, rtol=1e-6)


def test_with_mean_keeps_the_noise_on_the_segments_means(spectra: Spectra) -> None:
    segment_of = uniform_segments(300, 7)  # 42 pixels each and a rest of 6
    good = all_good(spectra)
    found = perturb(good, segment_of, Explain(perturbation="with_mean"))
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
    found = perturb(
        Spectra(spectra.rows, flux, ivar, spectra.grid), uniform_segments(300, 20), Explain(perturbation="with_mean")
    )
    np.testing.assert_allclose(found[ivar > 0], 2.0, rtol=1e-6)


@pytest.mark.parametrize("kind", ["scale", "flat", "with_mean"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30, 0.0])
def test_masked_pixels_change_no_perturbed_pixel(spectra: Spectra, kind: Any, garbage: float) -> None:
    segment_of = uniform_segments(300, 20)
    settings = Explain(perturbation=kind)
    other = Spectra(spectra.rows, np.where(spectra.good, spectra.flux, np.float32(garbage)), spectra.ivar, spectra.grid)
    first, second = (perturb(batch, segment_of, settings) for batch in (spectra, other))
    assert first[spectra.good].tobytes() == second[spectra.good].tobytes()
    assert np.isfinite(first[spectra.good]).all()
    np.testing.assert_array_equal(second[~spectra.good], other.flux[~spectra.good])


# --- the whole explanation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scale", "flat", "with_mean"])
def test_lime_recovers_the_coefficients_of_a_linear_score(
    spectra: Spectra, rng: np.random.Generator, kind: Any
) -> None:
    lime = Lime(Explain(perturbation=kind, segments=20, samples=400, ridge=1e-9), 300, seed=0)
    slopes = rng.normal(size=300)
    some = spectra[:6]
    explanation = lime.explain(linear_score(slopes), some)
    switched = np.where(some.good, some.flux.astype(np.float64) - perturb(some, lime.segment_of, lime.settings), 0)
    expected = segment_sums(switched * slopes, lime.segment_of)
    np.testing.assert_allclose(explanation.weights, expected, atol=2e-5)
    assert abs(expected).max() > 0.02
    np.testing.assert_allclose(explanation.prediction, linear_score(slopes)(some), atol=1e-4)
    np.testing.assert_allclose(explanation.r2, 1, atol=1e-5)
    assert explanation.rows.tolist() == some.rows.tolist()
    assert explanation.pixel_weights.shape == some.flux.shape
    assert (explanation.pixel_weights[:, :15] == explanation.weights[:, :1]).all()


def test_the_papers_ridge_shrinks_weights_little(spectra: Spectra, rng: np.random.Generator) -> None:
    lime = Lime(Explain(segments=20, samples=5000, perturbation="flat", factor=0.0), 300, seed=0)
    slopes = rng.normal(size=300)
    some = all_good(spectra)[:3]
    weights = lime.explain(linear_score(slopes), some).weights
    switched = some.flux - perturb(some, lime.segment_of, lime.settings)
    expected = segment_sums(switched * slopes, lime.segment_of)
    assert np.abs(weights - expected).max() < 0.01 * abs(expected).max()


def test_the_toy_regressor_has_the_known_answer(spectra: Spectra) -> None:
    # The score sum(flux - 1), flux switched to 1 + noise: a weight is the segment's sum of smooth flux - 1.
    lime = Lime(Explain(segments=20, samples=400, perturbation="flat", factor=1.0, ridge=0.0), 300, seed=0)
    some = all_good(spectra)[:4]
    explanation = lime.explain(lambda s: (s.flux.astype(np.float64) - 1).sum(axis=1).astype(np.float32), some)
    smooth = gaussian_filter1d(some.flux.astype(np.float64), 3, axis=1, mode="nearest", truncate=4)
    np.testing.assert_allclose(explanation.weights, segment_sums(smooth - 1, lime.segment_of), atol=1e-4)


def test_a_perturbation_that_changes_nothing_explains_nothing(spectra: Spectra, checkpoint: Checkpoint) -> None:
    detector = ModelDetector(ModelScores(checkpoint, Score()), "mse")
    explanation = Lime(Explain(segments=20, samples=100, factor=1.0), 300, seed=0).explain(detector.score, spectra[:4])
    assert np.abs(explanation.weights).max() < 1e-5 * detector.score(spectra[:4]).min()
    np.testing.assert_allclose(explanation.prediction, detector.score(spectra[:4]), rtol=1e-5)


@pytest.mark.parametrize("name", ["mse", "relative_filtered_trimmed", "chi2"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_masked_pixels_change_no_bit_of_an_explanation(
    spectra: Spectra, checkpoint: Checkpoint, device: str, name: str, garbage: float
) -> None:
    detector = ModelDetector(ModelScores(checkpoint, Score(), device), name)
    lime = Lime(Explain(segments=20, samples=64), 300, seed=0)
    some = spectra[:3]
    other = Spectra(some.rows, np.where(some.good, some.flux, np.float32(garbage)), some.ivar, some.grid)
    first, second = (lime.explain(detector.score, batch) for batch in (some, other))
    assert same(first, second)
    assert np.isfinite(first.weights).all()


def test_an_explanation_does_not_depend_on_its_batch(spectra: Spectra, checkpoint: Checkpoint, device: str) -> None:
    detector = ModelDetector(ModelScores(checkpoint, Score(), device), "mse")
    lime = Lime(Explain(segments=20, samples=200), 300, seed=0)
    together = lime.explain(detector.score, spectra[:7])
    # Matrix products of other sizes add in another order: rounding of float64, seen through float32.
    for start, stop in ((0, 1), (3, 5), (6, 7)):
        alone = lime.explain(detector.score, spectra[start:stop])
        for name in ("weights", "intercept", "r2", "prediction"):
            np.testing.assert_allclose(
                getattr(alone, name), getattr(together, name)[start:stop], rtol=1e-5, atol=1e-7, err_msg=name
            )
    turned = lime.explain(detector.score, spectra[:7][::-1])
    assert turned.rows.tolist() == [6, 5, 4, 3, 2, 1, 0]
    np.testing.assert_allclose(turned.weights[::-1], together.weights, rtol=1e-5, atol=1e-7)
    again = Lime(Explain(segments=20, samples=200), 300, seed=0).explain(detector.score, spectra[:7])
    assert same(again, together)


@pytest.mark.parametrize("pixel", [7, 52, 151, 299])
def test_a_planted_line_makes_its_own_segment_the_heaviest(spectra: Spectra, pixel: int) -> None:
    # The score's model knows smooth spectra only, so that the line is what it fails to reconstruct.
    flux = np.ones((1, 300), np.float32)
    flux[0, max(pixel - 1, 0) : pixel + 2] += 5
    planted = Spectra(np.array([11]), flux, np.full_like(flux, 400), spectra.grid)

    def score(batch: Spectra) -> np.ndarray:
        return np.sqrt(np.square(batch.flux - 1).sum(axis=1))

    explanation = Lime(Explain(segments=20, samples=1000), 300, seed=0).explain(score, planted)
    order = np.argsort(explanation.weights[0])
    assert order[-1] == pixel // 15
    assert explanation.weights[0, order[-1]] > 5 * abs(explanation.weights[0, order[:-1]]).max()


def test_redshifts_and_rows_reach_the_score(spectra: Spectra) -> None:
    moved = Spectra(spectra.rows + 100, spectra.flux, spectra.ivar, spectra.grid, np.linspace(0, 1, len(spectra)))
    seen = []

    def score(batch: Spectra) -> np.ndarray:
        assert len(set(batch.rows)) == 1
        assert len(batch) == 50
        np.testing.assert_array_equal(batch.flux[0], moved.flux[batch.rows[0] - 100])
        assert (batch.redshift == moved.redshift[batch.rows[0] - 100]).all()
        assert (batch.ivar == moved.ivar[batch.rows[0] - 100]).all()
        seen.append(int(batch.rows[0]))
        return batch.redshift.astype(np.float32)

    explanation = Lime(Explain(segments=10, samples=50), 300, seed=0).explain(score, moved[[4, 2]])
    assert seen == [104, 102]
    assert explanation.rows.tolist() == [104, 102]
    np.testing.assert_allclose(explanation.prediction, moved.redshift[[4, 2]], rtol=1e-6)


def test_more_segments_than_pixels_become_one_each(spectra: Spectra) -> None:
    lime = Lime(Explain(segments=1000, samples=10), 300, seed=0)
    assert lime.segments == 300
    assert lime.segment_of.tolist() == list(range(300))
