"""Features of trees against plain means and medians, and the laws of masks and batches."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distspec.detectors.classical.features import LARGEST, Features, seen
from distspec.errors import ConfigError
from distspec.spectra import Spectra, WaveGrid

pytestmark = pytest.mark.numeric

GARBAGE = np.array([np.nan, np.inf, -np.inf, 1e30, 7.0], np.float32)


def sample(rng: np.random.Generator, count: int, pixels: int, masked: float = 0.2) -> Spectra:
    """Noise, of which some pixels are masked and hold anything."""
    flux = rng.normal(1, 1, (count, pixels)).astype(np.float32)
    ivar = np.where(rng.random(flux.shape) < masked, 0, rng.uniform(0.1, 9, flux.shape)).astype(np.float32)
    flux = np.where(ivar > 0, flux, rng.choice(GARBAGE, flux.shape))
    return Spectra(np.arange(count), flux, ivar, WaveGrid("linear", 4000.0, 2.0, pixels))


def on(flux: Any, ivar: Any = None) -> Spectra:
    """Spectra of given fluxes, all good unless told otherwise."""
    flux = np.array(flux, np.float32)
    ivar = np.ones_like(flux) if ivar is None else np.array(ivar, np.float32)
    return Spectra(np.arange(len(flux)), flux, ivar, WaveGrid("linear", 4000.0, 2.0, flux.shape[1]))


@pytest.mark.parametrize("bins", [None, 2, 7, 20])
def test_features_are_means_of_good_pixels_or_the_medians_of_the_sample(
    rng: np.random.Generator, bins: int | None
) -> None:
    spectra = sample(rng, 60, 20, masked=0.6)
    runs = np.array_split(np.arange(20), bins) if bins in (2, 20) else None
    features = Features.of(spectra, bins)
    edges = features.edges
    lengths = np.diff(edges)
    assert edges[0] == 0
    assert edges[-1] == 20
    assert lengths.max() - lengths.min() <= 1
    if runs is not None:
        assert [run[0] for run in runs] == edges[:-1].tolist()
    expected = np.full((60, len(lengths)), np.nan)
    for row in range(60):
        for run, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            good = spectra.good[row, start:stop]
            if good.any():
                expected[row, run] = spectra.flux[row, start:stop][good].astype(float).mean()
    expected = np.where(np.isnan(expected), np.nanmedian(expected, axis=0), expected)
    found = features(spectra)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("bins", [None, 6])
def test_what_a_masked_pixel_holds_does_not_matter(rng: np.random.Generator, bins: int | None) -> None:
    spectra = sample(rng, 50, 24)
    other = Spectra(spectra.rows, np.where(spectra.good, spectra.flux, -3.0), spectra.ivar, spectra.grid)
    one, two = Features.of(spectra, bins), Features.of(other, bins)
    assert one.fill.tobytes() == two.fill.tobytes()
    assert one(spectra).tobytes() == two(other).tobytes()


@pytest.mark.parametrize("bins", [None, 6])
def test_a_spectrum_has_the_same_features_in_any_batch(rng: np.random.Generator, bins: int | None) -> None:
    spectra = sample(rng, 1100, 25)
    features = Features.of(spectra, bins)
    whole = features(spectra)
    for cut in (1, 511, 512, 700):
        parts = np.concatenate([features(spectra[:cut]), features(spectra[cut:])])
        assert parts.tobytes() == whole.tobytes()
    assert features(spectra[:0]).shape == (0, len(features))


def test_features_are_finite_whatever_a_good_pixel_holds() -> None:
    spectra = on([[np.nan, 1, np.inf, 2], [5, 1, -np.inf, 3e38], [7, 1, 3, -1e31]])
    largest = float(np.float32(LARGEST))
    pixels = Features.of(spectra, None)(spectra)
    assert pixels[0].tolist() == [6.0, 1.0, largest, 2.0]  # NaN is filled with the median of 5 and 7
    assert pixels[1].tolist() == [5.0, 1.0, -largest, largest]
    assert pixels[2].tolist() == [7.0, 1.0, 3.0, -largest]
    means = Features.of(spectra, 2)(spectra)
    assert means.tolist() == [[1.0, largest / 2], [3.0, 0.0], [4.0, -largest / 2]]


def test_what_is_good_nowhere_in_the_sample_is_no_feature() -> None:
    spectra = on([[1, np.nan, 3], [4, 9, 6]], [[1, 0, 1], [1, 0, 1]])
    features = Features.of(spectra, None)
    assert features.kept.tolist() == [0, 2]
    later = on([[1, 2, 3], [0, 0, 0]], [[1, 1, 1], [0, 0, 0]])
    assert features(later).tolist() == [[1, 3], [2.5, 4.5]]
    assert seen(later).tolist() == [True, False]


def test_a_sample_without_a_good_pixel_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of the 2 spectra"):
        Features.of(on([[1, 2], [3, 4]], np.zeros((2, 2))), None)


def test_more_runs_than_pixels_are_refused() -> None:
    with pytest.raises(ConfigError, match="bins = 5, on a grid of 4 pixels"):
        Features.of(on(np.ones((3, 4))), 5)


def test_features_are_kept_as_arrays(rng: np.random.Generator) -> None:
    spectra = sample(rng, 30, 12)
    features = Features.of(spectra, 5)
    again = Features.from_arrays(features.to_arrays())
    assert again(spectra).tobytes() == features(spectra).tobytes()


@settings(deadline=None)
@given(st.sampled_from(["edges", "kept", "fill"]), st.integers(0, 3), st.integers(-3, 12))
def test_damaged_arrays_are_refused_or_harmless(name: str, place: int, value: int) -> None:
    spectra = on(np.arange(16.0).reshape(2, 8))
    arrays = Features.of(spectra, 4).to_arrays()
    arrays[name] = arrays[name].copy()
    arrays[name][place] = value
    try:
        features = Features.from_arrays(arrays)
    except ValueError:
        ordered = np.diff(arrays[name])
        assert name != "fill"
        assert value < 0 or value > 3 or not (ordered > 0).all() or arrays["edges"][0] != 0
    else:
        assert features.edges[0] == 0
        assert 0 <= features.kept.min() <= features.kept.max() < len(features.edges) - 1


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("edges", np.array([0, 4, 4, 6, 8])),
        ("edges", np.array([1, 4, 5, 6, 8])),
        ("edges", np.array([0])),
        ("edges", np.array([0.0, 2.0, 8.0])),
        ("kept", np.array([0, 1, 2, 4])),
        ("kept", np.array([-1, 0, 1, 2])),
        ("kept", np.array([2, 1, 0, 3])),
        ("kept", np.zeros(0, np.int64)),
        ("fill", np.ones(3, np.float32)),
        ("fill", np.array([1, 2, 3, np.nan], np.float32)),
        ("fill", np.ones(4)),
    ],
)
def test_arrays_that_are_no_features_are_refused(name: str, values: np.ndarray) -> None:
    arrays = Features.of(on(np.arange(16.0).reshape(2, 8)), 4).to_arrays()
    with pytest.raises(ValueError, match=r"edges|kept|fill"):
        Features.from_arrays({**arrays, name: values})
    del arrays[name]
    with pytest.raises(ValueError, match=f"'{name}' is absent"):
        Features.from_arrays(arrays)
