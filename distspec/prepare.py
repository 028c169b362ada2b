"""Observed spectra -> comparable spectra: sky windows, dust, rest frame, rebinning, normalization, noise floor, cuts.

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
from jaxtyping import Float, Float32, Float64, Int32, Shaped

from distspec.config import AtWavelength, Cuts, Distance, DustColumn, DustMap, Mean, Median, NoDust, NoScale, Prepare
from distspec.errors import ConfigError
from distspec.spectra import Columns, Spectra, Status, WaveGrid

__all__ = ["Recipe", "deredden", "extinction_curve", "luminosity_distance", "rebin"]

BLOCK = 32
"""Spectra treated at once: their temporaries then stay in a core's cache."""

Z_MAX = 20.0
"""A larger redshift is no measurement; nothing farther than about 15 has a spectrum."""

CORRECTION_MAX = 1e15
"""Largest dereddening factor that is still applied; its square still fits the float32 inverse variance."""

FLOAT32 = np.finfo(np.float32)

# Annotations below: one value for each pixel of each spectrum, one value for each spectrum.
Windows = tuple[tuple[float, float], ...]
Pixels = Float[np.ndarray, "n pixels"]
Pixels32 = Float32[np.ndarray, "n pixels"]
PixelPair = tuple[Pixels, Pixels]
Bins = Float[np.ndarray, "n bins"]
Bins32 = Float32[np.ndarray, "n bins"]
Edges = Shaped[np.ndarray, "n edges"]
Values = Float[np.ndarray, "n"]
Bits = Int32[np.ndarray, "n"]

# Without these a spectrum has no meaning on the store's grid, so its pixels are masked.
_UNUSABLE = int(Status.UNREADABLE | Status.DEAD | Status.NO_REDSHIFT | Status.NO_EXTINCTION | Status.NO_SCALE)


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


def rebin(flux: Pixels, ivar: Pixels, source: WaveGrid, target: WaveGrid, redshift: Values) -> tuple[Bins, Bins]:
    """Average each spectrum over the target's bins, placed at (1 + z) times their wavelengths.

    With w_ij the overlap in Å of source pixel i and target bin j, over good pixels only,

        f_j = Σ_i w_ij f_i / Σ_i w_ij        ivar_j = (Σ_i w_ij)² / Σ_i w_ij² σ_i²

    so Σ f Δλ is conserved. A bin is masked when good pixels cover less than half of it. Rebinned pixels that share a
    source pixel are correlated; the inverse variance is the diagonal only. No running sum over the spectrum is taken:
    its differences would spread the rounding of one bright pixel over all redder bins.

    References:
        Carnall 2017, SpectRes, eqs. 2-4, https://arxiv.org/abs/1705.05165.

    Arguments:
        flux: flux density on the source grid, finite where ivar > 0.
        ivar: inverse variance, 0 where masked.
        source: observed-frame grid of the input.
        target: grid of the result, in the frame that the redshift leads to.
        redshift: z for each spectrum, 0 to stay in the observed frame. Where it is not finite or not above -1, the
            row comes back masked.

    Returns:
        Flux density per observed Å and its inverse variance on the target grid; both 0 in a masked bin.
    """
    out_flux, out_ivar = np.empty((2, len(flux), target.pixels))
    for start in range(0, len(flux), BLOCK):
        rows = slice(start, start + BLOCK)
        out_flux[rows], out_ivar[rows] = _rebin_block(flux[rows], ivar[rows], source, target, redshift[rows])
    return out_flux, out_ivar


def _rebin_block(flux: Pixels, ivar: Pixels, source: WaveGrid, target: WaveGrid, redshift: Values) -> tuple[Bins, Bins]:
    """Rebin a few rows.

    The edges of the bins fall into certain source pixels, which are shared out by fraction. All other pixels lie whole
    in one bin, so these are runs of neighbors in memory, which `np.add.reduceat` adds up in one call.
    """
    known = np.isfinite(redshift) & (redshift > -1)
    stretch = np.where(known, 1.0 + redshift, 1.0)[:, None]
    cell, fraction = _locate(source, target, stretch)
    same = cell[:, 1:] == cell[:, :-1]
    first = np.where(same, fraction[:, 1:], 1.0) - fraction[:, :-1]
    last = np.where(same, 0.0, fraction[:, 1:])
    index = (cell + np.arange(len(flux))[:, None] * source.pixels).ravel()

    def gather(values: Pixels, first: Bins, last: Bins) -> Bins:
        flat = values.ravel()
        shared = flat[index].reshape(cell.shape)
        flat[index] = 0.0
        whole: Edges = np.add.reduceat(flat, index).reshape(cell.shape)
        return np.asarray(whole[:, :-1] + first * shared[:, :-1] + last * shared[:, 1:])

    width, good = np.diff(source.edges), ivar > 0
    covered = gather(width * good, first, last)
    # Dividing by 1 where masked, times `good`, is faster than numpy's `where=`.
    variance = gather(width * width * good / np.where(good, ivar, 1.0), first * first, last * last)
    usable = (covered >= 0.5 * np.diff(target.edges) * stretch) & known[:, None]
    total = gather(width * np.where(good, flux, 0.0), first, last)
    rebinned = np.divide(total, covered, out=np.zeros_like(total), where=usable)
    return rebinned, np.divide(covered * covered, variance, out=np.zeros_like(total), where=usable)


def _locate(source: WaveGrid, target: WaveGrid, stretch: Float64[np.ndarray, "n 1"]) -> tuple[Edges, Edges]:
    """Find the source pixel that holds each edge of the stretched target bins, and the share of it bluer than the edge.

    Edges beyond the source end at its border, where the share is 0 or 1.
    """
    edges = target.edges * stretch
    if source.scale == "log":
        # The same as source.position(edges), with one logarithm for each spectrum instead of each edge.
        position = source.position(target.edges) + np.log10(stretch) / source.step
    else:
        position = source.position(edges)
    cell = np.clip(position + 0.5, 0, source.pixels - 1).astype(np.intp)
    fraction = (edges - source.edges[cell]) / np.diff(source.edges)[cell]
    # Where edges coincide, rounding leaves a share of about 1e-12, by which a saturated pixel would reach its neighbor.
    fraction[fraction < 1e-9] = 0.0
    fraction[fraction > 1.0 - 1e-9] = 1.0
    return cell, fraction


def median_flux(flux: Pixels, ivar: Pixels) -> Values:
    """Median over the good pixels of each spectrum; NaN where there is none."""
    # numpy's nanmedian loops over rows; a sort that puts the bad pixels last does not.
    good = ivar > 0
    ordered = np.sort(np.where(good, flux, flux.dtype.type(np.inf)), axis=1)
    count = good.sum(axis=1)
    middle = np.stack([np.maximum(count - 1, 0) // 2, np.minimum(count // 2, flux.shape[1] - 1)], axis=1)
    pair = np.take_along_axis(ordered, middle, axis=1).astype(np.float64)
    return np.where(count > 0, 0.5 * (pair[:, 0] + pair[:, 1]), np.nan)


def mean_flux(flux: Pixels, ivar: Pixels) -> Values:
    """Unweighted mean over the good pixels of each spectrum; NaN where there is none."""
    good = ivar > 0
    count = good.sum(axis=1)
    total = np.where(good, flux, 0.0).sum(axis=1, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def flux_at(flux: Pixels, ivar: Pixels, grid: WaveGrid, wave: float, width: float) -> Values:
    """Mean over the good pixels with |λ - wave| <= width / 2 (Å, in the grid's frame); NaN where there is none."""
    window = np.abs(grid.wave - wave) <= width / 2
    return mean_flux(flux[:, window], ivar[:, window])


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


def signal_to_noise(flux: Pixels32, ivar: Pixels32) -> tuple[Float32[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
    """Give the median of f / σ over the good pixels, and the cumulative sqrt(Σ (f / σ)²); 0 without a good pixel."""
    # Limited because a product of large float32 values can overflow; float32 because a sort takes half the time there.
    ratio = np.clip(np.where(ivar > 0, flux, 0.0) * np.sqrt(ivar, dtype=np.float64), FLOAT32.min, FLOAT32.max)
    median, total = median_flux(ratio.astype(np.float32), ivar), np.sqrt((ratio * ratio).sum(axis=1))
    return np.nan_to_num(median).astype(np.float32), np.minimum(total, FLOAT32.max).astype(np.float32)


def _to_float32(flux: Pixels, ivar: Pixels) -> tuple[Pixels32, Pixels32]:
    """Round to storage precision; a pixel that float32 cannot hold is masked instead of infinite."""
    good = (np.abs(flux) <= FLOAT32.max) & (ivar <= FLOAT32.max) & (ivar >= FLOAT32.tiny)
    return np.where(good, flux, 0.0).astype(np.float32), np.where(good, ivar, 0.0).astype(np.float32)


def cut(columns: Columns, cuts: Cuts) -> Bits:
    """Give the bits of `Status` for the quality limits that each spectrum fails; a value equal to a limit passes.

    Only what was measured is judged: a spectrum whose `status` already leaves it without pixels gets no bit for its
    coverage and signal-to-noise ratio, nor one without a redshift for its range. A spectrum without any good pixel on
    the grid is LOW_COVERAGE whatever the limit.

    Reads the columns `z`, `zwarn`, `status`, `snr`, `total_snr` and `coverage`.
    """
    z, coverage, status = columns["z"], columns["coverage"], columns["status"]
    low = -np.inf if cuts.z_min is None else cuts.z_min
    high = np.inf if cuts.z_max is None else cuts.z_max
    measured = (status & _UNUSABLE) == 0
    faint = (columns["snr"] < cuts.snr_min) | (columns["total_snr"] < cuts.total_snr_min)
    bits = np.zeros(len(z), dtype=np.int32)
    bits[((z < low) | (z > high)) & (status & int(Status.NO_REDSHIFT) == 0)] |= int(Status.REDSHIFT_RANGE)
    bits[(columns["zwarn"] != 0) & cuts.zwarn] |= int(Status.REDSHIFT_WARNING)
    bits[measured & ((coverage <= 0) | (coverage < cuts.coverage_min))] |= int(Status.LOW_COVERAGE)
    bits[measured & (coverage > 0) & faint] |= int(Status.LOW_SNR)
    return bits


class Recipe:
    """The steps of `Prepare` for one survey grid, with all that does not depend on a spectrum computed once.

    Arguments:
        settings: the recipe.
        source_grid: observed-frame grid of the spectra that will be given; `grid` is the store's.

    Raises:
        ConfigError: the settings contradict each other or the grid, or the dust map is missing.

    Example:
        >>> Recipe(Prepare(), WaveGrid("log", 3600.0, 1e-4, 4500))
        Recipe(WaveGrid(log, 3600.0-10143.8 Å, 4500 pixels) -> rest WaveGrid(log, 3388.0-8318.0 Å, 1000 pixels))
    """

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
            The spectra on `grid`, and the columns with `status` brought up to date and four more: `snr` (median of
            f/σ per good pixel), `total_snr` (sqrt(Σ (f/σ)²)), `coverage` (share of good pixels; all float32), and
            `norm` (float64): prepared flux times `norm` is the flux in survey units, corrected for extinction where
            the recipe says so. A spectrum that a step cannot treat is masked as a whole, has 0 in the first three
            and NaN in `norm`; one that only fails a cut keeps its prepared flux, to be looked at.

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
        added = {"status": status, "snr": snr, "total_snr": total, "coverage": coverage, "norm": norm}
        prepared: Columns = {**columns, **added}
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
        if self._curve is not None:
            flux, ivar = deredden(flux, ivar, ebv, self._curve)
        shift = z if settings.frame == "rest" else np.zeros(len(z))
        flux, ivar = rebin(flux, ivar, self.source_grid, self.grid, shift)
        norm, wanted = self._norm(flux, ivar, z), (ivar > 0).any(axis=1)
        if self._placed:
            wanted &= np.isfinite(z)
        norm = np.where(wanted & (norm > FLOAT32.tiny) & (norm <= FLOAT32.max), norm, np.nan)
        status[wanted & np.isnan(norm)] |= int(Status.NO_SCALE)
        if settings.flux_factor:
            norm = norm / (1.0 + np.where(wanted, z, 0.0))
        flux, ivar = rescale(flux, ivar, norm)
        if settings.max_pixel_snr is not None:
            ivar = noise_floor(flux, ivar, settings.max_pixel_snr)
        return *_to_float32(flux, ivar), norm

    def _norm(self, flux: Pixels, ivar: Pixels, z: Values) -> Values:
        """Give what each spectrum is to be divided by; NaN or not positive where there is no such thing."""
        match self.settings.normalize:
            case Median():
                return median_flux(flux, ivar)
            case Mean():
                return mean_flux(flux, ivar)
            case AtWavelength(wave=wave, width=width):
                return flux_at(flux, ivar, self.grid, wave, width)
            case Distance(redshift=reference):
                # Prepared flux is f (D_L(z) / D_L(z0))², Böhm, Kim & Juneau 2023, section 2.
                ratio = luminosity_distance(np.array([reference])) / luminosity_distance(z)
                return np.asarray(np.minimum(ratio, 1e30) ** 2)  # the limit keeps a z of 1e-200 from overflowing
            case NoScale():
                return np.ones(len(flux))

    def __repr__(self) -> str:
        return f"Recipe({self.source_grid} -> {self.settings.frame} {self.grid})"
