"""The simulated survey's telescope: objects -> noiseless observed spectra, and the noise that belongs to them.

Works on any observed grid. All of a batch is rendered at once: the smooth part by one matrix product and a shift,
lines as Gaussians in windows of pixels around them.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from jaxtyping import Float32, Float64, Int64

from distspec.sources.simulation.populations import BROAD, NARROW, Objects
from distspec.sources.simulation.templates import INSTRUMENT_SIGMA, PIVOT, Basis, attenuation
from distspec.spectra import LIGHT_SPEED, WaveGrid
from distspec.spectra.lines.wavelengths import ABSORPTION, EMISSION

__all__ = [
    "DICHROIC",
    "OH_BANDS",
    "REFERENCE",
    "Optics",
    "levels",
    "optics",
    "reference_optics",
    "render",
    "sky_brightness",
    "sky_lines",
]

DICHROIC: Final = 6000.0
"""Where the blue and the red arm meet, Å observed (York et al. 2000: 5800-6150 Å)."""

REFERENCE: Final = 10 ** np.linspace(np.log10(3850.0), np.log10(9150.0), 256)
"""Wavelengths (Å observed) at which brightness and exposure are fixed, the same for every grid."""

_BRIGHTNESS_BAND: Final = (5600.0, 6900.0)  # about SDSS r

OH_BANDS: Final[tuple[tuple[float, float], ...]] = (
    (7235.0, 7450.0),
    (7705.0, 8075.0),
    (8270.0, 8565.0),
    (8750.0, 9060.0),
)
"""Bands of OH airglow that leave the strongest residuals, Å observed."""

# Air wavelength (Å) and peak over the sky's continuum (after Osterbrock et al. 1996, 1997; Hanuschik 2003).
_ATOMIC: Final = ((5577.34, 45.0), (5889.95, 4.0), (5895.92, 3.0), (6300.30, 14.0), (6363.78, 5.0))

_HYDROXYL: Final = (
    *((6863.9, 4.0), (6923.2, 4.0), (6949.0, 2.0), (6978.4, 1.5)),
    *((7276.4, 6.0), (7284.4, 2.5), (7303.7, 4.0), (7316.3, 6.5), (7329.1, 4.0), (7340.9, 8.0), (7358.7, 2.5)),
    *((7369.2, 5.0), (7392.2, 3.5), (7401.7, 3.0), (7438.0, 1.5)),
    *((7712.2, 2.0), (7724.7, 3.0), (7737.0, 1.5), (7750.6, 10.0), (7759.9, 2.0), (7780.4, 4.0), (7794.1, 10.0)),
    *((7808.5, 4.0), (7821.5, 9.0), (7841.3, 5.0), (7853.3, 5.0), (7868.6, 2.5), (7890.5, 2.0), (7913.7, 16.0)),
    *((7921.0, 5.0), (7949.2, 5.0), (7964.7, 15.0), (7993.3, 14.0), (8014.0, 3.5), (8025.7, 9.0), (8062.4, 3.5)),
    *((8281.0, 4.0), (8288.6, 5.0), (8298.4, 5.0), (8310.7, 3.0), (8344.6, 18.0), (8352.8, 5.0), (8382.4, 7.0)),
    *((8399.2, 20.0), (8415.2, 6.0), (8430.2, 20.0), (8452.2, 7.0), (8465.4, 10.0), (8493.4, 5.0), (8504.6, 5.0)),
    *((8548.7, 3.0), (8760.6, 8.0), (8767.9, 9.0), (8778.3, 9.0), (8790.9, 5.0), (8827.1, 24.0), (8836.0, 7.0)),
    *((8850.0, 8.0), (8867.6, 9.0), (8885.9, 26.0), (8903.1, 8.0), (8919.6, 26.0), (8943.4, 9.0), (8958.1, 16.0)),
    *((8988.4, 9.0), (9001.3, 7.0), (9038.1, 6.0), (9313.2, 8.0), (9337.9, 10.0), (9375.9, 16.0), (9419.7, 10.0)),
    *((9439.7, 18.0), (9476.8, 14.0), (9502.8, 9.0), (9552.5, 8.0), (9607.7, 5.0), (9700.2, 6.0), (9720.5, 6.0)),
    *((9771.0, 7.0), (9791.5, 12.0), (9872.2, 14.0), (9914.7, 12.0), (10015.0, 7.0), (10082.4, 9.0), (10123.7, 6.0)),
)


@dataclass(frozen=True)
class Optics:
    """What the telescope does at each pixel of a grid, for a standard exposure.

    Arguments:
        wave: pixel centres, Å observed.
        width: pixel widths, Å.
        position: where each pixel would lie on the basis grid at z = 0, in its pixels.
        reddening: A(λ) / E(B-V) of the Milky Way.
        sky: brightness of night sky and read noise, 1e-17 erg s⁻¹ cm⁻² Å⁻¹.
        efficiency: detected photons per unit of flux density, relative.
    """

    wave: Float64[np.ndarray, "pixels"]
    width: Float64[np.ndarray, "pixels"]
    position: Float64[np.ndarray, "pixels"]
    reddening: Float32[np.ndarray, "pixels"]
    sky: Float32[np.ndarray, "pixels"]
    efficiency: Float32[np.ndarray, "pixels"]


@lru_cache(maxsize=16)
def optics(grid: WaveGrid, rest: WaveGrid) -> Optics:
    """Compute what depends on the pixels only; shared, not to be written to."""
    return _optics_at(grid.wave, np.diff(grid.edges), rest)


@lru_cache(maxsize=4)
def reference_optics(rest: WaveGrid) -> Optics:
    """The same at the wavelengths `REFERENCE`, with the pixel width of an SDSS spectrum."""
    return _optics_at(REFERENCE, REFERENCE * np.log(10.0) * 1e-4, rest)


def _optics_at(wave: Float64[np.ndarray, "pixels"], width: Float64[np.ndarray, "pixels"], rest: WaveGrid) -> Optics:
    # Imported here: astropy takes a second, in every worker, and only who renders spectra needs it.
    from astropy import units
    from dust_extinction.parameter_averages import F99

    # The curve is per A(V); R_V = 3.1 turns it into one per E(B-V).
    reddening = 3.1 * np.asarray(F99(Rv=3.1)((1e4 / wave) / units.micron))
    blue, red = _arms(wave)
    efficiency = (blue + red) * wave * width
    return Optics(
        wave,
        width,
        rest.position(wave),
        reddening.astype(np.float32),
        sky_brightness(wave).astype(np.float32),
        efficiency.astype(np.float32),
    )


def _arms(wave: Float64[np.ndarray, "pixels"]) -> tuple[Float64[np.ndarray, "pixels"], Float64[np.ndarray, "pixels"]]:
    """Throughput of the two arms: each falls at its ends, they overlap around the dichroic (cf. Smee et al. 2013)."""

    def edge(center: float, scale: float) -> Float64[np.ndarray, "pixels"]:
        return np.asarray(1.0 / (1.0 + np.exp(np.clip(-(wave - center) / scale, -60, 60))))

    blue = 0.17 * edge(3950.0, 190.0) * edge(DICHROIC, -60.0)
    red = 0.22 * edge(DICHROIC, 60.0) * edge(9050.0, -330.0)
    return blue + 0.002, red + 0.002


def sky_lines(wave: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    """Airglow lines at the instrument's resolution, in units of the sky's continuum at 5500 Å."""
    total = np.zeros_like(wave)
    for center, height in (*_ATOMIC, *_HYDROXYL):
        vacuum = center * (1.0 + 2.735182e-4 + 131.4182 / center**2 + 2.76249e8 / center**4)  # Morton 1991
        sigma = vacuum * INSTRUMENT_SIGMA / LIGHT_SPEED
        total += height * np.exp(-0.5 * ((wave - vacuum) / sigma) ** 2)
    return total


def sky_brightness(wave: Float64[np.ndarray, "pixels"]) -> Float64[np.ndarray, "pixels"]:
    """Dark sky of 20.8 mag arcsec⁻² in a 3 arcsec fibre, and read noise written as an equal sky of constant counts."""
    level = 2.5
    continuum = level * (1.0 + 0.25 * (wave / PIVOT - 1.0))
    read_noise = 1.0 * (PIVOT / wave)
    return continuum + level * sky_lines(wave) + read_noise


def render(
    objects: Objects, ebv: Float64[np.ndarray, "n"], basis: Basis, at: Optics, grid: WaveGrid | None
) -> Float32[np.ndarray, "n pixels"]:
    """Give the noiseless, reddened spectra in relative units.

    Arguments:
        objects: what to render.
        ebv: Galactic E(B-V), mag.
        basis: the templates.
        at: the pixels.
        grid: their grid, which finds the pixels near a line; None leaves the lines out.
    """
    flux = _continuum(objects, basis, at)
    if grid is not None:
        shift = objects.split / 2
        # Unequal peaks, as two components seldom have the same mass and dust.
        share = np.where(objects.split > 0, 0.55, 1.0)
        waves = np.array([EMISSION[name] for name in NARROW])
        _add_lines(flux, grid, objects.z, waves, share[:, None] * objects.narrow, objects.narrow_sigma, -shift)
        twin = np.flatnonzero(objects.split > 0)
        if twin.size:
            second = flux[twin]
            strength = 0.45 * objects.narrow[twin]
            _add_lines(second, grid, objects.z[twin], waves, strength, objects.narrow_sigma[twin], shift[twin])
            flux[twin] = second
        wide = np.flatnonzero(objects.broad.any(axis=1))
        if wide.size:
            broad = flux[wide]
            waves = np.array([EMISSION[name] for name in BROAD])
            velocity = np.zeros(wide.size)
            _add_lines(broad, grid, objects.z[wide], waves, objects.broad[wide], objects.broad_sigma[wide], velocity)
            flux[wide] = broad
        _absorb_sodium(flux, objects, at)
    flux *= np.exp((-0.4 * np.log(10.0) * ebv).astype(np.float32)[:, None] * at.reddening)
    return flux


def levels(flux: Float32[np.ndarray, "n pixels"]) -> Float64[np.ndarray, "n"]:
    """Mean of spectra given at `REFERENCE` in the band that brightness is stated in."""
    band = (_BRIGHTNESS_BAND[0] < REFERENCE) & (_BRIGHTNESS_BAND[1] > REFERENCE)
    return np.asarray(flux[:, band].mean(axis=1, dtype=np.float64))


def _continuum(objects: Objects, basis: Basis, at: Optics) -> Float32[np.ndarray, "n pixels"]:
    """Mix the templates, shift them to the observed frame, dim them by their own dust and add the power laws."""
    rest = objects.weights @ basis.flux
    # On a logarithmic grid a redshift is a shift, the same for all pixels of a spectrum.
    place = at.position[None, :] - (np.log10(1.0 + objects.z) / basis.grid.step)[:, None]
    left = place.astype(np.int32)
    part = (place - left).astype(np.float32)
    flat = left + (np.arange(len(objects), dtype=np.int32) * basis.grid.pixels)[:, None]
    first = np.take(rest.ravel(), flat)
    flux = np.take(rest.ravel(), flat + 1)
    flux -= first
    flux *= part
    flux += first
    bright = np.flatnonzero(objects.power > 0)
    if bright.size:
        wave = (at.wave[None, :] / (1.0 + objects.z[bright])[:, None]).astype(np.float32)
        law = np.exp(objects.slope[bright].astype(np.float32)[:, None] * np.log(wave / np.float32(PIVOT)))
        light = flux[bright] + objects.power[bright].astype(np.float32)[:, None] * law
        # Mean absorption by intergalactic hydrogen below Ly alpha (Faucher-Giguere et al. 2008, eq. 5).
        depth = np.where(wave < EMISSION["Ly alpha"], 0.0018 * (at.wave / EMISSION["Ly alpha"]) ** 3.92, 0.0)
        flux[bright] = light * np.exp(-depth).astype(np.float32)
    dusty = np.flatnonzero(objects.dust > 0)
    if dusty.size:
        curve = attenuation(basis.grid.wave).astype(np.float32)
        dimming = np.take(curve, left[dusty])
        dimming *= (-0.4 * np.log(10.0) * objects.dust[dusty]).astype(np.float32)[:, None]
        flux[dusty] *= np.exp(dimming, out=dimming)
    return flux


def _add_lines(
    flux: Float32[np.ndarray, "n pixels"],
    grid: WaveGrid,
    z: Float64[np.ndarray, "n"],
    waves: Float64[np.ndarray, "lines"],
    strength: Float64[np.ndarray, "n lines"],
    sigma: Float64[np.ndarray, "n"],
    velocity: Float64[np.ndarray, "n"],
) -> None:
    """Add Gaussian lines in place, each in its own window of pixels.

    Strengths are rest-frame fluxes in Å times the continuum unit: the peak keeps its ratio to the continuum, and the
    width in Å grows by 1 + z, as equivalent widths do.
    """
    row, line = np.nonzero(strength)
    rest_center = waves[line] * (1.0 + velocity[row] / LIGHT_SPEED)
    center = rest_center * (1.0 + z[row])
    seen = (center > grid.wave[0] * 0.9) & (center < grid.wave[-1] * 1.1)
    row, line, rest_center, center = row[seen], line[seen], rest_center[seen], center[seen]
    if not row.size:
        return
    middle = np.rint(grid.position(center)).astype(np.int64)
    pixel = grid.edges[1:] - grid.edges[:-1]
    width = pixel[np.clip(middle, 0, grid.pixels - 1)]
    # A pixel averages over its width; for lines this wide that only adds a box's variance to the Gaussian's.
    total = np.sqrt((center / LIGHT_SPEED) ** 2 * (sigma[row] ** 2 + INSTRUMENT_SIGMA**2) + width**2 / 12.0)
    peak = strength[row, line] * (1.0 + z[row]) / (np.sqrt(2.0 * np.pi) * total)
    half = int(np.ceil((4.5 * total / width).max()))
    index = middle[:, None] + np.arange(-half, half + 1)
    inside = (index >= 0) & (index < grid.pixels)
    index = np.clip(index, 0, grid.pixels - 1)
    offset = ((grid.wave[index] - center[:, None]) / total[:, None]).astype(np.float32)
    values = peak.astype(np.float32)[:, None] * np.exp(np.float32(-0.5) * offset * offset)
    values[~inside] = 0.0
    np.add.at(flux.reshape(-1), (index + (row * grid.pixels)[:, None]).ravel(), values.ravel())


def _absorb_sodium(flux: Float32[np.ndarray, "n pixels"], objects: Objects, at: Optics) -> None:
    """Multiply the Na D doublet of an outflow into the few spectra that have one, in place."""
    rows: Int64[np.ndarray, "m"] = np.flatnonzero(objects.sodium[:, 0] > 0)
    for name in ("Na D2", "Na D1"):
        depth, velocity, sigma = objects.sodium[rows].T[:, :, None]
        center = ABSORPTION[name] * (1.0 + velocity / LIGHT_SPEED) * (1.0 + objects.z[rows])[:, None]
        width = center * np.hypot(sigma, INSTRUMENT_SIGMA) / LIGHT_SPEED
        flux[rows] *= (1.0 - depth * np.exp(-0.5 * ((at.wave - center) / width) ** 2)).astype(np.float32)
