"""Templates of what is planted into users' own spectra: noiseless, at rest, on one grid that is wider than any survey.

They are made of the parts that the simulated survey is made of, with its numbers (`anomalies`). A kind with free
numbers has a fixed set of variants, so that a host's template depends neither on other hosts nor on how many there are.
"""

import zlib
from functools import lru_cache
from typing import Final

import numpy as np
from jaxtyping import Float32, Float64

from distspec.sources.simulation.anomalies import residual_pattern
from distspec.sources.simulation.instrument import optics, render
from distspec.sources.simulation.populations import (
    Objects,
    draw_galaxies,
    empty_objects,
    line_fluxes,
    population_weights,
)
from distspec.sources.simulation.templates import STAR_TYPES, Basis, basis
from distspec.spectra import WaveGrid

__all__ = ["WAVES", "library"]

WAVES: Final = WaveGrid("log", 1010.0, 1e-4, 12_900)
"""SDSS's sampling from 1010 to 19,700 Å: whatever a grid in any frame asks for between redshifts 0 and 1, and more."""

_VARIANTS: Final = 32

# Wider than WAVES by some pixels, since rendering interpolates between two.
_BASIS: Final = WaveGrid("log", 1005.0, 1e-4, 12_950)


@lru_cache(maxsize=16)
def library(kind: str) -> Float32[np.ndarray, "variants pixels"]:
    """Give a kind's templates on `WAVES`; shared, not to be written to.

    Returns:
        Light of second objects ("e+a", "two-galaxies", "m-star-overlap", "sn-ia", "featureless-blue") in a unit of its
        own; emission over a continuum of 1 ("double-peaked", "extreme-lines"); transmission ("blueshifted-na-d"); or
        airglow's residual on the observer's axis, largest values about 1 ("sky-residual").

    Raises:
        KeyError: the kind needs no template.
    """
    templates = basis(_BASIS)
    if kind == "sky-residual":
        flux = residual_pattern(WAVES.wave).astype(np.float32)[None, :]
    else:
        dice = np.random.default_rng(zlib.crc32(kind.encode())).random((_VARIANTS, 3))
        objects = _OBJECTS[kind](dice, templates)
        flux = render(objects, np.zeros(len(objects)), templates, optics(WAVES, _BASIS), WAVES)
    flux.setflags(write=False)
    return flux


Dice = Float64[np.ndarray, "variants 3"]


def _a_stars(dice: Dice, templates: Basis) -> Objects:
    objects = empty_objects(len(dice), len(templates.names))
    shares = np.zeros((len(dice), 4))
    shares[:, 2] = 0.70 + 0.18 * dice[:, 0]
    shares[:, 1] = 1.0 - shares[:, 2]
    objects.weights[:, templates.populations] = population_weights(shares, np.full(len(dice), 160.0))
    objects.dust[:] = 0.04
    return objects


def _galaxies(dice: Dice, templates: Basis) -> Objects:
    objects = draw_galaxies(np.random.default_rng(zlib.crc32(dice.tobytes())), len(dice), 0.1, templates, True).objects
    objects.z[:] = 0.0
    return objects


def _m_dwarfs(dice: Dice, templates: Basis) -> Objects:
    first = templates.stars.start + STAR_TYPES.index("M2")
    objects = empty_objects(4, len(templates.names))
    objects.weights[np.arange(4), first + np.arange(4)] = 1.0
    return objects


def _supernova(dice: Dice, templates: Basis) -> Objects:
    objects = empty_objects(1, len(templates.names))
    objects.weights[0, templates.index("SN Ia")] = 1.0
    return objects


def _power_laws(dice: Dice, templates: Basis) -> Objects:
    objects = empty_objects(len(dice), len(templates.names))
    objects.power[:] = 1.0
    objects.slope[:] = -2.0 - dice[:, 0]
    return objects


def _two_peaks(dice: Dice, templates: Basis) -> Objects:
    """Lines of an ordinary star-forming galaxy: H alpha 40 Å wide, in the middle of the BPT diagram's ridge."""
    objects = empty_objects(len(dice), len(templates.names))
    objects.dust[:] = 0.1
    objects.split[:] = 350.0 + 250.0 * dice[:, 0]
    objects.narrow_sigma[:] = 80.0 + 20.0 * dice[:, 1]
    same = np.ones(len(dice))
    return _lines_alone(objects, 40.0 * same, -0.5 * same, 0.0 * same, templates)


def _starburst(dice: Dice, templates: Basis) -> Objects:
    objects = empty_objects(len(dice), len(templates.names))
    objects.dust[:] = 0.05
    objects.narrow_sigma[:] = 60.0
    width, n2, o3 = 600.0 + 700.0 * dice[:, 0], -1.6 + 0.25 * dice[:, 1], 0.68 + 0.12 * dice[:, 2]
    return _lines_alone(objects, width, n2, o3, templates)


def _lines_alone(
    objects: Objects,
    width: Float64[np.ndarray, "n"],
    n2: Float64[np.ndarray, "n"],
    o3: Float64[np.ndarray, "n"],
    templates: Basis,
) -> Objects:
    """Give narrow lines over a continuum of 1, then take the continuum away."""
    objects.power[:] = 1.0
    objects.narrow = line_fluxes(objects, width, n2, o3, np.zeros(len(width), dtype=bool), templates)
    objects.power[:] = 0.0
    return objects


def _outflow(dice: Dice, templates: Basis) -> Objects:
    objects = empty_objects(len(dice), len(templates.names))
    objects.power[:] = 1.0
    objects.sodium[:, 0] = 0.30 + 0.30 * dice[:, 0]
    objects.sodium[:, 1] = -(350.0 + 450.0 * dice[:, 1])
    objects.sodium[:, 2] = 150.0 + 100.0 * dice[:, 2]
    return objects


_OBJECTS: Final = {
    "e+a": _a_stars,
    "two-galaxies": _galaxies,
    "m-star-overlap": _m_dwarfs,
    "sn-ia": _supernova,
    "featureless-blue": _power_laws,
    "double-peaked": _two_peaks,
    "extreme-lines": _starburst,
    "blueshifted-na-d": _outflow,
}
