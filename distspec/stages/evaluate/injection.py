"""Known anomalies of graded strength, injected into prepared spectra of the user's own survey.

Spectra are changed as they stand in a store before the statistics of the sample are applied: on its grid, at rest or as
observed, in its unit. Strength 1 is a clear case, with the numbers that the simulated survey uses; another strength
scales the change and nothing else. What varies from host to host follows from the seed, the host's row and the kind:

==================  ====================================================================================================
e+a                 light of A stars at the host's redshift, as bright as the host times the strength
double-peaked       a set of narrow lines with two peaks, H alpha 40 Å wide at rest times the strength
wrong-redshift      one line taken for another, such as H alpha for [O III]; it has one grade, strength is not looked at
two-galaxies        a star-forming galaxy 9-15 % away in 1 + z, as bright as the host times the strength
m-star-overlap      an M2-M5 dwarf at the observer's redshift, as bright as the host times the strength
sn-ia               a type Ia supernova at maximum light, as bright as the host times the strength
featureless-blue    a power law of slope -2 to -3, as bright as the host times the strength
extreme-lines       lines of a metal-poor starburst, H alpha 600-1300 Å wide at rest times the strength
blueshifted-na-d    an outflow's Na D 350-800 km/s to the blue, depth 0.3-0.6; optical depth times the strength
arm-step            one arm of the spectrograph scaled by 1.4-1.8 or its inverse, to the power of the strength
sky-residual        airglow lines' derivative, 0.3-0.9 of the host's level times the strength
cosmic-ray          one to three detector pixels at 25-60 times the host's level, times the strength
red-runaway         a ramp over the last 500-1000 Å up to 2.5-5.5 times the host's level, times the strength
blend               another of the user's spectra, as bright as the host times the strength
redshift-error      the right spectrum at a redshift that is wrong by 3000 km/s times the strength
calibration-step    as arm-step, at any wavelength in the middle three fifths of the data
==================  ====================================================================================================

A host's level is the median of its |flux| over good pixels; "as bright" compares medians over the pixels that both
have. Changes are noiseless and the host's noise stays, with three exceptions: a blend adds the companion's variance; a
step multiplies error and flux alike, as a calibration does; a moved spectrum is rebinned with its errors. Where nothing
is known of a companion or a moved spectrum, the pixel is masked. Then the recipe's last steps are taken again.

In an observed-frame store a wrong redshift (`MOVED`) changes the redshift that a detector is told, and no flux.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt64

from distspec.config import Prepare
from distspec.errors import ConfigError
from distspec.prepare.rebin import rebin
from distspec.prepare.recipe import Z_MAX, clean, normalizer, scaled
from distspec.sources.simulation.anomalies import ANOMALIES, CONFUSIONS, PLACES, runaway, spike, step_factor
from distspec.sources.simulation.instrument import DICHROIC
from distspec.spectra import LIGHT_SPEED, Spectra, WaveGrid
from distspec.spectra.lines.wavelengths import ABSORPTION, EMISSION
from distspec.stages.evaluate.companions import WAVES, library
from distspec.stages.evaluate.regions import contrast, heavy, smooth, windows
from distspec.statistics.summaries import row_median

__all__ = ["GRADED", "KINDS", "MOVED", "Injected", "describe", "inject"]

KINDS: Final[tuple[str, ...]] = (*ANOMALIES, "blend", "redshift-error", "calibration-step")
"""What can be injected: the simulated survey's kinds, and three more."""

GRADED: Final[Mapping[str, bool]] = {kind: kind != "wrong-redshift" for kind in KINDS}
"""Whether strength matters; a redshift that took one line for another is wrong, not more or less so."""

MOVED: Final = ("wrong-redshift", "redshift-error")
"""Kinds that are a wrong redshift: in an observed-frame store only a detector that reads it can find them."""

# In an observed-frame store these need no redshift: they happen on Earth, or in front of the object.
_ANYWHERE: Final = (
    *("m-star-overlap", "arm-step", "sky-residual", "cosmic-ray"),
    *("red-runaway", "blend", "calibration-step"),
)

_DESCRIPTIONS: Final[dict[str, str]] = {
    "e+a": "strong Balmer absorption of A stars",
    "double-peaked": "narrow emission lines with two peaks",
    "wrong-redshift": "one line taken for another",
    "two-galaxies": "a second, star-forming galaxy in the fibre",
    "m-star-overlap": "an M dwarf in front",
    "sn-ia": "a type Ia supernova at maximum light",
    "featureless-blue": "a steep blue continuum without features",
    "extreme-lines": "emission lines of a metal-poor starburst",
    "blueshifted-na-d": "Na D absorbed by an outflow",
    "arm-step": "one arm of the spectrograph scaled",
    "sky-residual": "residuals of airglow lines",
    "cosmic-ray": "a spike of one to three detector pixels",
    "red-runaway": "the red end running away upwards",
    "blend": "another of the survey's spectra in the same fibre",
    "redshift-error": "a redshift wrong by 3000 km/s times the strength",
    "calibration-step": "a step in the flux calibration at an arbitrary wavelength",
}

TRACE = 0.5
"""A kind is not possible where, at strength 1, no pixel would change by this part of its error."""

KEPT = 0.5
"""Nor where less than this share of a host's good pixels stays good."""

_BLUEST: Final = 0.35

_STRONG_LINES: Final = (
    *(EMISSION[name] for name in ("Ly alpha", "C IV 1549", "C III] 1909", "Mg II 2799", "[O II] 3727", "[O II] 3730")),
    *(EMISSION[name] for name in ("H beta", "[O III] 4960", "[O III] 5008", "[N II] 6550", "H alpha", "[N II] 6585")),
    *(ABSORPTION[name] for name in ("Ca K", "Ca H", "Mg b2", "Na D2")),
)

_CORE: Final = 900.0  # half-width of a line's window, km/s: core and wings of the wider narrow lines

Pixels = Float64[np.ndarray, "n pixels"]

Mask = Bool[np.ndarray, "n pixels"]

Values = Float64[np.ndarray, "n"]

Flags = Bool[np.ndarray, "n"]


@dataclass(frozen=True, eq=False)
class Injected:
    """Hosts with an anomaly.

    Arguments:
        spectra: the hosts in their order, changed where the kind is `possible` and as they were elsewhere.
        region: good pixels that make the planted spectrum odd; the same at every strength, but for moved spectra, whose
            lines move. Empty where the kind is not possible.
        possible: False where the kind would leave no trace on the grid, or cannot be made for want of a redshift.
    """

    spectra: Spectra
    region: Mask
    possible: Flags

    @property
    def share(self) -> Values:
        """Share of a spectrum's good pixels that its region covers: how often blind pointing hits it."""
        return np.asarray(self.region.sum(axis=1) / np.maximum(self.spectra.good.sum(axis=1), 1))


def describe(kind: str) -> str:
    """Say in a few words what a kind is, for tables."""
    return _DESCRIPTIONS[kind]


def inject(
    kind: str,
    hosts: Spectra,
    z: Float64[np.ndarray, "n"],
    strength: float,
    seed: int,
    settings: Prepare,
    companions: Spectra | None = None,
    companion_z: Float64[np.ndarray, "n"] | None = None,
) -> Injected:
    """Inject one anomaly into each host. A row's result depends on nothing but the arguments and that row.

    Arguments:
        kind: one of `KINDS`.
        hosts: prepared spectra before the statistics of the sample (`SpectraStore.take` with `frozen=False`).
        z: their redshifts; NaN where unknown.
        strength: 1 is a clear case; see above for what it scales.
        seed: of all that varies from host to host; strengths share it.
        settings: the recipe of the hosts.
        companions: for a blend, the other spectrum of each host, of the same recipe.
        companion_z: their redshifts; needed where the recipe's frame is the rest frame.

    Returns:
        The changed spectra, normalised again and with the recipe's noise floor, as if they had been observed so.

    Raises:
        ConfigError: the kind is unknown, or the strength is not positive.
        ValueError: a blend without companions or, in the rest frame, without their redshifts; or of another grid.
    """
    if kind not in KINDS:
        raise ConfigError(f"evaluate.kinds has {kind!r}; expected one of {', '.join(KINDS)}")
    if not 0 < strength < np.inf:
        raise ConfigError(f"evaluate.strengths has {strength:g}; expected a positive number")
    host = _Hosts.of(kind, hosts, z, seed, settings)
    if kind == "blend":
        draft = _blend(host, strength, *_second(hosts, companions, companion_z, host.rest))
    elif kind in MOVED:
        draft = _moved(kind, host, strength, settings)
    elif kind in ("arm-step", "calibration-step"):
        draft = _step(kind, host, strength)
    elif kind in ("e+a", "two-galaxies", "m-star-overlap", "sn-ia", "featureless-blue"):
        draft = _companion(kind, host, strength)
    elif kind == "blueshifted-na-d":
        draft = _sodium(host, strength)
    else:
        draft = _added(host, _ADDITIVE[kind](host), strength, _region_of(kind, host))
    return _finish(hosts, host, draft, settings)


@dataclass(frozen=True, eq=False)
class _Hosts:
    """Hosts ready for work: float64, zero behind the mask, and where their lines and the observer's are.

    Arguments:
        level: median of |flux|; 0 without a good pixel.
        z: redshift, 0 where unknown. `known` says which, or that none is needed.
        lines: wavelength on the grid over that at the object's rest.
        sky: observed wavelength over that on the grid.
        dice: uniform numbers.
        rest: whether the grid is at rest.
    """

    flux: Pixels
    ivar: Pixels
    grid: WaveGrid
    level: Values
    z: Values
    known: Flags
    lines: Values
    sky: Values
    dice: Float64[np.ndarray, "n 5"]
    rest: bool

    @property
    def good(self) -> Mask:
        return np.asarray(self.ivar > 0)

    @classmethod
    def of(cls, kind: str, hosts: Spectra, z: Values, seed: int, settings: Prepare) -> "_Hosts":
        flux, ivar = clean(hosts.flux, hosts.ivar)
        rest = settings.frame == "rest"
        known = np.isfinite(z) & (z > -1) & (z <= Z_MAX)
        z = np.where(known, z, 0.0)
        one = np.ones(len(z))
        level = np.nan_to_num(row_median(np.abs(flux), ivar > 0))
        lines, sky = (one, 1.0 + z) if rest else (1.0 + z, one)
        known = known | (not rest and kind in _ANYWHERE)
        return cls(flux, ivar, hosts.grid, level, z, known, lines, sky, _dice(kind, hosts.rows, seed), rest)


def _dice(kind: str, rows: Int64[np.ndarray, "n"], seed: int) -> Float64[np.ndarray, "n 5"]:
    """Give each row five numbers in [0, 1) by a hash, splitmix64 of row, kind and seed."""
    start = (seed * 0xD1342543DE82EF95 + zlib.crc32(kind.encode()) * 0x2545F4914F6CDD1D) % 2**64
    with np.errstate(over="ignore"):
        count = rows.astype(np.uint64)[:, None] * np.uint64(5) + np.arange(1, 6, dtype=np.uint64)
        mixed: UInt64[np.ndarray, "n 5"] = count * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    # 53 bits are what a float64 holds: more would round up to 1.
    return np.asarray(((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


@dataclass(frozen=True, eq=False)
class _Draft:
    """Changed hosts before the recipe's last steps; `trace` is what strength 1 changes, 0 where nothing."""

    flux: Pixels
    ivar: Pixels
    trace: Pixels
    region: Mask
    possible: Flags
    z: Values


def _finish(hosts: Spectra, host: _Hosts, draft: _Draft, settings: Prepare) -> Injected:
    """Take the recipe's last steps again; where the kind is not possible, give the host."""
    before = normalizer(settings.normalize, host.flux, host.ivar, host.grid, host.z)
    after = normalizer(settings.normalize, draft.flux, draft.ivar, host.grid, draft.z)
    # Relative to the host's own norm: flux may have been multiplied after it was normalised.
    sound = (before > 0) & (after > 0) & np.isfinite(before) & np.isfinite(after)
    norm = np.where(sound, after, 1.0) / np.where(sound, before, 1.0)
    if settings.flux_factor:
        norm *= (1.0 + host.z) / (1.0 + draft.z)
    flux, ivar = scaled(draft.flux, draft.ivar, norm, settings.max_pixel_snr)
    good = ivar > 0
    region = draft.region & good
    region = np.where(region.any(axis=1, keepdims=True), region, heavy(draft.trace, good))
    possible = np.asarray(sound & host.known & draft.possible & (host.level > 0)) & region.any(axis=1)
    own = possible[:, None]
    redshift = hosts.redshift if host.rest else np.where(possible & (draft.z != host.z), draft.z, _told(hosts))
    spectra = Spectra(
        hosts.rows,
        np.where(own, flux, np.where(host.good, hosts.flux, np.float32(0))),
        np.where(own, ivar, np.where(host.good, hosts.ivar, np.float32(0))),
        hosts.grid,
        redshift,
    )
    return Injected(spectra, region & own, possible)


def _told(hosts: Spectra) -> Values:
    return np.full(len(hosts), np.nan) if hosts.redshift is None else hosts.redshift


# --- what is added ----------------------------------------------------------------------------------------------------


def _added(host: _Hosts, change: Pixels, strength: float, region: Mask | None) -> _Draft:
    """Add a noiseless change, given at strength 1."""
    change = np.where(host.good, change, 0.0)
    region = heavy(change, host.good) if region is None else region
    return _Draft(host.flux + strength * change, host.ivar, change, region, _traced(host, change), host.z)


def _traced(host: _Hosts, change: Pixels) -> Flags:
    """Tell where a change shows in the noise of any pixel."""
    return np.asarray((np.abs(change) * np.sqrt(host.ivar)).max(axis=1, initial=0.0) >= TRACE)


def _emission(kind: str, host: _Hosts) -> Pixels:
    return np.asarray(host.level[:, None] * _placed(kind, host, host.lines)[0])


def _airglow(host: _Hosts) -> Pixels:
    pattern = _placed("sky-residual", host, 1.0 / host.sky)[0]
    return np.asarray(((0.3 + 0.6 * host.dice[:, 0]) * host.level)[:, None] * pattern)


def _cosmic_ray(host: _Hosts) -> Pixels:
    """Put a cosmic ray on a good pixel, as wide as SDSS's pixels and not as the grid's."""
    height, parts = spike(host.dice)
    height *= host.level
    center = host.grid.wave[_nth(host.good, host.dice[:, 0])]
    width = center * (np.log(10.0) * WAVES.step)
    edges = host.grid.edges
    total = np.zeros_like(host.flux)
    for offset, part in zip((0.0, 1.0, -1.0), parts, strict=True):
        low = (center + (offset - 0.5) * width)[:, None]
        overlap = np.minimum(low + width[:, None], edges[1:]) - np.maximum(low, edges[:-1])
        total += (part * height)[:, None] * np.clip(overlap, 0.0, None)
    return np.asarray(total / np.diff(edges))


def _red_end(host: _Hosts) -> Pixels:
    """Let the red end of the data run away; on a short grid over two fifths of it at most."""
    wave, pixels = host.grid.wave, host.grid.pixels
    first, last = wave[host.good.argmax(axis=1)], wave[pixels - 1 - host.good[:, ::-1].argmax(axis=1)]
    length = np.minimum((500.0 + 500.0 * host.dice[:, 1]) / host.sky, 0.4 * (last - first))
    length = np.maximum(length, np.diff(host.grid.edges)[-1])
    return runaway(host.dice[:, 0], host.level, (wave - (last - length)[:, None]) / length[:, None])


_ADDITIVE: Final = {
    "double-peaked": lambda host: _emission("double-peaked", host),
    "extreme-lines": lambda host: _emission("extreme-lines", host),
    "sky-residual": _airglow,
    "cosmic-ray": _cosmic_ray,
    "red-runaway": _red_end,
}


# --- second objects ---------------------------------------------------------------------------------------------------


def _companion(kind: str, host: _Hosts, strength: float) -> _Draft:
    """Add a template of the simulated survey."""
    stretch = host.lines
    if kind == "two-galaxies":
        away = 0.09 + 0.06 * host.dice[:, 1]
        stretch = stretch * np.where((host.dice[:, 2] < 0.5) & (host.z > 0.2), 1.0 - away, 1.0 + away)
    if kind == "m-star-overlap":
        stretch = 1.0 / host.sky
    light, known = _placed(kind, host, stretch)
    return _together(host, light, known, np.zeros_like(light), strength, _region_of(kind, host))


def _second(
    hosts: Spectra, companions: Spectra | None, z: Values | None, rest: bool
) -> tuple[Spectra, Float64[np.ndarray, "n"]]:
    if companions is None or len(companions) != len(hosts) or companions.grid != hosts.grid:
        raise ValueError(f"{companions} as companions of {hosts}; expected one for each host, on the same grid")
    if rest and z is None:
        raise ValueError("companions at rest without companion_z; give their redshifts")
    return companions, np.zeros(len(hosts)) if z is None else z


def _blend(host: _Hosts, strength: float, companions: Spectra, z: Values) -> _Draft:
    """Add other spectra of the survey at their own redshifts, with their variances."""
    # From the companion's rest frame to the host's; observed spectra are in one frame already.
    move = (1.0 + host.z) / (1.0 + z) - 1.0 if host.rest else np.zeros(len(z))
    light, ivar = rebin(*clean(companions.flux, companions.ivar), host.grid, host.grid, move)
    known = ivar > 0
    return _together(host, light, known, np.where(known, 1.0 / np.where(known, ivar, 1.0), 0.0), strength, None)


def _together(
    host: _Hosts, light: Pixels, known: Mask, variance: Pixels, strength: float, region: Mask | None
) -> _Draft:
    """Put a second object as bright as the host, times the strength, into the fibre."""
    both = host.good & known
    own, other = row_median(np.abs(host.flux), both), row_median(light, both)
    possible = (own > 0) & (other > 0) & (both.sum(axis=1) >= KEPT * host.good.sum(axis=1))
    scale = np.where(possible, own, 0.0) / np.where(possible, other, 1.0)
    change = np.where(both, scale[:, None] * light, 0.0)
    noise = np.where(both, scale[:, None] ** 2 * variance, 0.0)
    ivar = np.where(both, host.ivar / (1.0 + strength**2 * noise * host.ivar), 0.0)
    region = contrast(change, noise, both, host.grid) if region is None else region
    flux = np.where(both, host.flux + strength * change, 0.0)
    return _Draft(flux, ivar, change, region, possible & _traced(host, change), host.z)


# --- what is scaled ---------------------------------------------------------------------------------------------------


def _sodium(host: _Hosts, strength: float) -> _Draft:
    """Absorb the host's light, of which the noise is not a part: that of a smoothed host."""
    through, known = _placed("blueshifted-na-d", host, host.lines)
    through = np.where(known, through, 1.0)
    light = np.where(host.good, smooth(host.flux, host.good, 1.0), 0.0)
    trace = (through - 1.0) * light
    flux = host.flux + (through**strength - 1.0) * light
    return _Draft(flux, host.ivar, trace, heavy(trace, host.good), _traced(host, trace), host.z)


def _step(kind: str, host: _Hosts, strength: float) -> _Draft:
    """Scale the side of a step that shows less of the spectrum."""
    at = DICHROIC / host.sky if kind == "arm-step" else host.grid.wave[_nth(host.good, 0.2 + 0.6 * host.dice[:, 1])]
    blue = host.grid.wave < at[:, None]
    counts = np.stack([(host.good & blue).sum(axis=1), (host.good & ~blue).sum(axis=1)])
    side = np.where((counts[0] <= counts[1])[:, None], blue, ~blue)
    # A side of a pixel or two is no side.
    possible = counts.min(axis=0) >= np.maximum(3, 0.02 * counts.sum(axis=0))
    factor = step_factor(host.dice[:, 0])
    trace = np.where(side, (factor - 1.0)[:, None] * host.flux, 0.0)
    scale = np.where(side, (factor**strength)[:, None], 1.0)
    # After normalisation a step is an oddity of the contrast between its two sides.
    region = side | (np.abs(host.grid.wave - at[:, None]) <= (100.0 / host.sky)[:, None])
    return _Draft(host.flux * scale, host.ivar / scale**2, trace, region, possible & _traced(host, trace), host.z)


# --- wrong redshifts --------------------------------------------------------------------------------------------------


def _moved(kind: str, host: _Hosts, strength: float, settings: Prepare) -> _Draft:
    """Take hosts to a wrong redshift: their lines appear at 1 / ratio of where they should be."""
    if kind == "wrong-redshift":
        ratio, possible = _confused(host, settings)
    else:
        ratio, possible = np.full(len(host.z), 1.0 + 3000.0 * strength / LIGHT_SPEED), np.ones(len(host.z), dtype=bool)
        # Not to redshifts below 0, whatever the strength.
        ratio = np.where((host.z < 0.05) | (host.dice[:, 0] < 0.5), ratio, 1.0 / ratio)
    z = (1.0 + host.z) * ratio - 1.0
    flux, ivar = host.flux, host.ivar
    if host.rest:
        flux, ivar = rebin(flux, ivar, host.grid, host.grid, ratio - 1.0)
        possible &= (ivar > 0).sum(axis=1) >= KEPT * host.good.sum(axis=1)
    should = np.ones(len(z)) if host.rest else 1.0 + z
    half = _CORE / LIGHT_SPEED
    cores = tuple((wave * (1.0 - half), wave * (1.0 + half)) for wave in _STRONG_LINES)
    region = windows(host.grid, cores, should) | windows(host.grid, cores, should / ratio)
    return _Draft(flux, ivar, np.where(ivar > 0, flux - host.flux, 0.0), region, possible, z)


def _confused(host: _Hosts, settings: Prepare) -> tuple[Values, Flags]:
    """Choose among the confusions that lead into the recipe's range of redshifts and leave enough on the grid."""
    cuts, wave = settings.cuts, host.grid.wave
    low = 0.005 if cuts.z_min is None else max(cuts.z_min, 0.005)
    high = Z_MAX if cuts.z_max is None else cuts.z_max
    z = (1.0 + host.z)[:, None] * CONFUSIONS - 1.0
    allowed = (z > low) & (z <= high)
    if host.rest:
        first = wave[host.good.argmax(axis=1)][:, None]
        last = wave[host.grid.pixels - 1 - host.good[:, ::-1].argmax(axis=1)][:, None]
        kept = np.minimum(last / CONFUSIONS, wave[-1]) / np.maximum(first / CONFUSIONS, wave[0])
        allowed &= np.log(kept) >= 1.1 * KEPT * np.log(last / first)
    return CONFUSIONS[_nth(allowed, host.dice[:, 0])], allowed.any(axis=1)


# --- where ------------------------------------------------------------------------------------------------------------


def _placed(kind: str, host: _Hosts, stretch: Values) -> tuple[Pixels, Mask]:
    """Give each host one of a kind's templates on its grid, and where it is known; 0 elsewhere."""
    templates = library(kind)
    chosen = templates[(host.dice[:, 4] * len(templates)).astype(np.int64)]
    flux, ivar = rebin(chosen, np.ones_like(chosen), WAVES, host.grid, 1.0 / stretch - 1.0)
    return flux, ivar > 0


def _region_of(kind: str, host: _Hosts) -> Mask | None:
    """Give the windows of a kind that has them."""
    if kind not in PLACES:
        return None
    stretch = 1.0 / host.sky if kind in ("m-star-overlap", "sky-residual") else host.lines
    region = windows(host.grid, PLACES[kind], stretch)
    if kind == "featureless-blue":
        # The steep end; the windows are lines that so blue a galaxy would have.
        upto = host.good.cumsum(axis=1)
        region |= upto <= _BLUEST * upto[:, -1:]
    return region


def _nth(choices: Bool[np.ndarray, "n m"], dice: Values) -> Int64[np.ndarray, "n"]:
    """Choose one of the true entries of each row; the first entry where there is none."""
    upto = choices.cumsum(axis=1)
    return np.asarray((upto > (dice * upto[:, -1]).astype(np.int64)[:, None]).argmax(axis=1))
