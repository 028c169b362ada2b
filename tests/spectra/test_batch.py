import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distspec.spectra import Spectra, Status, WaveGrid, first_reasons


@given(
    scale=st.sampled_from(["log", "linear"]),
    first=st.floats(500, 9000),
    span=st.floats(1.01, 3.0),
    pixels=st.integers(2, 9000),
)
def test_a_grid_hits_its_ends_and_inverts_its_positions(scale: str, first: float, span: float, pixels: int) -> None:
    grid = WaveGrid.between(scale, first, first * span, pixels)
    assert np.isclose(grid.wave[0], first, rtol=1e-12)
    assert np.isclose(grid.wave[-1], first * span, rtol=1e-9)
    assert np.allclose(grid.position(grid.wave), np.arange(pixels), atol=1e-6)
    assert (np.diff(grid.edges) > 0).all()
    assert ((grid.edges[:-1] < grid.wave) & (grid.wave < grid.edges[1:])).all()
    assert WaveGrid(**grid.to_dict()) == grid
    assert hash(WaveGrid(**grid.to_dict())) == hash(grid)


@pytest.mark.parametrize("wrong", [("cubic", 4000.0, 1.0, 5), ("log", -1.0, 1.0, 5), ("log", 4000.0, 1e-4, 0)])
def test_impossible_grids_are_refused(wrong: tuple) -> None:
    with pytest.raises(ValueError, match=r"grid scale|must be positive"):
        WaveGrid(*wrong)


def test_spectra_that_do_not_fit_their_grid_are_refused(grid: WaveGrid) -> None:
    short = np.zeros((2, grid.pixels - 1), np.float32)
    with pytest.raises(ValueError, match="expected"):
        Spectra(np.arange(2), short, short, grid)


def test_selection_keeps_rows_and_redshifts_together(spectra: Spectra) -> None:
    moved = Spectra(spectra.rows, spectra.flux, spectra.ivar, spectra.grid, np.linspace(0, 1, len(spectra)))
    some = moved[[5, 2]]
    assert some.rows.tolist() == [5, 2]
    assert some.redshift.tolist() == moved.redshift[[5, 2]].tolist()
    assert len(moved[moved.rows > 10]) == len(spectra) - 11


def test_every_status_bit_has_a_sentence() -> None:
    for bit in Status:
        assert len(bit.reasons) == 1
    assert len((Status.DEAD | Status.LOW_SNR).reasons) == 2
    assert Status.OK.reasons == []


def test_first_reasons_add_up() -> None:
    status = np.array([0, 2, 2 | 32, 32, 0, 1024], np.int32)
    reasons = first_reasons(status)
    assert reasons == {"DEAD": 2, "LOW_COVERAGE": 1, "NOT_A_TARGET": 1}
    assert sum(reasons.values()) == (status != 0).sum()
