"""Observed spectra -> comparable spectra: sky, pixel noise, dust, rest frame, rebinning, scale, noise floor, cuts.

`Recipe` runs the steps in this order on whole batches; each step is also a pure function. A spectrum that a step cannot
treat keeps its row: its pixels are masked and `status` says why. Wavelengths are vacuum Å throughout, as `WaveGrid`
promises; nothing here guesses air or vacuum, and no position ever gets E(B-V) = 0 for want of a value.
"""

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, Int32

from distspec.config import AtWavelength, Cuts, Distance, DustColumn, DustMap, Mean, Median, NoDust, NoScale, Prepare
from distspec.errors import ConfigError, extra
from distspec.prepare.rebin import BLOCK, rebin
from distspec.spectra import Columns, Spectra, Status, WaveGrid
from distspec.statistics.summaries import row_mean, row_median

__all__ = ["Recipe", "clean", "deredden", "extinction_curve", "luminosity_distance", "normalizer", "scaled"]

Z_MAX = 20.0
"""A larger redshift is no measurement; nothing farther than about 15 has a spectrum."""

CORRECTION_MAX = 1e15
"""Largest dereddening factor that is still applied; its square still fits the float32 inverse variance."""

FLOAT32 = np.finfo(np.float32)

# Annotations below: one value for each pixel of each spectrum, one value for each spectrum.
Normalize = Median | Mean | AtWavelength | Distance | NoScale

Windows = tuple[tuple[float, float], ...]

Pixels = Float[np.ndarray, "n pixels"]

Pixels32 = Float32[np.ndarray, "n pixels"]

PixelPair = tuple[Pixels, Pixels]

Bins = Float[np.ndarray, "n bins"]

Bins32 = Float32[np.ndarray, "n bins"]

Values = Float[np.ndarray, "n"]

Bits = Int32[np.ndarray, "n"]


def clean(flux: Pixels, ivar: Pixels) -> PixelPair:
    """Copy to float64 so that each pixel has finite flux and finite ivar > 0, or is masked: both are 0.

    Flux behind the mask is 0 rather than anything, so that a later product needs no second look at the mask.
    """
    bad = ~(np.isfinite(flux) & np.isfinite(ivar) & (ivar > 0))
    flux, ivar = flux.astype(np.float64), ivar.astype(np.float64)
    flux[bad] = 0.0
    ivar[bad] = 0.0
    return flux, ivar


def sky_mask(flux: Pixels, ivar: Pixels, grid: WaveGrid, windows: Windows) -> PixelPair:
    """Mask each pixel that overlaps one of the windows (Å vacuum, observed frame), also by a part of its width."""
    flux, ivar = flux.copy(), ivar.copy()
    for low, high in windows:
        hidden = (grid.edges[1:] > low) & (grid.edges[:-1] < high)
        flux[:, hidden] = 0.0
        ivar[:, hidden] = 0.0
    return flux, ivar


def sky_patch(flux: Pixels, ivar: Pixels, grid: WaveGrid, windows: Windows) -> PixelPair:
    """Write the mean of the two neighboring windows over each window's flux.

    With m pixels whose centers lie strictly inside the window, patched pixel i becomes the mean of the pixels m to its
    left and m to its right. The public code starts the right neighbor on the window's last pixel, one too early.
    A strong line in a neighbor is copied into the window at half height; `sky_mask` does not do that.

    The inverse variance stays that of the pixel that was replaced, as in the paper: an invented value then weighs no
    more than the poor measurement under the sky line, where the neighbors' variances propagated would give the window
    the smallest errors of all. A masked neighbor is left out; a pixel that was masked, or has no good neighbor, ends
    masked.

    References:
        Ortiz & Boquien 2025, and their public preprocessing code.
    """
    flux, ivar = flux.copy(), ivar.copy()
    for low, high in windows:
        inside = np.flatnonzero((grid.wave > low) & (grid.wave < high))
        weight = np.zeros((len(flux), len(inside)))
        patch = np.zeros_like(weight)
        for neighbor in (inside - len(inside), inside + len(inside)):
            on_grid = (neighbor >= 0) & (neighbor < grid.pixels)
            index = np.where(on_grid, neighbor, 0)
            good = on_grid & (ivar[:, index] > 0)
            weight += good
            patch += np.where(good, flux[:, index], 0.0)
        usable = (weight > 0) & (ivar[:, inside] > 0)
        flux[:, inside] = np.where(usable, patch / np.maximum(weight, 1.0), 0.0)
        ivar[:, inside] *= usable
    return flux, ivar


def extinction_curve(dust: DustColumn | DustMap, grid: WaveGrid) -> Float64[np.ndarray, "pixels"]:
    """Evaluate A(λ) / E(B-V) = R_V A(λ) / A(V) on the centers of an observed-frame grid.

    References:
        Fitzpatrick 1999 (F99), Cardelli, Clayton & Mathis 1989 (CCM89), O'Donnell 1994 (O94) and Gordon et al. 2023
        (G23), all by the `dust_extinction` package.

    Raises:
        ConfigError: the grid or R_V leaves the range in which the law is defined.
    """
    # Imported here, as astropy and dustmaps below: they cost a second that a recipe without dust should not pay.
    import astropy.units as u
    from dust_extinction import parameter_averages

    law = getattr(parameter_averages, dust.law)
    low, high = law.Rv_range
    if not low <= dust.r_v <= high:
        raise ConfigError(
            f"r_v = {dust.r_v:g}; {dust.law} is defined for {low:g}-{high:g}: choose another value or law"
        )
    shortest, longest = 1e4 / law.x_range[1], 1e4 / law.x_range[0]
    if grid.wave[0] < shortest or grid.wave[-1] > longest:
        reach = f"the law {dust.law} is defined for {shortest:.0f}-{longest:.0f} Å"
        raise ConfigError(f"the survey has {grid.wave[0]:.0f}-{grid.wave[-1]:.0f} Å; {reach}: choose another law")
    return np.asarray(dust.r_v * law(Rv=dust.r_v)(grid.wave * u.AA), dtype=np.float64)


def deredden(flux: Pixels, ivar: Pixels, ebv: Values, curve: Float64[np.ndarray, "pixels"]) -> PixelPair:
    """Undo Galactic extinction in the observed frame: f · 10^(0.4 E(B-V) k(λ)), and ivar by that factor's square.

    k is the `extinction_curve`. A spectrum without a finite E(B-V) (magnitudes) comes back masked, never uncorrected.
    """
    known = np.isfinite(ebv)
    exponent = np.where(known, ebv, 0.0).astype(np.float64) * (0.4 * np.log(10.0))
    factor = np.exp(exponent[:, None] * curve)
    return flux * factor * known[:, None], ivar / (factor * factor) * known[:, None]


def _open_map(folder: str) -> Callable[[Any], Any]:
    """Open the SFD map in `folder`, or in the `sfd` folder inside it, as `dustmaps` lays it out."""
    places = [Path(folder), Path(folder) / "sfd"]
    names = [f"SFD_dust_4096_{pole}.fits" for pole in ("ngp", "sgp")]
    found = [place for place in places if all((place / name).is_file() for name in names)]
    if not found:
        fetch = f"from dustmaps import config, sfd; config.config['data_dir'] = {folder!r}; sfd.fetch()"
        raise ConfigError(f'no {names[0]} and {names[1]} in {folder!r}; download them: python -c "{fetch}"')
    with warnings.catch_warnings():
        # dustmaps warns on import that it has no settings file of its own; none is needed, the folder is named here.
        warnings.simplefilter("ignore")
        with extra("dustmaps"):
            from dustmaps.sfd import SFDQuery
    try:
        query: Callable[[Any], Any] = SFDQuery(map_dir=str(found[0]))
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"the SFD dust map in {found[0]} cannot be read ({error}); download it again") from None
    return query


def _map_ebv(query: Callable[[Any], Any], ra: Values, dec: Values) -> Values:
    """Look E(B-V) up at ICRS positions in degrees; NaN where there is no such place on the sky."""
    from astropy.coordinates import SkyCoord

    ebv = np.full(len(ra), np.nan)
    known = (ra >= 0) & (ra <= 360) & (np.abs(dec) <= 90)
    if known.any():
        ebv[known] = query(SkyCoord(ra[known], dec[known], unit="deg", frame="icrs"))
    return ebv


def flux_at(flux: Pixels, ivar: Pixels, grid: WaveGrid, wave: float, width: float) -> Values:
    """Median over the good pixels with |λ - wave| <= width / 2 (Å, in the grid's frame); NaN where there is none.

    A median, since one bad pixel in a mean would rescale the whole spectrum.
    """
    window = np.abs(grid.wave - wave) <= width / 2
    return row_median(flux[:, window], ivar[:, window] > 0)


def luminosity_distance(redshift: Values) -> Values:
    """Luminosity distance in Mpc in the Planck 2018 cosmology; NaN where z <= 0 or above `Z_MAX`.

    A cubic spline of astropy's values in ln(1 + z), to 2e-8 of the direct call, which integrates for each spectrum.

    References:
        Planck Collaboration 2020, table 2, last column, https://arxiv.org/abs/1807.06209.
    """
    known = (redshift > 0) & (redshift <= Z_MAX)
    z = np.where(known, redshift, 1.0)
    return np.where(known, (1.0 + z) * _comoving_distance()(np.log1p(z)), np.nan)


@cache
def _comoving_distance() -> Callable[[Values], Values]:
    from astropy.cosmology import Planck18
    from scipy.interpolate import CubicSpline

    nodes = np.linspace(0.0, np.log1p(Z_MAX), 1025)
    spline: Callable[[Any], Any] = CubicSpline(nodes, Planck18.comoving_transverse_distance(np.expm1(nodes)).value)
    return spline


def normalizer(settings: Normalize, flux: Pixels, ivar: Pixels, grid: WaveGrid, z: Values) -> Values:
    """Give what each spectrum is to be divided by; NaN or not positive where there is no such thing.

    Arguments:
        settings: how spectra are made comparable, `Prepare.normalize`.
        flux: spectra on the recipe's grid, finite where ivar > 0.
        ivar: inverse variance, 0 where masked.
        grid: that grid.
        z: redshifts, which only `Distance` looks at.
    """
    match settings:
        case Median():
            return row_median(flux, ivar > 0)
        case Mean():
            return row_mean(flux, ivar > 0)
        case AtWavelength(wave=wave, width=width):
            return flux_at(flux, ivar, grid, wave, width)
        case Distance(redshift=reference):
            # Prepared flux is f (D_L(z) / D_L(z0))², Böhm, Kim & Juneau 2023, section 2.
            ratio = luminosity_distance(np.array([reference])) / luminosity_distance(z)
            return np.asarray(np.minimum(ratio, 1e30) ** 2)  # the limit keeps a z of 1e-200 from overflowing
        case NoScale():
            return np.ones(len(flux))


def rescale(flux: Pixels, ivar: Pixels, norm: Values) -> PixelPair:
    """Divide each spectrum by its norm, and multiply its ivar by the square; masked where the norm is NaN."""
    known = np.isfinite(norm)
    divisor = np.where(known, norm, 1.0)[:, None]
    return flux / divisor * known[:, None], ivar * (divisor * divisor) * known[:, None]


def noise_floor(flux: Pixels, ivar: Pixels, max_pixel_snr: float) -> Pixels:
    """Raise the errors, σ <- max(σ, |f| / max_pixel_snr) (Böhm, Kim & Juneau 2023: 50), and give the new ivar."""
    floored = ivar.copy()
    square, limit = flux * flux, max_pixel_snr * max_pixel_snr
    np.divide(limit, square, out=floored, where=square * ivar > limit)
    return floored


def snr_mask(flux: Pixels, ivar: Pixels, min_pixel_snr: float) -> PixelPair:
    """Mask each pixel whose flux is below `min_pixel_snr` σ; with a limit above 0 no negative flux survives.

    It takes noise that is too low and keeps noise that is too high, so it lifts faint continua: a step of one paper,
    off elsewhere.

    References:
        Ortiz & Boquien 2025, public code, `interpolate.py`: σ > flux, that is 1.
    """
    good = (ivar > 0) & (flux * np.sqrt(ivar) >= min_pixel_snr)
    return np.where(good, flux, 0.0), np.where(good, ivar, 0.0)


def span(ivar: Pixels32) -> Float32[np.ndarray, "n"]:
    """Give the share of the grid between the first and the last good pixel, both included; 0 without a good pixel."""
    good = ivar > 0
    length = good.shape[1] - good[:, ::-1].argmax(axis=1) - good.argmax(axis=1)
    return np.where(good.any(axis=1), length / good.shape[1], 0.0).astype(np.float32)


def signal_to_noise(flux: Pixels32, ivar: Pixels32) -> tuple[Float32[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
    """Give the median of f / σ over the good pixels, and the cumulative sqrt(Σ (f / σ)²); 0 without a good pixel."""
    # Limited because a product of large float32 values can overflow; float32 because a sort takes half the time there.
    ratio = np.clip(np.where(ivar > 0, flux, 0.0) * np.sqrt(ivar, dtype=np.float64), FLOAT32.min, FLOAT32.max)
    median, total = row_median(ratio.astype(np.float32), ivar > 0), np.sqrt((ratio * ratio).sum(axis=1))
    return np.nan_to_num(median).astype(np.float32), np.minimum(total, FLOAT32.max).astype(np.float32)


def _to_float32(flux: Pixels, ivar: Pixels) -> tuple[Pixels32, Pixels32]:
    """Round to storage precision; a pixel that float32 cannot hold is masked instead of infinite."""
    good = (np.abs(flux) <= FLOAT32.max) & (ivar <= FLOAT32.max) & (ivar >= FLOAT32.tiny)
    return np.where(good, flux, 0.0).astype(np.float32), np.where(good, ivar, 0.0).astype(np.float32)


def scaled(flux: Pixels, ivar: Pixels, norm: Values, max_pixel_snr: float | None) -> tuple[Pixels32, Pixels32]:
    """Take the last steps of every recipe: divide by the norm, apply the noise floor if any, round to float32."""
    flux, ivar = rescale(flux, ivar, norm)
    if max_pixel_snr is not None:
        ivar = noise_floor(flux, ivar, max_pixel_snr)
    return _to_float32(flux, ivar)


def cut(columns: Columns, cuts: Cuts) -> Bits:
    """Give the bits of `Status` for the quality limits that each spectrum fails; a value equal to a limit passes.

    Only what was measured is judged: a spectrum whose `status` already leaves it without pixels gets no bit for its
    coverage and signal-to-noise ratio, nor one without a redshift for its range. A spectrum without any good pixel on
    the grid is LOW_COVERAGE whatever the limit.

    Reads the columns `z`, `zwarn`, `class`, `status`, `snr`, `total_snr`, `coverage` and `span`.
    """
    z, coverage, status = columns["z"], columns["coverage"], columns["status"]
    low = -np.inf if cuts.z_min is None else cuts.z_min
    high = np.inf if cuts.z_max is None else cuts.z_max
    measured = (status & int(Status.UNUSABLE)) == 0
    faint = (columns["snr"] < cuts.snr_min) | (columns["total_snr"] < cuts.total_snr_min)
    bits = np.zeros(len(z), dtype=np.int32)
    bits[((z < low) | (z > high)) & (status & int(Status.NO_REDSHIFT) == 0)] |= int(Status.REDSHIFT_RANGE)
    bits[(columns["zwarn"] != 0) & cuts.zwarn] |= int(Status.REDSHIFT_WARNING)
    bits[measured & ((coverage <= 0) | (coverage < cuts.coverage_min))] |= int(Status.LOW_COVERAGE)
    bits[measured & (coverage > 0) & faint] |= int(Status.LOW_SNR)
    bits[measured & (coverage > 0) & (columns["span"] < cuts.span_min)] |= int(Status.SPAN)
    if cuts.classes:
        wanted = [name.strip().upper() for name in cuts.classes]
        found = np.strings.upper(np.strings.strip(columns["class"].astype(str)))
        bits[~np.isin(found, wanted) & (status & int(Status.UNREADABLE) == 0)] |= int(Status.CLASS)
    return bits


class Recipe:
    """The steps of `Prepare` for one survey grid, with all that does not depend on a spectrum computed once.

    Arguments:
        settings: the recipe.
        source_grid: observed-frame grid of the spectra that will be given; `grid` is the store's.

    Raises:
        ConfigError: the settings contradict each other or the grid, or the dust map is missing.

    Attributes:
        COLUMNS: names of the columns that are added to those of the source.

    Example:
        >>> Recipe(Prepare(), WaveGrid("log", 3600.0, 1e-4, 4500))
        Recipe(WaveGrid(log, 3600.0-10143.8 Å, 4500 pixels) -> rest WaveGrid(log, 3388.0-8318.0 Å, 1000 pixels))
    """

    COLUMNS = ("snr", "total_snr", "coverage", "span", "norm")

    def __init__(self, settings: Prepare, source_grid: WaveGrid) -> None:
        self.settings = settings
        self.source_grid = source_grid
        self.grid = WaveGrid.between(settings.grid.scale, settings.grid.first, settings.grid.last, settings.grid.pixels)
        self._check()
        dust = settings.dust
        self._curve = None if isinstance(dust, NoDust) else extinction_curve(dust, source_grid)
        self._map = _open_map(dust.path) if isinstance(dust, DustMap) else None
        # In the observed frame a spectrum without a redshift is as good as any, unless something else asks for z.
        self._placed = settings.frame == "rest" or isinstance(settings.normalize, Distance)
        self._needs_redshift = self._placed or (settings.cuts.z_min, settings.cuts.z_max) != (None, None)

    def _check(self) -> None:
        settings, grid, source = self.settings, self.grid, self.source_grid
        if any(low >= high for low, high in settings.sky.windows):
            raise ConfigError(f"prepare.sky.windows has {settings.sky.windows}; expected the lower limits first")
        if settings.flux_factor and settings.frame == "observed":
            raise ConfigError("prepare.flux_factor belongs to the rest frame; unset it, or set prepare.frame = 'rest'")
        if settings.frame == "observed" and (grid.edges[-1] <= source.edges[0] or grid.edges[0] >= source.edges[-1]):
            raise ConfigError(f"prepare.grid is {grid}; it does not overlap the survey's {source}")
        at = settings.normalize
        if isinstance(at, Distance) and at.redshift > Z_MAX:
            raise ConfigError(f"prepare.normalize.redshift = {at.redshift:g}; expected at most {Z_MAX:g}")
        if isinstance(at, AtWavelength) and not (np.abs(grid.wave - at.wave) <= at.width / 2).any():
            raise ConfigError(f"no pixel within {at.width:g} Å around {at.wave:g} Å for prepare.normalize on {grid}")

    def __call__(self, spectra: Spectra, columns: Columns) -> tuple[Spectra, Columns]:
        """Prepare a batch; every spectrum keeps its place in it.

        Arguments:
            spectra: observed-frame spectra on the source grid.
            columns: what a source delivers with them (see `distspec.sources.Source.read`).

        Returns:
            The spectra on `grid`, and the columns with `status` brought up to date and those of `COLUMNS`: `snr`
            (median of f/σ per good pixel), `total_snr` (sqrt(Σ (f/σ)²)), `coverage` (share of good pixels), `span`
            (share of the grid between the first and the last one; all float32), and `norm` (float64): prepared flux
            times `norm` is the flux in survey units, corrected for extinction where the recipe says so. A spectrum
            that a step cannot treat is masked as a whole, has 0 in the first four and NaN in `norm`; one that only
            fails a cut keeps its prepared flux, to be looked at.

        Raises:
            ValueError: the spectra are on another grid, or were prepared before.
        """
        if spectra.grid != self.source_grid:
            raise ValueError(f"spectra on {spectra.grid}; this recipe was made for {self.source_grid}")
        if "norm" in columns:
            raise ValueError("these spectra have a column 'norm': they were prepared before; expected observed spectra")
        status = columns["status"].astype(np.int32)
        z = self._redshift(columns, status)
        ebv = self._reddening(columns, status)
        n = len(spectra)
        flux, ivar = np.empty((2, n, self.grid.pixels), dtype=np.float32)
        (snr, total), norm = np.empty((2, n), dtype=np.float32), np.empty(n)
        for start in range(0, n, BLOCK):
            rows = slice(start, start + BLOCK)
            flux[rows], ivar[rows], norm[rows] = self._block(
                *clean(spectra.flux[rows], spectra.ivar[rows]), z[rows], ebv[rows], status[rows]
            )
            snr[rows], total[rows] = signal_to_noise(flux[rows], ivar[rows])
        coverage = (ivar > 0).mean(axis=1).astype(np.float32)
        norm[coverage == 0] = np.nan
        added = dict(zip(self.COLUMNS, (snr, total, coverage, span(ivar), norm), strict=True))
        prepared: Columns = {**columns, "status": status, **added}
        status |= cut(prepared, self.settings.cuts)
        redshift = z if self.settings.frame == "observed" else None
        return Spectra(spectra.rows, flux, ivar, self.grid, redshift), prepared

    def _redshift(self, columns: Columns, status: Bits) -> Values:
        """Give each usable redshift, else NaN, and settle NO_REDSHIFT in `status`."""
        missing = int(Status.NO_REDSHIFT)
        z = np.asarray(columns["z"], dtype=np.float64)
        known = np.isfinite(z) & (z > -1) & (z <= Z_MAX) & (status & missing == 0)
        status &= ~missing
        if self._needs_redshift:
            status[~known] |= missing
        return np.where(known, z, np.nan)

    def _reddening(self, columns: Columns, status: Bits) -> Values:
        """Give E(B-V) where the recipe corrects for it and a sensible value is known, else NaN with NO_EXTINCTION."""
        if self._curve is None or isinstance(self.settings.dust, NoDust):
            return np.zeros(len(status))
        if self._map is None:
            ebv = np.asarray(columns["ebv"], dtype=np.float64)
        else:
            ebv = _map_ebv(self._map, np.asarray(columns["ra"], np.float64), np.asarray(columns["dec"], np.float64))
        ebv = ebv * self.settings.dust.scale
        limit = np.log10(CORRECTION_MAX) / (0.4 * self._curve.max())
        known = (ebv >= 0) & (ebv <= limit)
        status[~known] |= int(Status.NO_EXTINCTION)
        return np.where(known, ebv, np.nan)

    def _block(self, flux: Pixels, ivar: Pixels, z: Values, ebv: Values, status: Bits) -> tuple[Bins32, Bins32, Values]:
        """Take a few clean spectra through the steps; gives flux, ivar and norm, and adds to `status` in place."""
        settings = self.settings
        dead = ~(ivar > 0).any(axis=1) & (status & int(Status.UNREADABLE) == 0)
        status[dead] |= int(Status.DEAD)
        if settings.sky.mode != "none":
            treat = sky_mask if settings.sky.mode == "mask" else sky_patch
            flux, ivar = treat(flux, ivar, self.source_grid, settings.sky.windows)
        if settings.min_pixel_snr is not None:
            flux, ivar = snr_mask(flux, ivar, settings.min_pixel_snr)
        if self._curve is not None:
            flux, ivar = deredden(flux, ivar, ebv, self._curve)
        shift = z if settings.frame == "rest" else np.zeros(len(z))
        flux, ivar = rebin(flux, ivar, self.source_grid, self.grid, shift, settings.rebin)
        norm, wanted = normalizer(settings.normalize, flux, ivar, self.grid, z), (ivar > 0).any(axis=1)
        if self._placed:
            wanted &= np.isfinite(z)
        norm = np.where(wanted & (norm > FLOAT32.tiny) & (norm <= FLOAT32.max), norm, np.nan)
        status[wanted & np.isnan(norm)] |= int(Status.NO_SCALE)
        if settings.flux_factor:
            norm = norm / (1.0 + np.where(wanted, z, 0.0))
        return *scaled(flux, ivar, norm, settings.max_pixel_snr), norm

    def __repr__(self) -> str:
        return f"Recipe({self.source_grid} -> {self.settings.frame} {self.grid})"
