"""Rest-frame templates of the simulated survey: stellar populations, stars, a supernova, quasar pseudo-continua.

Every template is a black-body continuum times absorption features at their measured places, on one logarithmic grid
in vacuum Å, scaled to 1 at 5500 Å. Any object's smooth spectrum is a weighted sum of them, so a batch of spectra is
one matrix product. They are made to look right to a detector, not to measure ages with.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import numpy as np
from jaxtyping import Float32, Float64
from scipy.ndimage import gaussian_filter1d

from distspec.spectra import LIGHT_SPEED, WaveGrid
from distspec.spectra.lines.wavelengths import ABSORPTION

__all__ = ["BROADENINGS", "INSTRUMENT_SIGMA", "PIVOT", "POPULATIONS", "STAR_TYPES", "Basis", "attenuation", "basis"]

PIVOT: Final = 5500.0
"""Wavelength around which every template has the mean 1, Å."""

INSTRUMENT_SIGMA: Final = 67.0
"""Spectrograph's line spread, km/s: R = 1900, in the middle of SDSS's 1800-2200 (York et al. 2000)."""

BROADENINGS: Final[tuple[float, ...]] = (90.0, 150.0, 225.0, 330.0)
"""Total velocity dispersions at which population templates are tabulated, km/s; others are interpolated."""

POPULATIONS: Final[tuple[str, ...]] = ("old rich", "old poor", "intermediate", "young")
"""Stellar populations: about 10 Gyr at solar and at half-solar metallicity, 0.5-1 Gyr (A stars), below 0.1 Gyr (OB)."""

# Type: effective temperature in K, strength of metal features, depth and width (Å) of Balmer lines, strength of TiO.
# Temperatures after Pecaut & Mamajek (2013); the features' run with type after the atlas of Pickles (1998).
_STARS: Final[dict[str, tuple[float, float, float, float, float]]] = {
    "A0": (9700.0, 0.03, 0.66, 11.0, 0.0),
    "F2": (6900.0, 0.25, 0.45, 8.0, 0.0),
    "F5": (6500.0, 0.35, 0.38, 7.0, 0.0),
    "F9": (6050.0, 0.50, 0.28, 6.0, 0.0),
    "G2": (5770.0, 0.65, 0.22, 5.0, 0.0),
    "K1": (5150.0, 1.00, 0.12, 4.0, 0.0),
    "K3": (4800.0, 1.15, 0.08, 4.0, 0.03),
    "K5": (4400.0, 1.30, 0.05, 4.0, 0.10),
    "K7": (4050.0, 1.35, 0.03, 4.0, 0.22),
    "M0": (3850.0, 1.30, 0.00, 4.0, 0.40),
    "M1": (3680.0, 1.25, 0.00, 4.0, 0.52),
    "M2": (3550.0, 1.20, 0.00, 4.0, 0.64),
    "M3": (3400.0, 1.15, 0.00, 4.0, 0.76),
    "M4": (3200.0, 1.10, 0.00, 4.0, 0.88),
    "M5": (3050.0, 1.05, 0.00, 4.0, 1.00),
    "WD": (15000.0, 0.00, 0.55, 38.0, 0.0),
}

STAR_TYPES: Final[tuple[str, ...]] = tuple(_STARS)
"""Spectral types as SDSS writes them, the main sequence from hot to cool, then the white dwarf."""

# Center (vacuum Å), Gaussian width (Å) and depth in an old, solar-metallicity population. Centers and widths follow
# the Lick/IDS index bands (Worthey et al. 1994, Table 1), depths those of elliptical galaxies.
_METALS: Final[tuple[tuple[float, float, float], ...]] = (
    (2800.0, 18.0, 0.50),  # Mg II
    (2852.0, 8.0, 0.35),  # Mg I
    (3581.0, 9.0, 0.25),  # Fe I
    (3735.0, 14.0, 0.28),  # Fe I blend
    (3832.0, 8.0, 0.22),  # Mg I + Fe I
    (3866.0, 16.0, 0.28),  # CN violet band
    (ABSORPTION["Ca K"], 7.0, 0.55),
    (ABSORPTION["Ca H"], 7.0, 0.52),
    (4047.0, 4.0, 0.12),  # Fe I
    (4160.0, 20.0, 0.07),  # CN blue band
    (4227.9, 4.0, 0.22),  # Ca I
    (ABSORPTION["G band"], 11.0, 0.27),
    (4385.0, 6.0, 0.18),
    (4456.5, 5.0, 0.09),
    (4533.0, 9.0, 0.09),
    (4669.0, 15.0, 0.09),
    (4920.0, 5.0, 0.06),
    (5016.0, 10.0, 0.09),
    (5140.0, 34.0, 0.08),  # MgH
    (ABSORPTION["Mg b4"], 3.2, 0.15),
    (ABSORPTION["Mg b2"], 3.2, 0.19),
    (ABSORPTION["Mg b1"], 3.2, 0.19),
    (5271.0, 7.0, 0.12),
    (5337.0, 6.0, 0.10),
    (5408.0, 5.0, 0.06),
    (5711.0, 5.0, 0.03),
    (5784.0, 5.0, 0.03),
    (ABSORPTION["Na D2"], 2.2, 0.24),
    (ABSORPTION["Na D1"], 2.2, 0.20),
    (6497.0, 6.0, 0.04),  # Ba II + Fe I
    (8191.0, 7.0, 0.05),  # Na I
    (ABSORPTION["Ca II 8500"], 4.0, 0.20),
    (ABSORPTION["Ca II 8544"], 4.5, 0.32),
    (ABSORPTION["Ca II 8665"], 4.5, 0.28),
)

# Head (vacuum Å), length of the tail to the red (Å), depth in an M5 star (heads after Kirkpatrick et al. 1991).
_TITANIUM: Final[tuple[tuple[float, float, float], ...]] = (
    (4762.0, 60.0, 0.40),
    (4955.5, 70.0, 0.45),
    (5168.4, 80.0, 0.50),
    (5449.5, 80.0, 0.35),
    (5848.6, 90.0, 0.35),
    (6160.0, 110.0, 0.48),
    (6652.8, 120.0, 0.42),
    (7055.9, 130.0, 0.62),
    (7591.0, 150.0, 0.50),
    (8434.0, 160.0, 0.45),
)

# Absorption minimum, its width and depth, height of the emission to its red: a type Ia supernova at maximum light
# (lines and velocities after Filippenko 1997, §3). The last number is the offset of the emission in Å.
_SUPERNOVA: Final[tuple[tuple[float, float, float, float, float], ...]] = (
    (3750.0, 55.0, 0.62, 0.30, 150.0),  # Ca II H and K
    (4010.0, 28.0, 0.18, 0.06, 80.0),  # Si II 4130
    (4300.0, 60.0, 0.32, 0.14, 150.0),  # Mg II 4481 and Fe II
    (4830.0, 75.0, 0.40, 0.20, 200.0),  # Fe II
    (5300.0, 26.0, 0.20, 0.05, 60.0),  # S II
    (5460.0, 28.0, 0.24, 0.08, 80.0),  # S II
    (5760.0, 35.0, 0.10, 0.05, 100.0),  # Si II 5972
    (6140.0, 55.0, 0.52, 0.22, 170.0),  # Si II 6355
    (7500.0, 75.0, 0.22, 0.10, 180.0),  # O I 7773
    (8150.0, 100.0, 0.42, 0.25, 330.0),  # Ca II infrared triplet
)


@dataclass(frozen=True)
class Basis:
    """Templates on one grid.

    Arguments:
        grid: rest-frame grid, logarithmic.
        flux: the templates, 1 at 5500 Å.
        names: one name a template.
    """

    grid: WaveGrid
    flux: Float32[np.ndarray, "k pixels"] = field(repr=False)
    names: tuple[str, ...]

    def index(self, name: str) -> int:
        """Position of a template by name."""
        return self.names.index(name)

    @property
    def populations(self) -> slice:
        """Where the populations are: for each of `POPULATIONS`, each of `BROADENINGS`."""
        return slice(0, len(POPULATIONS) * len(BROADENINGS))

    @property
    def stars(self) -> slice:
        """Where the stars are, in the order of `STAR_TYPES`."""
        first = len(POPULATIONS) * len(BROADENINGS)
        return slice(first, first + len(STAR_TYPES))


def attenuation(wave: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    """Give the attenuation curve k(λ) = A(λ) / E(B-V) of starlight in galaxies.

    References:
        Calzetti et al. 2000, eq. 4, https://ui.adsabs.harvard.edu/abs/2000ApJ...533..682C

    Arguments:
        wave: rest wavelength, Å.
    """
    x = 1e4 / np.asarray(wave, dtype=np.float64)
    blue = 2.659 * (-2.156 + x * (1.509 + x * (-0.198 + 0.011 * x))) + 4.05
    red = 2.659 * (-1.857 + 1.040 * x) + 4.05
    return np.where(x > 1 / 0.63, blue, red)


@lru_cache(maxsize=4)
def basis(grid: WaveGrid) -> Basis:
    """Build all templates on a logarithmic rest-frame grid; the result is shared and must not be written to."""
    wave = grid.wave
    pixel = LIGHT_SPEED * np.log(10.0) * grid.step
    # A band, so that a weak line that happens to lie at the pivot does not set the scale.
    band = np.abs(wave - PIVOT) < 50.0
    names: list[str] = []
    rows: list[Float64[np.ndarray, "pixels"]] = []

    def add(name: str, flux: Float64[np.ndarray, "pixels"], sigma: float) -> None:
        smooth = gaussian_filter1d(flux, sigma / pixel, mode="nearest")
        names.append(name)
        rows.append(smooth / smooth[band].mean())

    for name, flux in zip(POPULATIONS, _populations(wave), strict=True):
        for sigma in BROADENINGS:
            add(f"{name} {sigma:g}", flux, sigma)
    for name, (teff, metal, depth, width, titanium) in _STARS.items():
        flux = _star(wave, teff, metal, depth, width, titanium)
        add(name, flux, INSTRUMENT_SIGMA)
    add("SN Ia", _supernova(wave), 300.0)
    # Pseudo-continua of quasars are zero at the pivot or nearly so; they are scaled to a peak of 1 instead.
    for name, flux in (("Fe II", _iron(wave)), ("Balmer continuum", _balmer_continuum(wave))):
        smooth = gaussian_filter1d(flux, 1500.0 / pixel, mode="nearest")
        names.append(name)
        rows.append(smooth / smooth.max())
    flux32 = np.asarray(rows, dtype=np.float32)
    flux32.setflags(write=False)
    return Basis(grid, flux32, tuple(names))


def _populations(wave: Float64[np.ndarray, "pixels"]) -> Iterable[Float64[np.ndarray, "pixels"]]:
    """Yield the spectra of `POPULATIONS` before broadening: giants and dwarfs, then hotter and hotter stars."""
    giants = 0.55 * _planck(wave, 4500.0) + 0.45 * _planck(wave, 5600.0)
    turnoff = 0.35 * _planck(wave, 4700.0) + 0.65 * _planck(wave, 6000.0)
    yield giants * _metals(wave, 1.0) * _balmer(wave, 0.10, 4.0) * _titanium(wave, 0.10)
    yield turnoff * _metals(wave, 0.65) * _balmer(wave, 0.17, 4.5) * _titanium(wave, 0.03)
    warm = 0.85 * _planck(wave, 9000.0) + 0.15 * _planck(wave, 5200.0)
    yield warm * _metals(wave, 0.15) * _balmer(wave, 0.58, 10.5) * _balmer_jump(wave, 0.50)
    hot = 0.90 * _planck(wave, 17000.0) + 0.10 * _planck(wave, 4500.0)
    yield hot * _metals(wave, 0.06) * _balmer(wave, 0.20, 7.0) * _balmer_jump(wave, 0.86)


def _star(
    wave: Float64[np.ndarray, "pixels"], teff: float, metal: float, depth: float, width: float, titanium: float
) -> Float64[np.ndarray, "pixels"]:
    flux = _planck(wave, teff) * _metals(wave, metal) * _balmer(wave, depth, width) * _titanium(wave, titanium)
    # The jump at the Balmer limit is a mark of A stars; a white dwarf's is smeared by its high pressure.
    return np.asarray(flux * _balmer_jump(wave, 0.45)) if width < 20 and depth > 0.6 else np.asarray(flux)


def _planck(wave: Float64[np.ndarray, "pixels"], teff: float) -> Float64[np.ndarray, "pixels"]:
    """Black body per unit wavelength, 1 at the pivot."""
    hc_k = 1.438777e8  # Å K
    shape = wave**-5 / np.expm1(hc_k / (wave * teff))
    return np.asarray(shape / (PIVOT**-5 / np.expm1(hc_k / (PIVOT * teff))))


def _metals(wave: Float64[np.ndarray, "pixels"], strength: float) -> Float64[np.ndarray, "pixels"]:
    """Transmission of the 4000 Å break, of the metal features and of the unresolved forest of weak lines."""
    depth = np.zeros_like(wave)
    for center, sigma, part in _METALS:
        depth += -np.log1p(-part) * np.exp(-0.5 * ((wave - center) / sigma) ** 2)
    # Below 4000 Å the lines overlap: the step that gives the break its name (D4000 about 1.9 in old galaxies).
    depth += 0.42 / (1.0 + np.exp(np.clip((wave - 3985.0) / 12.0, -50, 50)))
    depth += 0.55 * np.clip((4000.0 - wave) / 1000.0, 0.0, 3.0)
    # Weak lines at fixed, arbitrary places: what makes a real continuum uneven at every wavelength.
    places = np.random.default_rng(4000)
    centers = places.uniform(900.0, 10500.0, 1900)
    weights = places.exponential(0.035, 1900) * np.clip((4600.0 / centers) ** 2.5, 0.08, 2.5)
    step = np.log(wave[1] / wave[0])
    pixel = np.round(np.log(centers / wave[0]) / step).astype(np.int64)
    inside = (pixel >= 0) & (pixel < wave.size)
    forest = np.bincount(pixel[inside], weights=weights[inside], minlength=wave.size)
    sigma_pixels = 1.0e-4 * np.log(10.0) * 2.0 / step
    depth += gaussian_filter1d(forest, sigma_pixels, mode="nearest") * sigma_pixels * np.sqrt(2 * np.pi)
    return np.asarray(np.exp(-strength * depth))


def _balmer(wave: Float64[np.ndarray, "pixels"], depth: float, sigma: float) -> Float64[np.ndarray, "pixels"]:
    """Transmission of the Balmer lines; higher members are weaker and narrower."""
    absorbed = np.zeros_like(wave)
    for upper in range(3, 16):
        center = 3647.05 / (1.0 - 4.0 / upper**2)
        part = depth * (0.8 if upper == 3 else min(1.0, (8.0 / upper) ** 0.8))
        width = sigma * min(1.0, (7.0 / upper) ** 0.9)
        absorbed += part * np.exp(-0.5 * ((wave - center) / width) ** 2)
    return np.asarray(1.0 - np.minimum(absorbed, 0.95))


def _balmer_jump(wave: Float64[np.ndarray, "pixels"], below: float) -> Float64[np.ndarray, "pixels"]:
    return below + (1.0 - below) / (1.0 + np.exp(np.clip(-(wave - 3720.0) / 22.0, -50, 50)))


def _titanium(wave: Float64[np.ndarray, "pixels"], strength: float) -> Float64[np.ndarray, "pixels"]:
    """Transmission of the TiO bands: a sharp head on the blue side, a tail to the red."""
    flux = np.ones_like(wave)
    for head, tail, depth in _TITANIUM:
        inside = np.clip(wave - head, 0.0, None)
        flux *= 1.0 - strength * depth * np.where(wave > head, np.exp(-inside / tail), 0.0)
    return flux


def _supernova(wave: Float64[np.ndarray, "pixels"]) -> Float64[np.ndarray, "pixels"]:
    flux: Float64[np.ndarray, "pixels"] = _planck(wave, 11000.0) * np.exp(-np.clip((3700.0 - wave) / 500.0, 0.0, 6.0))
    for center, sigma, depth, height, offset in _SUPERNOVA:
        absorbed = depth * np.exp(-0.5 * ((wave - center) / sigma) ** 2)
        emitted = height * np.exp(-0.5 * ((wave - center - offset) / (1.3 * sigma)) ** 2)
        flux *= 1.0 - absorbed + emitted
    return flux


def _iron(wave: Float64[np.ndarray, "pixels"]) -> Float64[np.ndarray, "pixels"]:
    """Blends of Fe II in quasars, as bumps (places after Vestergaard & Wilkes 2001; Boroson & Green 1992)."""
    flux = np.zeros_like(wave)
    for center, sigma, height in (
        (2080.0, 60.0, 0.35),
        (2420.0, 70.0, 0.75),
        (2550.0, 55.0, 1.0),
        (2950.0, 60.0, 0.35),
        (4570.0, 60.0, 0.40),
        (5190.0, 45.0, 0.30),
        (5300.0, 50.0, 0.30),
    ):
        flux += height * np.exp(-0.5 * ((wave - center) / sigma) ** 2)
    return flux


def _balmer_continuum(wave: Float64[np.ndarray, "pixels"]) -> Float64[np.ndarray, "pixels"]:
    """Balmer continuum of an optically thin gas at 15,000 K (Grandi 1982, eq. 7, τ = 1 at the limit)."""
    limit = 3687.0  # the limit of 3646 Å, moved redward by the blend of the highest members
    return np.where(wave < limit, _planck(wave, 15000.0) * -np.expm1(-((wave / 3646.0) ** 3)), 0.0)
