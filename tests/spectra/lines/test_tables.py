import numpy as np

from distspec.spectra import LIGHT_SPEED, Spectra, WaveGrid
from distspec.spectra.lines.tables import COMPLEXES, LINES, OXYGEN, Window
from distspec.spectra.lines.wavelengths import EMISSION


def test_every_line_that_is_measured_is_fitted_once_and_inside_its_complex() -> None:
    for kinds in (("other", "narrow", "ultraviolet"), ("other", "broad", "ultraviolet")):
        complexes = [one for kind in kinds for one in COMPLEXES[kind]]
        for one in complexes:
            assert all(one.low < EMISSION[name] < one.high for line in one.lines for name in line.shares)
        fitted = [
            f"broad {name}" if line.component else name
            for one in complexes
            for line in one.lines
            for name in line.shares
        ]
        assert len(fitted) == len(set(fitted))
        assert {name for name in LINES if not name.startswith("broad")} - set(fitted) == {OXYGEN}
    assert {name for name in LINES if name.startswith("broad")} <= set(fitted)


def test_a_profile_holds_its_flux_and_its_derivatives_are_those_of_differences() -> None:
    grid = WaveGrid.between("log", 4800.0, 5100.0, 150)
    ones = np.ones((2, 150), np.float32)
    window = Window.of(Spectra(np.arange(2), ones, ones, grid, np.array([0.0, 0.01])), 4900.0, 5030.0)
    velocity, sigma = np.array([100.0, -200.0]), np.array([200.0, 300.0])
    density, by_velocity, by_sigma = window.profile(4960.295, velocity, sigma)
    np.testing.assert_allclose((density * window.step).sum(axis=1), 1, atol=1e-6)
    ahead, behind = (window.profile(4960.295, velocity + h, sigma)[0] for h in (0.01, -0.01))
    np.testing.assert_allclose(by_velocity, (ahead - behind) / 0.02, atol=1e-8)
    wider, narrower = (window.profile(4960.295, velocity, sigma + h)[0] for h in (0.01, -0.01))
    np.testing.assert_allclose(by_sigma, (wider - narrower) / 0.02, atol=1e-8)
    center = (window.middle * density * window.step).sum(axis=1)
    np.testing.assert_allclose((center / 4960.295 - 1) * LIGHT_SPEED, velocity, atol=3)
