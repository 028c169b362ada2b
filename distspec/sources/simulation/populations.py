"""Draws of the simulated survey: what a row is before it is observed.

An `Objects` batch holds the numbers from which a spectrum follows: redshift, weights of the templates, dust, line
strengths and widths. Galaxies, quasars and stars are drawn here, with the labels that SDSS would give them; planted
anomalies change the numbers afterwards (`anomalies`).
"""

from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from jaxtyping import Float32, Float64, Int64

from distspec.sources.simulation.templates import BROADENINGS, INSTRUMENT_SIGMA, PIVOT, STAR_TYPES, Basis, attenuation
from distspec.spectra import LIGHT_SPEED
from distspec.spectra.lines.wavelengths import EMISSION

__all__ = [
    "BROAD",
    "NARROW",
    "QUASAR_Z",
    "Galaxies",
    "Objects",
    "draw_galaxies",
    "draw_quasars",
    "draw_stars",
    "empty_objects",
    "kauffmann",
    "kewley",
    "line_fluxes",
    "population_weights",
]

NARROW: Final[tuple[str, ...]] = (
    "[Ne V] 3426",
    "[O II] 3727",
    "[O II] 3730",
    "[Ne III] 3869",
    "H delta",
    "H gamma",
    "[O III] 4364",
    "He II 4687",
    "H beta",
    "[O III] 4960",
    "[O III] 5008",
    "He I 5877",
    "[O I] 6302",
    "[N II] 6550",
    "H alpha",
    "[N II] 6585",
    "[S II] 6718",
    "[S II] 6733",
    "[Ar III] 7138",
)
"""Narrow lines that are simulated, names from `wavelengths.EMISSION`."""

# Equivalent widths in Å at rest of the composite quasar (Vanden Berk et al. 2001, Table 2).
_BROAD_WIDTHS: Final[dict[str, float]] = {
    "Ly alpha": 92.91,
    "N V 1240": 1.11,
    "Si IV 1398": 8.13,
    "C IV 1549": 23.78,
    "He II 1640": 0.51,
    "C III] 1909": 21.19,
    "Mg II 2799": 32.28,
    "H delta": 5.05,
    "H gamma": 12.62,
    "H beta": 46.21,
    "He I 5877": 4.94,
    "H alpha": 194.52,
}

_QUASAR_NARROW: Final[dict[str, float]] = {
    "[Ne V] 3426": 1.18,
    "[O II] 3727": 0.70,
    "[O II] 3730": 0.86,
    "[Ne III] 3869": 1.38,
    "[O III] 4364": 0.46,
    "H beta": 1.30,
    "[O III] 4960": 4.44,
    "[O III] 5008": 13.23,
    "[N II] 6550": 0.66,
    "H alpha": 4.50,
    "[N II] 6585": 2.02,
    "[S II] 6718": 1.65,
    "[S II] 6733": 1.49,
}

BROAD: Final[tuple[str, ...]] = tuple(_BROAD_WIDTHS)
"""Broad lines that are simulated, names from `wavelengths.EMISSION`."""

_NARROW_WAVE: Final = np.array([EMISSION[name] for name in NARROW])

_BROAD_WAVE: Final = np.array([EMISSION[name] for name in BROAD])

_H_ALPHA: Final = EMISSION["H alpha"]

QUASAR_Z: Final = (0.1, 2.5)
"""Quasar redshifts: above 0.1 a quasar outshines its host, above 2.5 Ly alpha forest would need its own model."""


@dataclass
class Objects:
    """What a batch of spectra is made of. Fluxes are relative: a continuum of 1 at 5500 Å at rest.

    Arguments:
        z: true redshift.
        weights: weight of each template of the basis.
        dust: E(B-V) of the stars' own dust, mag.
        power: level at 5500 Å of a power law in wavelength that is added.
        slope: its exponent in F_λ ~ λ^slope.
        narrow: flux of each line in `NARROW`, Å times the continuum unit.
        narrow_sigma: their dispersion without the instrument's, km/s.
        split: separation of the two peaks of every narrow line, km/s; 0 for single peaks.
        broad: flux of each line in `BROAD`.
        broad_sigma: their dispersion, km/s.
        sodium: depth, velocity (km/s) and dispersion (km/s) of an added Na D absorber.
    """

    z: Float64[np.ndarray, "n"]
    weights: Float32[np.ndarray, "n k"]
    dust: Float64[np.ndarray, "n"]
    power: Float64[np.ndarray, "n"]
    slope: Float64[np.ndarray, "n"]
    narrow: Float64[np.ndarray, "n lines"]
    narrow_sigma: Float64[np.ndarray, "n"]
    split: Float64[np.ndarray, "n"]
    broad: Float64[np.ndarray, "n broad_lines"]
    broad_sigma: Float64[np.ndarray, "n"]
    sodium: Float64[np.ndarray, "n 3"]

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, index: Any) -> "Objects":
        return Objects(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def put(self, rows: Int64[np.ndarray, "m"], other: "Objects") -> None:
        """Overwrite some rows by other objects."""
        for f in fields(self):
            getattr(self, f.name)[rows] = getattr(other, f.name)


@dataclass
class Galaxies:
    """A batch of galaxies with the quantities that their labels follow from.

    Arguments:
        objects: the spectra's numbers.
        subclass: SDSS's label.
        h_alpha: equivalent width of narrow H alpha, Å at rest, emission positive.
    """

    objects: Objects
    subclass: np.ndarray
    h_alpha: Float64[np.ndarray, "n"]


def empty_objects(n: int, templates: int) -> Objects:
    """Make `n` objects without any light."""
    return Objects(
        z=np.zeros(n),
        weights=np.zeros((n, templates), dtype=np.float32),
        dust=np.zeros(n),
        power=np.zeros(n),
        slope=np.zeros(n),
        narrow=np.zeros((n, len(NARROW))),
        narrow_sigma=np.full(n, 100.0),
        split=np.zeros(n),
        broad=np.zeros((n, len(BROAD))),
        broad_sigma=np.full(n, 1500.0),
        sodium=np.tile([0.0, 0.0, 200.0], (n, 1)),
    )


def kauffmann(n2: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """Upper limit of star-forming galaxies in log [O III]/Hβ at log [N II]/Hα = `n2` < 0.05 (Kauffmann et al. 2003)."""
    return 0.61 / (n2 - 0.05) + 1.3


def kewley(n2: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """Maximum-starburst line in log [O III]/Hβ at log [N II]/Hα = `n2` < 0.47 (Kewley et al. 2001, eq. 5)."""
    return 0.61 / (n2 - 0.47) + 1.19


def draw_galaxies(rng: np.random.Generator, n: int, z_max: float, basis: Basis, active: bool = False) -> Galaxies:
    """Draw galaxies of the red sequence, the blue cloud and with an active nucleus.

    Few numbers vary independently: age, dust, metallicity and nuclear activity move along the sequences that real
    galaxies form, so that a small latent space can describe them.

    Arguments:
        rng: source of randomness; the number of draws depends on `n` only.
        n: how many.
        z_max: largest redshift.
        basis: the templates.
        active: every galaxy forms stars and shows its lines well.
    """
    u = rng.random((n, 8))
    g = np.clip(rng.standard_normal((n, 10)), -2.5, 2.5)
    objects = empty_objects(n, len(basis.names))
    # The mean of a magnitude-limited sample: few near, most about a third of the way, a tail to the limit.
    objects.z = z_max * (0.03 + 0.97 * rng.beta(2.0, 4.0, n))

    red = (u[:, 0] < 0.40) & (not active)
    agn = (u[:, 1] < 0.13) & (not active)
    youth = np.where(red, 0.02 * u[:, 2], 0.05 + 0.40 * u[:, 2] ** 1.3)
    if active:
        youth = 0.15 + 0.25 * u[:, 2]
    middle = np.where(red, 0.02 + 0.08 * u[:, 3], 0.10 + 0.20 * u[:, 3])
    metal = np.clip(np.where(red, 0.80 + 0.1 * g[:, 0], 0.65 - 0.9 * youth + 0.1 * g[:, 0]), 0.0, 1.0)
    sigma = np.where(red, 190.0 * 10 ** (0.10 * g[:, 1]), 110.0 * 10 ** (0.08 * g[:, 1]))
    objects.dust = np.where(red, 0.03 + 0.02 * np.abs(g[:, 2]), np.clip(0.13 + 0.07 * g[:, 2], 0.0, 0.4))
    old = 1.0 - youth - middle
    shares = np.stack([old * metal, old * (1 - metal), middle, youth], axis=1)
    objects.weights[:, basis.populations] = population_weights(shares, np.hypot(sigma, INSTRUMENT_SIGMA))

    # Log of the H alpha width follows the share of young stars; red galaxies keep a trace, as retired ones do.
    width = 10 ** np.where(red, -0.4 + 0.25 * g[:, 3], 0.60 + 1.9 * youth**0.7 + 0.13 * g[:, 3])
    width = np.where(agn, 10 ** (0.9 + 0.5 * u[:, 4] + 0.1 * g[:, 3]), width)
    n2, o3 = _branch(agn | red, youth, u[:, 5:7], g[:, 4:6])
    objects.narrow_sigma = np.where(agn, 150.0 * 10 ** (0.08 * g[:, 6]), np.where(red, 0.8 * sigma, 0.75 * sigma))
    objects.narrow = line_fluxes(objects, width, n2, o3, agn | red, basis)

    # One active galaxy in ten shows its broad-line region (a Seyfert 1.9 keeps the galaxy's continuum).
    wide = agn & (u[:, 7] < 0.10)
    objects.broad_sigma = np.where(wide, 1100.0 + 250.0 * g[:, 7], 1500.0)
    for name, ratio in (("H alpha", 2.5), ("H beta", 0.5)):
        source = objects.narrow[:, NARROW.index("H alpha")]
        objects.broad[:, BROAD.index(name)] = np.where(wide, ratio * source, 0.0)
    return Galaxies(objects, _galaxy_labels(n2, o3, width, wide | (objects.narrow_sigma > 200.0)), width)


def _branch(
    hard: np.ndarray, youth: Float64[np.ndarray, "n"], u: Float64[np.ndarray, "n 2"], g: Float64[np.ndarray, "n 2"]
) -> tuple[Float64[np.ndarray, "n"], Float64[np.ndarray, "n"]]:
    """Place galaxies on the two branches of the BPT diagram: log [N II]/Hα and log [O III]/Hβ.

    References:
        Baldwin, Phillips & Terlevich 1981; the star-forming ridge is eq. 3 of Kewley et al. 2013 at z = 0,
        https://arxiv.org/abs/1307.0508
    """
    soft_n2 = np.clip(-0.36 - 1.3 * youth + 0.08 * g[:, 0], -1.5, -0.32)
    ridge = 1.1 + 0.61 / (soft_n2 + 0.08)
    soft_o3 = np.clip(ridge + 0.06 * g[:, 1], -1.3, kauffmann(soft_n2) - 0.04)
    # LINER to Seyfert: above both Kewley's line and the straight one by which SDSS's pipeline tells them apart.
    hard_n2 = -0.15 + 0.35 * u[:, 0]
    floor = np.maximum(kewley(hard_n2), 0.7 - 1.2 * (hard_n2 + 0.4))
    hard_o3 = floor + 0.06 + 0.55 * u[:, 1]
    return np.where(hard, hard_n2, soft_n2), np.where(hard, hard_o3, soft_o3)


def _galaxy_labels(
    n2: Float64[np.ndarray, "n"], o3: Float64[np.ndarray, "n"], width: Float64[np.ndarray, "n"], broad: np.ndarray
) -> np.ndarray:
    """Label as SDSS's pipeline does (Bolton et al. 2012, §3.2 and the SDSS catalog pages).

    AGN above log [O III]/Hβ = 0.7 - 1.2 (log [N II]/Hα + 0.4), else STARFORMING, or STARBURST where H alpha is wider
    than 50 Å; nothing where the lines are too weak; BROADLINE added where a line is wider than 200 km/s.
    """
    active = o3 > 0.7 - 1.2 * (n2 + 0.4)
    label = np.where(active, "AGN", np.where(width > 50.0, "STARBURST", "STARFORMING"))
    label = np.where(width > 3.0, label, "")
    joined = np.where(label == "", "BROADLINE", np.char.add(label, " BROADLINE"))
    return np.where(broad & (width > 3.0), joined, label).astype("U24")


def line_fluxes(
    objects: Objects,
    width: Float64[np.ndarray, "n"],
    n2: Float64[np.ndarray, "n"],
    o3: Float64[np.ndarray, "n"],
    hard: np.ndarray,
    basis: Basis,
) -> Float64[np.ndarray, "n lines"]:
    """Give the narrow lines' fluxes of galaxies from the width of H alpha and the place in the BPT diagram.

    References:
        Case B Balmer decrements and doublet ratios from Osterbrock & Ferland 2006, Tables 4.4 and 3.8 and §11.5
        (H alpha / H beta 2.86, 3.1 where the ionising light is hard; [O III] 2.98, [N II] 3.05 after Storey & Zeippen
        2000); gas behind more dust than stars, E_stars = 0.44 E_gas, from Calzetti et al. 2000.

    Arguments:
        objects: the galaxies; weights, dust and power law are read.
        width: equivalent width of H alpha, Å at rest.
        n2: log [N II] 6585 / H alpha.
        o3: log [O III] 5008 / H beta.
        hard: ionised by an active nucleus or by old stars.
        basis: the templates.
    """
    alpha = np.where(hard, 3.1, 2.86)
    oxygen, nitrogen = 10.0**o3, alpha * 10.0**n2
    blue = 10 ** np.where(hard, 0.55, 0.55 - 0.9 * (n2 + 0.95) ** 2)
    sulfur = alpha * 10 ** np.where(hard, -0.28, -0.50 + 0.25 * np.clip(n2 + 0.6, -1.2, 0.3))
    ratios = {
        "[Ne V] 3426": np.where(hard, 0.03 * oxygen, 0.0),
        "[O II] 3727": blue * 0.43,
        "[O II] 3730": blue * 0.57,
        "[Ne III] 3869": 0.085 * oxygen,
        "H delta": np.full_like(width, 0.259),
        "H gamma": np.full_like(width, 0.468),
        "[O III] 4364": np.where(n2 < -1.1, 0.016, 0.004) * oxygen,
        "He II 4687": np.where(hard, 0.02 * oxygen, 0.0),
        "H beta": np.ones_like(width),
        "[O III] 4960": oxygen / 2.98,
        "[O III] 5008": oxygen,
        "He I 5877": np.full_like(width, 0.115),
        "[O I] 6302": alpha * np.where(hard, 0.12, 0.03),
        "[N II] 6550": nitrogen / 3.05,
        "H alpha": alpha,
        "[N II] 6585": nitrogen,
        "[S II] 6718": sulfur * 0.57,
        "[S II] 6733": sulfur * 0.43,
        "[Ar III] 7138": np.full_like(width, 0.08),
    }
    relative = np.stack([ratios[name] for name in NARROW], axis=1) / alpha[:, None]
    k_alpha = attenuation(np.array([_H_ALPHA]))
    gas = (objects.dust / 0.44)[:, None]
    reddened = relative * 10 ** (-0.4 * gas * (attenuation(_NARROW_WAVE) - k_alpha))
    pixel = round(float(basis.grid.position(np.array(_H_ALPHA))))
    level = objects.weights @ basis.flux[:, pixel] * 10 ** (-0.4 * objects.dust * k_alpha)
    level = level + objects.power * (_H_ALPHA / PIVOT) ** objects.slope
    return np.asarray(reddened * (width * level)[:, None])


def population_weights(
    shares: Float64[np.ndarray, "n 4"], sigma: Float64[np.ndarray, "n"]
) -> Float64[np.ndarray, "n k"]:
    """Spread the populations' shares over the tabulated broadenings, linearly between neighbours.

    Arguments:
        shares: share of light at 5500 Å of each of `POPULATIONS`.
        sigma: total velocity dispersion, km/s.
    """
    levels = np.asarray(BROADENINGS)
    position = np.interp(sigma, levels, np.arange(levels.size))
    hat = np.clip(1.0 - np.abs(position[:, None] - np.arange(levels.size)), 0.0, 1.0)
    return np.asarray((shares[:, :, None] * hat[:, None, :]).reshape(len(sigma), shares.shape[1] * levels.size))


def draw_quasars(rng: np.random.Generator, n: int, basis: Basis) -> tuple[Objects, np.ndarray]:
    """Draw quasars with their labels: a power law, broad and narrow lines, iron and Balmer pseudo-continua, a host.

    Half of them lie below z = 0.8, where a rest-frame optical grid still sees them; a recipe for galaxies sets the
    others aside, as it would with a survey's own.

    References:
        Vanden Berk et al. 2001, https://arxiv.org/abs/astro-ph/0105231 (slope, widths of lines)
    """
    u = rng.random((n, 6))
    g = np.clip(rng.standard_normal((n, 6)), -2.5, 2.5)
    objects = empty_objects(n, len(basis.names))
    low, high = QUASAR_Z
    objects.z = np.where(u[:, 0] < 0.5, low + (0.8 - low) * np.sqrt(u[:, 1]), 0.8 + (high - 0.8) * u[:, 1])
    objects.power = np.ones(n)
    objects.slope = -1.56 + 0.25 * g[:, 0]
    objects.dust = np.where(u[:, 2] < 0.1, 0.08 * u[:, 3], 0.0)
    host = 0.45 * np.exp(-objects.z / 0.25) * np.exp(0.4 * g[:, 5])
    shares = host[:, None] * np.array([0.6, 0.2, 0.15, 0.05])
    objects.weights[:, basis.populations] = population_weights(shares, np.full(n, 200.0))
    # At 2500 Å the composite's power law stands 3.4 times above its level at 5500 Å; iron adds a fifth to it.
    objects.weights[:, basis.index("Fe II")] = 0.7 * np.exp(0.3 * g[:, 1])
    objects.weights[:, basis.index("Balmer continuum")] = 0.25 * np.exp(0.2 * g[:, 1])

    broad_level = (_BROAD_WAVE / PIVOT) ** objects.slope[:, None]
    widths = np.array([_BROAD_WIDTHS[name] for name in BROAD])
    objects.broad = widths * broad_level * np.exp(0.25 * g[:, 2])[:, None]
    objects.broad_sigma = 2000.0 * 10 ** (0.13 * g[:, 3])
    narrow_level = (_NARROW_WAVE / PIVOT) ** objects.slope[:, None]
    narrow_widths = np.array([_QUASAR_NARROW.get(name, 0.0) for name in NARROW])
    narrow = np.exp(0.5 * g[:, 4])
    objects.narrow = narrow_widths * narrow_level * narrow[:, None]
    objects.narrow_sigma = 170.0 + 80.0 * u[:, 4]
    # The pipeline compares narrow lines only where H alpha is seen, and only in some of them finds all four.
    compared = (objects.z < 0.4) & (narrow > 1.0)
    return objects, np.where(compared, "AGN BROADLINE", "BROADLINE").astype("U24")


def draw_stars(rng: np.random.Generator, n: int, basis: Basis) -> tuple[Objects, np.ndarray]:
    """Draw stars with their spectral types: a main sequence that a survey of faint stars sees, and white dwarfs."""
    u = rng.random((n, 2))
    objects = empty_objects(n, len(basis.names))
    velocity = np.clip(rng.normal(0.0, 100.0, n), -300.0, 300.0)
    objects.z = velocity / LIGHT_SPEED
    sequence = len(STAR_TYPES) - 1
    # A survey's faint stars: few hot ones, the turn-off of the halo (F), then dwarfs up to M.
    popularity = np.array([0.6, 0.6, 1.2, 1.6, 1.0, 1.0, 1.0, 1.0, 0.8, 0.8, 0.8, 0.9, 0.9, 0.6, 0.4])
    edges = np.concatenate([[0.0], np.cumsum(popularity) / popularity.sum()])
    position = np.clip(np.interp(u[:, 0], edges, np.arange(sequence + 1) - 0.5), 0.0, sequence - 1.0)
    hat = np.clip(1.0 - np.abs(position[:, None] - np.arange(sequence + 1)), 0.0, 1.0)
    dwarf = u[:, 1] < 0.05
    hat[dwarf] = 0.0
    hat[dwarf, sequence] = 1.0
    objects.weights[:, basis.stars] = hat
    types = np.array(STAR_TYPES)[np.where(dwarf, sequence, np.rint(position).astype(np.int64))]
    return objects, types.astype("U24")
