"""What the files of all surveys have in common beyond their format: which units are meant."""

import re
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from distspec.errors import SourceError
from distspec.sources.files.headers import Header

__all__ = ["check_flux_unit", "pixel_numbers", "refuse_air"]

GRID_TOLERANCE = 0.01
"""Wavelengths may miss the pixel centers by this much of a pixel; rounding log10(λ) to float32 takes 0.0024."""


def pixel_numbers(position: Float64[np.ndarray, "m"], place: str, grid: str) -> Int64[np.ndarray, "m"]:
    """Round fractional pixel numbers, which must be whole ones but for rounding of the wavelengths.

    Raises:
        SourceError: the wavelengths do not lie on the survey's grid.
    """
    number = np.rint(position)
    miss = np.abs(position - number)
    # Written so that NaN fails too.
    if not (miss <= GRID_TOLERANCE).all():
        raise SourceError(
            f"{place}: wavelengths miss the pixel centers by up to {miss.max():.2g} pixel; expected {grid}"
        )
    return np.asarray(number, np.int64)


def check_flux_unit(unit: Any, place: str) -> None:
    """Refuse a flux unit that is stated and is not 1e-17 erg/s/cm²/Å.

    Raises:
        SourceError: the flux is in another unit.
    """
    if unit is None or not str(unit).strip():
        return
    text = str(unit).lower().replace(" ", "")
    if not (re.match(r"(1\.?0?e-17|10(\*\*|\^)\(?-17\)?)", text) and "erg" in text and "ang" in text):
        raise SourceError(f"{place}: flux in {str(unit)!r}; expected 1e-17 erg/s/cm2/Angstrom")


def refuse_air(header: Header) -> None:
    """Refuse wavelengths that a header states to be in air: converting them would be a guess at the formula used.

    Raises:
        SourceError: VACUUM is false, or AIRORVAC is "air".
    """
    if header.get("VACUUM") is False or str(header.get("AIRORVAC") or "").strip().lower() == "air":
        raise SourceError(f"{header.place}: wavelengths in air by the header (VACUUM or AIRORVAC); expected vacuum")
