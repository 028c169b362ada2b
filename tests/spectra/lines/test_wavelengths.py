import numpy as np

from distspec.spectra import LIGHT_SPEED, WaveGrid
from distspec.spectra.lines.wavelengths import EMISSION, FILTERED, near_lines


def test_wavelengths_are_vacuum() -> None:
    # Air wavelengths of the public code; vacuum ones are longer by 83 km/s.
    air = {"[O III] 5008": 5006.843, "H alpha": 6562.787, "[S II] 6733": 6730.812, "[O II] 3727": 3726.040}
    for name, wave in air.items():
        offset = (EMISSION[name] - wave) / wave * LIGHT_SPEED
        assert 80 < offset < 87, name


def test_eleven_lines_mask_a_hundred_angstroms_of_the_paper_grid() -> None:
    # On a contiguous grid of 3802 pixels the reference masks 101.
    grid = WaveGrid.between("linear", 3698.05, 7500.0, 3802)
    assert len(FILTERED) == 11
    assert abs(int(near_lines(grid, 250.0).sum()) - 101) <= 3


def test_windows_move_with_the_redshift_and_unknown_redshifts_mark_nothing() -> None:
    grid = WaveGrid.between("log", 3600.0, 9800.0, 4000)
    near = near_lines(grid, 500.0, np.array([0.0, 0.3, np.nan]))
    for z, row in zip((0.0, 0.3), near, strict=False):
        center = EMISSION["H beta"] * (1 + z)
        assert row[np.argmin(abs(grid.wave - center))]
        assert not row[np.argmin(abs(grid.wave - center * 1.005))]
    assert not near[2].any()
    assert (near[0] == near_lines(grid, 500.0)[0]).all()
