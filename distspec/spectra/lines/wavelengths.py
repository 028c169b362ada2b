"""Spectral lines in vacuum, and the pixels near them.

Wavelengths are vacuum Å at rest (NIST / SDSS line list). The public code of Ortiz & Boquien masks air wavelengths on
a vacuum grid, 83 km/s off; that is not repeated here.
"""

from typing import Final

import numpy as np
from jaxtyping import Bool, Float64

from distspec.spectra import LIGHT_SPEED, WaveGrid

__all__ = ["ABSORPTION", "EMISSION", "FILTERED", "near_lines", "nearest_line"]

EMISSION: Final[dict[str, float]] = {
    "Ly alpha": 1215.67,
    "N V 1240": 1240.81,
    "Si IV 1398": 1397.61,
    "C IV 1549": 1549.48,
    "He II 1640": 1640.40,
    "C III] 1909": 1908.73,
    "Mg II 2799": 2799.12,
    "[Ne V] 3426": 3426.84,
    "[O II] 3727": 3727.092,
    "[O II] 3730": 3729.875,
    "[Ne III] 3869": 3869.86,
    "H delta": 4102.892,
    "H gamma": 4341.684,
    "[O III] 4364": 4364.436,
    "He II 4687": 4687.02,
    "H beta": 4862.683,
    "[O III] 4960": 4960.295,
    "[O III] 5008": 5008.240,
    "He I 5877": 5877.25,
    "[O I] 6302": 6302.046,
    "[N II] 6550": 6549.86,
    "H alpha": 6564.61,
    "[N II] 6585": 6585.27,
    "[S II] 6718": 6718.29,
    "[S II] 6733": 6732.67,
    "[Ar III] 7138": 7137.77,
}
"""Emission lines, vacuum Å."""

ABSORPTION: Final[dict[str, float]] = {
    "Ca K": 3934.777,
    "Ca H": 3969.588,
    "H delta": 4102.892,
    "G band": 4305.61,
    "H gamma": 4341.684,
    "H beta": 4862.683,
    "Mg b1": 5185.05,
    "Mg b2": 5174.13,
    "Mg b4": 5168.76,
    "Na D2": 5891.583,
    "Na D1": 5897.558,
    "H alpha": 6564.61,
    "Ca II 8500": 8500.36,
    "Ca II 8544": 8544.44,
    "Ca II 8665": 8664.52,
}
"""Absorption features of galaxies and stars, vacuum Å."""

FILTERED: Final[tuple[str, ...]] = (
    "[O II] 3727",
    "H delta",
    "H gamma",
    "H beta",
    "[O III] 4960",
    "[O III] 5008",
    "[N II] 6550",
    "H alpha",
    "[N II] 6585",
    "[S II] 6718",
    "[S II] 6733",
)
"""The eleven lines that the filtered scores leave out (Ortiz & Boquien 2025; [O II] 3730 is absent there too)."""


def near_lines(
    grid: WaveGrid,
    velocity: float,
    redshift: Float64[np.ndarray, "n"] | None = None,
    lines: tuple[str, ...] = FILTERED,
) -> Bool[np.ndarray, "n pixels"]:
    """Mark the pixels within `velocity` of a line's centre.

    Arguments:
        grid: rest-frame or observed-frame grid.
        velocity: half-width of each window, km/s.
        redshift: of each spectrum's lines on this grid; None for a rest-frame grid. NaN marks nothing.
        lines: names from `EMISSION`.

    Returns:
        True where |λ - λ₀| <= λ₀ v / c for any of the lines; one row for a rest-frame grid, which serves all spectra.
    """
    stretch = np.ones(1) if redshift is None else 1.0 + redshift
    near = np.zeros((len(stretch), grid.pixels), dtype=bool)
    for name in lines:
        center = (EMISSION[name] * stretch)[:, None]
        near |= np.abs(grid.wave - center) <= center * (velocity / LIGHT_SPEED)
    return near


def nearest_line(wave: float, redshift: float | None = None, velocity: float = 500.0) -> str | None:
    """Name the emission or absorption line nearest to a wavelength; None where none is within `velocity`.

    Arguments:
        wave: Å, vacuum.
        redshift: of the lines on this axis; None for the rest frame. NaN gives no line.
        velocity: largest distance, km/s.

    Example:
        >>> nearest_line(5010.0), nearest_line(5100.0), nearest_line(5509.0, redshift=0.1)
        ('[O III] 5008', None, '[O III] 5008')
    """
    stretch = 1.0 if redshift is None else 1.0 + redshift
    distances = {name: abs(wave / (line * stretch) - 1) * LIGHT_SPEED for name, line in (ABSORPTION | EMISSION).items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= velocity else None
