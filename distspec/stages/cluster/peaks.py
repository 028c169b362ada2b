"""Clusters of explanations: spectra that are odd for the same reason have similar weights over wavelength.

Pure functions of arrays. A row that is all zero has no direction; it is in no cluster, label -1.

References:
    Ortiz Manrique & Boquien 2025: absolute weights of unit length, k-means, k by inertia and silhouette.
    Rousseeuw 1987, J. Comput. Appl. Math. 20, 53: silhouettes.
    Campello, Moulavi & Sander 2013, PAKDD: HDBSCAN.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float64

from distspec.spectra.lines.wavelengths import ABSORPTION, EMISSION
from distspec.spectra.segments import run_around
from distspec.statistics.clustering import Means

__all__ = ["Peak", "peaks"]

_PEAKS: Final = 5

_LOWEST: Final = 0.3

_HALF: Final = 0.5
"""Peaks of the mean weights that are told: how many, from which height on, and where each ends."""

_LINES: Final = 4
"""A peak over more lines than this is named after none: it is continuum."""


# --- what clusters have to do with anything else ---------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """Where the mean weights of a cluster are large.

    Arguments:
        low, high: where it has fallen to half of its height, Å.
        top: centre of its heaviest region, Å.
        value: its mean |weight|, 1 for that of the largest peak.
        signed: mean weight there, on the same scale: as large as `value` where all members agree on the sign.
        lines: names of those within it.
    """

    low: float
    high: float
    top: float
    value: float
    signed: float
    lines: tuple[str, ...]


def peaks(mean: Means, signed: Means, edges: Float64[np.ndarray, "regions+1"], rest: bool) -> list[Peak]:
    """Find the peaks of mean weights, the highest first; those below 0.3 are left out.

    Arguments:
        mean: |weights|, the largest of them 1.
        signed: weights on the same scale.
        edges: of the regions, Å.
        rest: whether these are wavelengths at rest, where lines have their names.
    """
    left = mean.copy()
    found: list[Peak] = []
    while len(found) < _PEAKS and left.max(initial=0.0) >= _LOWEST:
        top = int(left.argmax())
        start, stop = run_around(left > _HALF * left[top], top)
        low, high = float(edges[start]), float(edges[stop])
        middle = float((edges[top] + edges[top + 1]) / 2)
        lines = _lines(low, high) if rest else ()
        found.append(Peak(low, high, middle, float(mean[top]), float(signed[top]), lines))
        left[start:stop] = 0.0
    return found


def _lines(low: float, high: float) -> tuple[str, ...]:
    """Name the emission lines between two wavelengths at rest, else the absorption lines; of many none."""
    emitted, absorbed = ([name for name, wave in of.items() if low <= wave < high] for of in (EMISSION, ABSORPTION))
    names = emitted or absorbed
    return tuple(names) if len(names) <= _LINES else ()
