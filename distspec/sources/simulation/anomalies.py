"""Planted anomalies: what is changed, how strongly, and at which wavelengths the change makes a spectrum odd.

Some kinds change what an object is (`plant`), some put a second object into the fibre (`plant` too), some spoil the
observed spectrum (`spoil`). `windows` says where. Strengths and places come from four uniform numbers a spectrum, so
that truth and flux follow from the same values.

The windows are wavelengths in the rest frame of the *catalogue* redshift, because a user sees the spectrum there:

==================  ===================================================================================================
e+a                 strong Balmer lines, Hβ to the series' limit, without emission
double-peaked       the lines [O II], Hβ, [O III] 5008 and Hα + [N II], each with two peaks
wrong-redshift      where the true [O II], Hβ, [O III] and Hα appear
two-galaxies        where the second galaxy's [O II], Hβ, [O III] and Hα appear
m-star-overlap      four deep TiO bands, one with the Ca II triplet, at the observer's wavelengths
sn-ia               the broad troughs and peaks of Ca II, Mg II + Fe II, S II and Si II
featureless-blue    the steep end below 4700 Å, and where so blue a galaxy would have Hβ + [O III] and Hα + [N II]
extreme-lines       [O II], Hβ + [O III] 4960, [O III] 5008, Hα
blueshifted-na-d    the outflow's trough, blueward of Na D
arm-step            the arm that was scaled (the one that shows less of the spectrum), and 100 Å beyond the step, since
                    after normalisation a step is an oddity of the contrast between its two sides
sky-residual        the bands of OH airglow
cosmic-ray          the spike and a pixel or two to its sides
red-runaway         the part where the excess is more than a tenth of its largest value
==================  ===================================================================================================
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float32, Float64, Int64, Shaped

from distspec.sources.simulation.instrument import DICHROIC, OH_BANDS, sky_lines
from distspec.sources.simulation.populations import (
    Galaxies,
    Objects,
    draw_galaxies,
    empty_objects,
    line_fluxes,
    population_weights,
)
from distspec.sources.simulation.templates import INSTRUMENT_SIGMA, STAR_TYPES, Basis
from distspec.spectra import LIGHT_SPEED
from distspec.spectra.lines.wavelengths import ABSORPTION, EMISSION

__all__ = [
    "ANOMALIES",
    "CONFUSIONS",
    "NEEDS_LINES",
    "PLACES",
    "STRONG",
    "Companions",
    "plant",
    "residual_pattern",
    "runaway",
    "spike",
    "spoil",
    "step_factor",
    "windows",
]

ANOMALIES: Final[tuple[str, ...]] = (
    "e+a",
    "double-peaked",
    "wrong-redshift",
    "two-galaxies",
    "m-star-overlap",
    "sn-ia",
    "featureless-blue",
    "extreme-lines",
    "blueshifted-na-d",
    "arm-step",
    "sky-residual",
    "cosmic-ray",
    "red-runaway",
)
"""Kinds of planted anomalies, in the order in which they are dealt out."""

STRONG: Final[tuple[str, ...]] = ("extreme-lines", "cosmic-ray", "arm-step", "featureless-blue")
"""Kinds that any useful detector must find."""

NEEDS_LINES: Final[tuple[str, ...]] = ("double-peaked", "wrong-redshift", "extreme-lines", "blueshifted-na-d")
"""Kinds that are planted on galaxies with good emission lines."""

SEEN: Final = (3820.0, 9200.0)
"""Observed range in which every artefact is placed, Å: inside SDSS's and DESI's."""

SHOWN: Final = (3388.0, 8318.0)
"""Rest-frame range in which every feature is placed, Å: the grid of the usual recipe."""

_KIND: Final = {name: number for number, name in enumerate(ANOMALIES)}

# Half-widths cover a line's core and the wings of the widest ones, Å at rest.
_LINE_WINDOWS: Final = ((3718.0, 3740.0), (4848.0, 4877.0), (4992.0, 5024.0), (6530.0, 6606.0))

PLACES: Final[Mapping[str, tuple[tuple[float, float], ...]]] = {
    "e+a": ((3735.0, 3995.0), (4065.0, 4140.0), (4300.0, 4385.0), (4825.0, 4900.0)),
    "sn-ia": ((3620.0, 3980.0), (4180.0, 5080.0), (5230.0, 5540.0), (5980.0, 6400.0)),
    "featureless-blue": ((4848.0, 5024.0), (6530.0, 6606.0)),
    "m-star-overlap": ((6155.0, 6330.0), (7050.0, 7300.0), (7585.0, 7950.0), (8430.0, 8690.0)),
    "sky-residual": OH_BANDS,
}
"""Windows that make a kind odd, Å vacuum at rest; of the last two kinds as observed."""

CONFUSIONS: Final = np.array(
    [
        EMISSION[true] / EMISSION[taken]
        for true, taken in (
            ("H alpha", "[O III] 5008"),
            ("[O III] 5008", "H alpha"),
            ("H beta", "[O III] 5008"),
            ("[O III] 5008", "H beta"),
            ("H alpha", "[S II] 6733"),
            ("[S II] 6733", "H alpha"),
        )
    ]
)
"""True line over the one that it is taken for: what codes that fit redshifts to lines confuse."""


@dataclass
class Companions:
    """Second objects in a fibre.

    Arguments:
        rows: whose fibre each one is in, position in the block.
        objects: the second objects.
        share: their brightness relative to the first object's.
    """

    rows: Int64[np.ndarray, "m"]
    objects: Objects
    share: Float64[np.ndarray, "m"]


def plant(
    kind: Int64[np.ndarray, "n"],
    dice: Float64[np.ndarray, "n 4"],
    galaxies: Galaxies,
    rng: np.random.Generator,
    z_max: float,
    basis: Basis,
) -> tuple[Float64[np.ndarray, "n"], Companions]:
    """Change galaxies in place into anomalous ones; kinds that spoil the observed spectrum are left to `spoil`.

    Arguments:
        kind: index into `ANOMALIES` of each galaxy.
        dice: uniform numbers that set strength and place.
        galaxies: the hosts, one for each.
        rng: source of randomness for the second galaxies; the number of draws depends on n only.
        z_max: largest redshift that the catalogue may hold.
        basis: the templates.

    Returns:
        The catalogue's redshifts and the companions.
    """
    objects = galaxies.objects
    n = len(kind)
    second = draw_galaxies(rng, n, z_max, basis, active=True).objects
    catalog = objects.z.copy()

    rows = np.flatnonzero(kind == _KIND["e+a"])
    shares = np.zeros((rows.size, 4))
    shares[:, 2] = 0.70 + 0.18 * dice[rows, 0]
    shares[:, 1] = 1.0 - shares[:, 2]
    objects.weights[rows, basis.populations] = population_weights(shares, np.full(rows.size, 160.0))
    objects.dust[rows] = 0.04
    objects.narrow[rows] = 0.0
    objects.broad[rows] = 0.0
    galaxies.subclass[rows] = ""

    rows = np.flatnonzero(kind == _KIND["double-peaked"])
    objects.split[rows] = 350.0 + 250.0 * dice[rows, 0]
    objects.narrow_sigma[rows] = 80.0 + 20.0 * dice[rows, 1]

    rows = np.flatnonzero(kind == _KIND["wrong-redshift"])
    catalog[rows] = _confuse(objects.z[rows], dice[rows], z_max)

    rows = np.flatnonzero(kind == _KIND["featureless-blue"])
    objects.put(rows, _featureless(objects.z[rows], -2.0 - dice[rows, 0], len(basis.names)))
    galaxies.subclass[rows] = ""

    rows = np.flatnonzero(kind == _KIND["extreme-lines"])
    _make_extreme(objects, rows, dice, basis)
    galaxies.subclass[rows] = "STARBURST"

    rows = np.flatnonzero(kind == _KIND["blueshifted-na-d"])
    objects.sodium[rows, 0] = 0.30 + 0.30 * dice[rows, 0]
    objects.sodium[rows, 1] = -(350.0 + 450.0 * dice[rows, 1])
    objects.sodium[rows, 2] = 150.0 + 100.0 * dice[rows, 2]
    objects.dust[rows] = np.maximum(objects.dust[rows], 0.2)  # the gas that absorbs carries dust with it
    return catalog, _companions(kind, dice, objects, second, z_max, basis)


def _confuse(z: Float64[np.ndarray, "n"], dice: Float64[np.ndarray, "n 4"], z_max: float) -> Float64[np.ndarray, "n"]:
    """Take one line for another, among the confusions that leave the redshift inside the survey's range."""
    wrong = (1.0 + z)[:, None] * CONFUSIONS - 1.0
    allowed = (wrong > 0.005) & (wrong <= z_max)
    # One of the allowed ones at random; where none is, a blunder by half the range.
    choice = np.argmax(np.where(allowed, np.modf(dice[:, :1] + 0.37 * np.arange(6))[0] + 1.0, 0.0), axis=1)
    blunder = np.where(z > z_max / 2, z - z_max / 2, z + z_max / 2)
    return np.where(allowed.any(axis=1), wrong[np.arange(len(z)), choice], blunder)


def _featureless(z: Float64[np.ndarray, "n"], slope: Float64[np.ndarray, "n"], templates: int) -> Objects:
    """Make steep, pure power laws, as some BL Lac objects and tidal disruptions show."""
    objects = empty_objects(len(z), templates)
    objects.z, objects.slope = z, slope
    objects.power = np.ones(len(z))
    return objects


def _make_extreme(
    objects: Objects, rows: Int64[np.ndarray, "m"], dice: Float64[np.ndarray, "n 4"], basis: Basis
) -> None:
    """Turn galaxies into metal-poor starbursts with H alpha 600-1300 Å wide (green peas, Cardamone et al. 2009)."""
    shares = np.tile([0.0, 0.05, 0.15, 0.80], (rows.size, 1))
    objects.weights[rows, basis.populations] = population_weights(shares, np.full(rows.size, 90.0))
    objects.dust[rows] = 0.05
    objects.narrow_sigma[rows] = 60.0
    chosen = objects[rows]
    width = 600.0 + 700.0 * dice[rows, 0]
    n2, o3 = -1.6 + 0.25 * dice[rows, 1], 0.68 + 0.12 * dice[rows, 2]
    objects.narrow[rows] = line_fluxes(chosen, width, n2, o3, np.zeros(rows.size, dtype=bool), basis)


def _companions(
    kind: Int64[np.ndarray, "n"],
    dice: Float64[np.ndarray, "n 4"],
    objects: Objects,
    second: Objects,
    z_max: float,
    basis: Basis,
) -> Companions:
    """Make the second objects in the fibre: a galaxy elsewhere, an M dwarf, a supernova."""
    rows = np.flatnonzero(np.isin(kind, [_KIND["two-galaxies"], _KIND["m-star-overlap"], _KIND["sn-ia"]]))
    other = empty_objects(rows.size, len(basis.names))
    share = 0.6 + 0.6 * dice[rows, 0]

    which = np.flatnonzero(kind[rows] == _KIND["two-galaxies"])
    pair = second[rows[which]]
    # At another redshift, wherever the first one lies: a third to a half of the survey's range away.
    away = z_max * (0.3 + 0.2 * dice[rows[which], 1])
    z = objects.z[rows[which]]
    pair.z = np.where(z > z_max / 2, z - away, z + away)
    other.put(which, pair)

    which = np.flatnonzero(kind[rows] == _KIND["m-star-overlap"])
    types = STAR_TYPES.index("M2") + (4 * dice[rows[which], 1]).astype(np.int64)
    other.weights[which, basis.stars.start + types] = 1.0

    which = np.flatnonzero(kind[rows] == _KIND["sn-ia"])
    other.weights[which, basis.index("SN Ia")] = 1.0
    other.z[which] = objects.z[rows[which]]
    return Companions(rows, other, share)


def spoil(
    flux: Float32[np.ndarray, "n pixels"],
    wave: Float64[np.ndarray, "pixels"],
    kind: Int64[np.ndarray, "n"],
    dice: Float64[np.ndarray, "n 4"],
    z: Float64[np.ndarray, "n"],
) -> None:
    """Put the artefacts of instrument and reduction into noiseless observed spectra, in place.

    Arguments:
        flux: the spectra.
        wave: Å observed.
        kind: index into `ANOMALIES`, -1 for none.
        dice: uniform numbers that set strength and place.
        z: catalogue redshift, which decides where a user will look.
    """
    hit = np.flatnonzero(kind >= _KIND["arm-step"])
    if not hit.size:
        return
    level = np.zeros((len(kind), 1), dtype=np.float32)
    level[hit] = np.median(flux[hit], axis=1, keepdims=True)

    rows = np.flatnonzero(kind == _KIND["arm-step"])
    factor = step_factor(dice[rows, 0])
    scaled = np.where(_blue_arm(z[rows])[:, None], wave < DICHROIC, wave >= DICHROIC)
    flux[rows] *= np.where(scaled, factor[:, None], 1.0).astype(np.float32)

    rows = np.flatnonzero(kind == _KIND["sky-residual"])
    if rows.size:
        height = (0.3 + 0.6 * dice[rows, :1]) * level[rows]
        flux[rows] += (height * residual_pattern(wave)).astype(np.float32)

    rows = np.flatnonzero(kind == _KIND["cosmic-ray"])
    center = _spike_center(dice[rows], z[rows])
    nearest = np.abs(wave[None, :] - center[:, None]).argmin(axis=1)
    # One to three pixels, whatever the grid: a hit is as wide as the detector's pixels, not as a line.
    height, parts = spike(dice[rows])
    for offset, part in zip((0, 1, -1), parts, strict=True):
        pixel = np.clip(nearest + offset, 0, wave.size - 1)
        flux[rows, pixel] += (part * height * level[rows, 0]).astype(np.float32)

    rows = np.flatnonzero(kind == _KIND["red-runaway"])
    start, end = _runaway_range(z[rows], dice[rows])
    place = (wave[None, :] - start[:, None]) / (end - start)[:, None]
    flux[rows] += runaway(dice[rows, 0], level[rows, 0], place).astype(np.float32)


def step_factor(dice: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """Give what one arm is scaled by: 1.4-1.8, or the inverse."""
    return np.asarray(np.where(dice < 0.5, 1.4 + 0.8 * dice, 1.0 / (1.0 + 0.8 * dice)))


def spike(
    dice: Float64[np.ndarray, "n dice"],
) -> tuple[Float64[np.ndarray, "n"], tuple[Float64[np.ndarray, "n"], ...]]:
    """Give a cosmic ray's height over the level, and the parts of it in its own pixel, in the next and the one before.

    One to three pixels are hit. The first of the numbers is left to say where.
    """
    parts = (np.ones(len(dice)), dice[:, 2], dice[:, 3] * (dice[:, 3] > 0.5))
    return 25.0 + 35.0 * dice[:, 1], parts


def runaway(
    dice: Float64[np.ndarray, "n"], level: Shaped[np.ndarray, "n"], place: Float64[np.ndarray, "n pixels"]
) -> Float64[np.ndarray, "n pixels"]:
    """Give what is added where the red end runs away.

    Arguments:
        dice: uniform numbers that set the height.
        level: of the spectra.
        place: of each pixel on the ramp, 0 at its start and 1 at its end.
    """
    return np.asarray(((2.5 + 3.0 * dice) * level)[:, None] * np.clip(place, 0.0, 1.15) ** 2)


def _blue_arm(z: Float64[np.ndarray, "n"]) -> np.ndarray:
    """Say for each redshift whether the blue arm shows less of the rest-frame range than the red arm."""
    step = DICHROIC / (1.0 + z)
    low, high = np.maximum(SHOWN[0], SEEN[0] / (1.0 + z)), np.minimum(SHOWN[1], SEEN[1] / (1.0 + z))
    return np.asarray(step / low < high / step)


def residual_pattern(wave: Float64[np.ndarray, "pixels"]) -> Float64[np.ndarray, "pixels"]:
    """Shape that a wavelength error of the sky model leaves: the lines' derivative, one unit high, OH bands only."""
    derivative = (sky_lines(wave + 0.5) - sky_lines(wave - 0.5)) / 1.0
    inside = np.zeros(wave.size, dtype=bool)
    for low, high in OH_BANDS:
        inside |= (wave > low) & (wave < high)
    # Faint lines must count too: the square root compresses the range of the lines' strengths.
    shape = np.sign(derivative) * np.sqrt(np.abs(derivative))
    # A unit that does not depend on the pixels: the largest value in the bands is about 3.5 on any grid.
    return np.where(inside, shape / 3.5, 0.0)


def _spike_center(dice: Float64[np.ndarray, "n 4"], z: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """Place of a cosmic ray, Å observed, where the user's grid shows it."""
    low, high = np.maximum(3500.0 * (1.0 + z), 4000.0), np.minimum(8200.0 * (1.0 + z), 9000.0)
    center = low + (high - low) * dice[:, 0]
    # Recipes mask the strongest sky line; a spike under the mask would not be there to find.
    return np.asarray(np.where(np.abs(center - 5577.5) < 20.0, center + 60.0, center))


def _runaway_range(
    z: Float64[np.ndarray, "n"], dice: Float64[np.ndarray, "n 4"]
) -> tuple[Float64[np.ndarray, "n"], Float64[np.ndarray, "n"]]:
    """Where a runaway of the red end starts, and where the user's spectrum ends, Å observed."""
    end = np.minimum(SEEN[1], SHOWN[1] * (1.0 + z))
    return end - 500.0 - 500.0 * dice[:, 1], end


def windows(
    kind: Int64[np.ndarray, "n"],
    dice: Float64[np.ndarray, "n 4"],
    z: Float64[np.ndarray, "n"],
    objects: Objects,
    companions: Companions,
) -> Float32[np.ndarray, "n 4 2"]:
    """Give the wavelengths that make planted spectra odd, Å vacuum in the rest frame of the catalogue redshift.

    Arguments:
        kind: index into `ANOMALIES`.
        dice: the numbers that `plant` and `spoil` used.
        z: catalogue redshift.
        objects: the planted objects.
        companions: the second objects.

    Returns:
        Up to four pairs (low, high) each, NaN where unused; none outside what the user can see.
    """
    found = np.full((len(kind), 4, 2), np.nan)
    lines = np.array(_LINE_WINDOWS)

    def set_rest(name: str, pairs: tuple[tuple[float, float], ...]) -> None:
        found[np.flatnonzero(kind == _KIND[name])[:, None], np.arange(len(pairs))[None, :]] = np.array(pairs)

    set_rest("e+a", PLACES["e+a"])
    set_rest("double-peaked", _LINE_WINDOWS)
    set_rest("sn-ia", PLACES["sn-ia"])
    set_rest("featureless-blue", ((SHOWN[0], 4700.0), *PLACES["featureless-blue"]))
    set_rest("extreme-lines", ((3715.0, 3742.0), (4845.0, 4975.0), (4990.0, 5026.0), (6535.0, 6600.0)))

    rows = np.flatnonzero(kind == _KIND["wrong-redshift"])
    found[rows] = lines * ((1.0 + objects.z[rows]) / (1.0 + z[rows]))[:, None, None]

    owner = np.flatnonzero(kind[companions.rows] == _KIND["two-galaxies"])
    rows = companions.rows[owner]
    found[rows] = lines * ((1.0 + companions.objects.z[owner]) / (1.0 + z[rows]))[:, None, None]

    rows = np.flatnonzero(kind == _KIND["m-star-overlap"])
    found[rows] = np.array(PLACES["m-star-overlap"])
    rows_sky = np.flatnonzero(kind == _KIND["sky-residual"])
    found[rows_sky] = np.array(PLACES["sky-residual"])
    observed = np.concatenate([rows, rows_sky])
    found[observed] /= (1.0 + z[observed])[:, None, None]

    rows = np.flatnonzero(kind == _KIND["blueshifted-na-d"])
    velocity, sigma = objects.sodium[rows, 1], np.hypot(objects.sodium[rows, 2], INSTRUMENT_SIGMA)
    found[rows, 0, 0] = ABSORPTION["Na D2"] * (1.0 + (velocity - 2.2 * sigma) / LIGHT_SPEED)
    found[rows, 0, 1] = ABSORPTION["Na D1"] * (1.0 + (velocity + 2.2 * sigma) / LIGHT_SPEED)
    _mark_artefacts(found, kind, dice, z)
    return _clip(found, z)


def _mark_artefacts(
    found: Float64[np.ndarray, "n 4 2"],
    kind: Int64[np.ndarray, "n"],
    dice: Float64[np.ndarray, "n 4"],
    z: Float64[np.ndarray, "n"],
) -> None:
    """Set the windows of what one arm, one pixel or one end of the detector did."""
    rows = np.flatnonzero(kind == _KIND["arm-step"])
    blue = _blue_arm(z[rows])
    found[rows, 0, 0] = np.where(blue, SHOWN[0], (DICHROIC - 100.0) / (1.0 + z[rows]))
    found[rows, 0, 1] = np.where(blue, (DICHROIC + 100.0) / (1.0 + z[rows]), SHOWN[1])

    rows = np.flatnonzero(kind == _KIND["cosmic-ray"])
    center = _spike_center(dice[rows], z[rows])
    found[rows, 0] = (center[:, None] + np.array([-5.0, 5.0])) / (1.0 + z[rows])[:, None]

    rows = np.flatnonzero(kind == _KIND["red-runaway"])
    start, end = _runaway_range(z[rows], dice[rows])
    found[rows, 0] = np.stack([start + 0.316 * (end - start), end], axis=1) / (1.0 + z[rows])[:, None]


def _clip(found: Float64[np.ndarray, "n 4 2"], z: Float64[np.ndarray, "n"]) -> Float32[np.ndarray, "n 4 2"]:
    """Cut windows to what is shown and observed; drop those that nothing is left of, and close the gaps."""
    low = np.maximum(found[..., 0], np.maximum(SHOWN[0], SEEN[0] / (1.0 + z))[:, None])
    high = np.minimum(found[..., 1], np.minimum(SHOWN[1], SEEN[1] / (1.0 + z))[:, None])
    kept = np.stack([low, high], axis=2)
    kept[~(high - low > 3.0)] = np.nan
    order = np.argsort(np.where(np.isnan(kept[..., 0]), np.inf, kept[..., 0]), axis=1)
    return np.take_along_axis(kept, order[..., None], axis=1).astype(np.float32)
