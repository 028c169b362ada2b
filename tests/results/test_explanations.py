"""What changes along a way gets the right names, and no more than it should."""

import numpy as np
import pytest

from distspec.results.ascents import Ascents
from distspec.spectra import WaveGrid
from distspec.spectra.lines.changes import changes

GRID = WaveGrid.between("log", 3600.0, 7400.0, 800)


def line(center: float, height: float, width: float = 5.0) -> np.ndarray:
    return height * np.exp(-0.5 * ((GRID.wave - center) / width) ** 2)


def test_lines_are_found_and_named_on_a_slope() -> None:
    slope = 0.2 * (GRID.wave - 5500) / 1900
    growth = slope + line(5008.24, -1.0) + line(6564.61, 0.8) + line(5350.0, 0.6)
    found = changes(growth.astype(np.float32), GRID)
    assert [one.line for one in found] == ["[O III] 5008", "H alpha", None]
    np.testing.assert_allclose([one.peak for one in found], [5008.24, 6564.61, 5350.0], atol=3.0)
    assert found[0].label == f"[O III] 5008 ({found[0].peak:.0f} Å)"
    assert found[2].label == f"{found[2].peak:.0f} Å"
    assert [np.sign(one.amount) for one in found] == [-1, 1, 1]
    assert [round(abs(one.amount), 1) for one in found] == [1.0, 0.8, 0.6]


def test_a_tilt_is_two_regions_and_no_line() -> None:
    found = changes(((GRID.wave - 5500) / 1900).astype(np.float32), GRID)
    assert len(found) == 2
    assert all(one.broad and one.line is None for one in found)
    rising = next(one for one in found if one.amount > 0)
    assert rising.high > 7390
    assert rising.low == pytest.approx(6450, abs=60)
    assert "Å" in rising.label
    assert "–" in rising.label


def test_lines_move_with_the_redshift_and_unknown_ones_have_no_name() -> None:
    growth = line(5008.24 * 1.1, 1.0).astype(np.float32)
    assert changes(growth, GRID, 0.1)[0].line == "[O III] 5008"
    assert changes(growth, GRID)[0].line is None
    assert changes(growth, GRID, np.nan)[0].line is None


def test_what_the_spectrum_has_no_data_for_is_told() -> None:
    good = np.abs(GRID.wave - 5008) > 60
    found = changes((line(5008.24, 1.0) + line(6564.61, 0.9)).astype(np.float32), GRID, good=good)
    assert [one.seen for one in found] == [False, True]


@pytest.mark.parametrize("growth", [np.zeros(800), np.full(800, np.nan)])
def test_nothing_and_what_is_not_finite_have_no_changes(growth: np.ndarray) -> None:
    assert changes(growth.astype(np.float32), GRID) == []


def test_no_layer_has_no_ways() -> None:
    ways = Ascents(None)
    assert not ways
    assert ways.find(3) is None
    assert ways.decoded(3) is None
