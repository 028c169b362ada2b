"""Pixels that make a spectrum odd: windows, the heaviest part of a change, features of a companion."""

import numpy as np

from distspec.spectra import WaveGrid
from distspec.stages.evaluate.regions import contrast, heavy, smooth, windows

GRID = WaveGrid("linear", 4000.0, 2.0, 1000)


def bump(center: float, sigma: float = 6.0) -> np.ndarray:
    return np.asarray(np.exp(-0.5 * ((GRID.wave - center) / sigma) ** 2))


def test_a_pixel_that_a_window_touches_is_in_it() -> None:
    found = windows(GRID, ((4100.5, 4105.0), (4500.0, 4500.5)), np.array([1.0, 1.2]))
    assert GRID.wave[found[0]].tolist() == [4100.0, 4102.0, 4104.0, 4500.0]
    # 4920.6-4926.0 and 5400.0-5400.6 Å.
    assert GRID.wave[found[1]].tolist() == [4920.0, 4922.0, 4924.0, 4926.0, 5400.0]
    assert not windows(GRID, ((3000.0, 3900.0), (6100.0, 6200.0)), np.ones(1)).any()


def test_the_heavy_part_of_a_line_is_its_core() -> None:
    change = np.stack([-3.0 * bump(5000.0) + 0.5 * bump(4500.0), np.zeros(1000)])
    good = np.ones((2, 1000), dtype=bool)
    found = heavy(change, good)
    # The line is 6 Å wide, the smoothing 2 Å: a fifth of the height lies at 1.8 times both together.
    expected = np.sqrt(2 * np.log(5) * (6.0**2 + 2.0**2))
    assert np.abs(np.abs(GRID.wave[found[0]] - 5000.0).max() - expected) < 2.0
    assert not found[1].any()
    hidden = good & (np.abs(GRID.wave - 5000.0) > 60)
    assert np.abs(GRID.wave[heavy(change, hidden)[0]] - 4500.0).max() < 20


def test_an_average_takes_good_pixels_only() -> None:
    good = np.ones((1, 1000), dtype=bool)
    good[0, 300:320] = False
    values = np.where(good, 2.0, 1e30)
    np.testing.assert_allclose(smooth(np.where(good, values, 0.0), good, 3.0)[good], 2.0, rtol=1e-12)
    ramp = np.arange(1000.0)[None, :]
    np.testing.assert_allclose(smooth(ramp, np.ones_like(good), 3.0)[0, 50:-50], ramp[0, 50:-50], rtol=1e-9)


def test_features_of_a_companion_are_told_from_its_continuum_and_its_noise(rng: np.random.Generator) -> None:
    clean = 1.0 + GRID.wave / 4000.0 + 2.0 * bump(5000.0) - 0.8 * bump(5500.0)
    good = np.ones((3, 1000), dtype=bool)
    # Without noise, well above it, and deep in it.
    sigma = np.array([[0.0], [0.1], [30.0]])
    light = clean + sigma * rng.standard_normal((3, 1000))
    found = contrast(light, np.broadcast_to(sigma**2, (3, 1000)), good, GRID)
    for row in (0, 1):
        distance = np.minimum(np.abs(GRID.wave - 5000.0), np.abs(GRID.wave - 5500.0))
        # Beside a strong line the running mean is raised, so that a little around it stands out too.
        assert distance[found[row]].max() < 60
        assert found[row, [500, 750]].all()
    # Where nothing is clear the most significant pixel is the region: it is never empty.
    assert 1 <= found[2].sum() <= 3
