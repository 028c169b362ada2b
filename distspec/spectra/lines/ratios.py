"""Line ratios: the diagram that parts star formation from active nuclei, its divisions, and reddening by dust.

References:
    Baldwin, Phillips & Terlevich 1981, PASP 93, 5: the diagram. Kewley et al. 2001, ApJ 556, 121; Kauffmann et al.
    2003, MNRAS 346, 1055; Kewley et al. 2006, MNRAS 372, 961; Schawinski et al. 2007, MNRAS 382, 1415: its divisions.
    Calzetti et al. 2000, ApJ 533, 682: reddening.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Float64, Shaped

from distspec.spectra.lines.tables import LineTable, Ratios, balmer, ratio_of

__all__ = ["CASE_B", "CLASSES", "Bpt", "Decrement", "bpt", "decrement", "kauffmann", "kewley", "schawinski"]

CASE_B, _K_ALPHA, _K_BETA = 2.86, 3.33, 4.60
"""H alpha / H beta without dust (10,000 K, 100 cm⁻³), and the reddening curve of Calzetti et al. at both."""

_DRAWS: Final = np.random.default_rng(2006).normal(size=(400, 3))
"""Errors with which a class is tried again: the same for all spectra, so that none depends on its neighbours."""


def kauffmann(x: Any) -> Float64[np.ndarray, "..."]:
    """Give log [O III]/H beta below which galaxies form stars, over log [N II]/H alpha (Kauffmann et al. 2003, eq. 1).

    NaN from 0.05 on.
    """
    return _curve(x, 0.05, 1.3)


def kewley(x: Any) -> Float64[np.ndarray, "..."]:
    """Give the highest log [O III]/H beta of a starburst over log [N II]/H alpha (Kewley et al. 2001, to 0.47)."""
    return _curve(x, 0.47, 1.19)


def schawinski(x: Any) -> Float64[np.ndarray, "..."]:
    """Give log [O III]/H beta over log [N II]/H alpha that parts Seyfert nuclei (above) from LINERs."""
    return np.asarray(1.05 * np.asarray(x, np.float64) + 0.45)


def _curve(x: Any, end: float, level: float) -> Float64[np.ndarray, "..."]:
    x = np.asarray(x, np.float64)
    inside = x < end
    return np.where(inside, 0.61 / np.where(inside, x - end, -1.0) + level, np.nan)


@dataclass(frozen=True)
class Bpt:
    """Classes of n spectra by line ratios.

    Arguments:
        names: "star-forming", "composite", "Seyfert", "LINER", "AGN" where it is open which; "" where nothing is known.
        probability: that the class is the same with other errors; NaN where there is none. Of the errors of
            measurement only, not of the divisions.
    """

    names: Shaped[np.ndarray, "n"]
    probability: Float64[np.ndarray, "n"]


CLASSES: Final = np.array(["", "star-forming", "composite", "AGN", "Seyfert", "LINER"])


def bpt(found: Ratios) -> Bpt:
    """Class spectra by [O III]/H beta, [N II]/H alpha and [S II]/H alpha.

    Star-forming and composite by the curves of Kauffmann et al. and Kewley et al. over [N II]. Above both, Seyfert or
    LINER by [S II] (Kewley et al. 2006), by [N II] where it is not known (Schawinski et al.). Without [N II], only
    what lies above all starbursts has a class. The probability is the share of 400 draws from the errors.
    """
    values, errors = (np.stack(each) for each in zip(*(found.of(name) for name in ("O3", "N2", "S2")), strict=True))
    classes = _classes(*values)
    drawn = values[:, None] + _DRAWS.T[:, :, None] * errors[:, None]
    same = (_classes(*drawn) == classes).mean(axis=0)
    return Bpt(CLASSES[classes], np.where(classes > 0, same, np.nan))


def _classes(o3: Any, n2: Any, s2: Any) -> Any:
    known = np.isfinite(o3)
    starburst, mixed = o3 < kauffmann(n2), o3 < kewley(n2)
    high = np.where(np.isfinite(n2), ~mixed, o3 > 1.19)
    division = np.where(np.isfinite(s2), 1.89 * s2 + 0.76, schawinski(n2))
    nucleus = np.where(np.isnan(division), 3, np.where(o3 > division, 4, 5))
    return np.where(known & starburst, 1, np.where(known & mixed, 2, np.where(known & high, nucleus, 0)))


@dataclass(frozen=True)
class Decrement:
    """H alpha / H beta of n spectra and the reddening that it tells of; NaN unless both lines are 3 errors above 0."""

    ratio: Float64[np.ndarray, "n"]
    error: Float64[np.ndarray, "n"]
    ebv: Float64[np.ndarray, "n"]
    ebv_error: Float64[np.ndarray, "n"]


def decrement(table: LineTable, absorption: float = 1.0) -> Decrement:
    """Give H alpha / H beta and E(B-V) (mag) for an intrinsic ratio of 2.86; negative where the ratio is below that.

    Arguments:
        absorption: as of `line_tables.balmer`.
    """
    value, error, *_ = ratio_of(*(balmer(table, name, absorption) for name in ("H alpha", "H beta")))
    per_dex = 2.5 / (_K_BETA - _K_ALPHA)
    return Decrement(10**value, np.log(10) * error * 10**value, per_dex * (value - np.log10(CASE_B)), per_dex * error)
