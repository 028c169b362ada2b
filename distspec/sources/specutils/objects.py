"""Batches to and from the objects of `specutils`, and rebinning from arbitrary wavelengths.

Nothing is guessed: a spectrum without uncertainties, in air, in a medium that is not stated, or in units that cannot be
converted is refused with the reason.

References:
    specutils, https://specutils.readthedocs.io
    Carnall 2017, https://arxiv.org/abs/1705.05165
    Greisen et al. 2006 (WAVE is vacuum, AWAV air), https://arxiv.org/abs/astro-ph/0507293
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from distspec.errors import extra
from distspec.sources.uniform import place_pixels, uniform_grid
from distspec.spectra import Spectra, WaveGrid

__all__ = [
    "FLUX_UNIT",
    "Plain",
    "UnusableError",
    "cards_of",
    "from_specutils",
    "plain_spectrum",
    "rebin_any",
    "rebin_spectra",
    "redshift_of",
    "single_spectra",
    "to_specutils",
]

FLUX_UNIT = "1e-17 erg / (s cm2 Angstrom)"

_POWERS = {"std": 1, "var": 2, "ivar": -2}
"""Power of the flux that an uncertainty of that kind (astropy's `uncertainty_type`) is."""

Values = Float64[np.ndarray, "m"]


class UnusableError(ValueError):
    """One spectrum cannot be used; the message says why."""


@dataclass(frozen=True)
class Plain:
    """One spectrum in vacuum Å, in the order of its wavelengths, with ivar 0 where a pixel is bad."""

    wave: Values
    flux: Values
    ivar: Values


def rebin_any(
    wave: Float64[np.ndarray, "m"], flux: Float64[np.ndarray, "m"], ivar: Float64[np.ndarray, "m"], grid: WaveGrid
) -> tuple[Float64[np.ndarray, "pixels"], Float64[np.ndarray, "pixels"]]:
    """Average a spectrum with arbitrary, rising wavelengths over the bins of a grid, conserving Σ f Δλ.

    Source pixels reach half-way to their neighbors. With w_ij the overlap in Å of pixel i and bin j, over good pixels,

        f_j = Σ_i w_ij f_i / Σ_i w_ij        ivar_j = (Σ_i w_ij)² / Σ_i w_ij² σ_i²

    A bin is masked when good pixels cover less than half of it, as in `distspec.prepare.recipe.rebin`.

    References:
        Carnall 2017, SpectRes, eqs. 2-4, https://arxiv.org/abs/1705.05165.

    Arguments:
        wave: Å vacuum, rising.
        flux: flux density per Å.
        ivar: inverse variance, 0 where masked.
        grid: the bins.

    Returns:
        Flux density and inverse variance; both 0 in a masked bin.

    Raises:
        ValueError: there are fewer than two pixels, or the wavelengths do not rise.
    """
    if len(wave) < 2 or not (np.diff(wave) > 0).all():
        raise ValueError(f"{len(wave)} wavelengths; expected two or more that rise")
    middle = (wave[1:] + wave[:-1]) / 2
    edges = np.concatenate([[2 * wave[0] - middle[0]], middle, [2 * wave[-1] - middle[-1]]])
    # Between neighbors of the merged edges there is one pixel and one bin.
    cuts = np.unique(np.concatenate([edges, grid.edges]))
    cuts = cuts[(cuts >= max(edges[0], grid.edges[0])) & (cuts <= min(edges[-1], grid.edges[-1]))]
    width, center = np.diff(cuts), (cuts[1:] + cuts[:-1]) / 2
    source = np.clip(np.searchsorted(edges, center) - 1, 0, len(wave) - 1)
    target = np.clip(np.searchsorted(grid.edges, center) - 1, 0, grid.pixels - 1)
    good = ivar[source] > 0
    width, source, target = width[good], source[good], target[good]

    def gather(values: Values) -> Float64[np.ndarray, "pixels"]:
        return np.bincount(target, values, grid.pixels)

    covered, variance = gather(width), gather(width * width / ivar[source])
    usable = (covered >= 0.5 * np.diff(grid.edges)) & (variance > 0)
    total = gather(width * flux[source])
    rebinned = np.divide(total, covered, out=np.zeros(grid.pixels), where=usable)
    return rebinned, np.divide(covered * covered, variance, out=np.zeros(grid.pixels), where=usable)


def to_specutils(spectra: Spectra, unit: str = FLUX_UNIT) -> Any:
    """Give a batch as a `specutils.SpectrumList`; `from_specutils` gives the same batch back.

    Wavelengths are Å in vacuum, uncertainties inverse variances, and a pixel is masked where its inverse variance is 0.
    In `meta` stand `row`, `medium` ("vacuum"), `frame` ("observed" or "rest"), `grid` and `redshift`.

    Arguments:
        spectra: what to convert.
        unit: of the flux, as astropy writes it; "" for one that is relative or normalized.
    """
    from astropy import units as u
    from astropy.nddata import InverseVariance

    with extra("specutils"):
        from specutils import Spectrum, SpectrumList

    flux_unit = u.Unit(unit)
    items = []
    for index in range(len(spectra)):
        z = np.nan if spectra.redshift is None else float(spectra.redshift[index])
        meta = {"row": int(spectra.rows[index]), "medium": "vacuum", "grid": spectra.grid.to_dict(), "redshift": z}
        items.append(
            Spectrum(
                flux=u.Quantity(spectra.flux[index], flux_unit, dtype=np.float32),
                spectral_axis=u.Quantity(spectra.grid.wave, u.Angstrom),
                uncertainty=InverseVariance(spectra.ivar[index].copy(), unit=flux_unit**-2),
                mask=~spectra.good[index],
                redshift=z if np.isfinite(z) else None,
                meta=meta | {"frame": "rest" if spectra.redshift is None else "observed"},
            )
        )
    return SpectrumList(items)


def from_specutils(objects: Any, grid: WaveGrid | None = None) -> Spectra:
    """Make a batch of one or more `specutils` spectra.

    Arguments:
        objects: a `Spectrum` of one or more dimensions, or an iterable of them. Wavelengths are taken as vacuum unless
            their `meta` says air.
        grid: bins to bring the spectra to; without it they must share one uniform grid, and no flux is changed.

    Returns:
        The batch. Redshifts are those of the objects, NaN where one has none; there are none at all (None) if every
        object says in `meta` that it is in the rest frame.

    Raises:
        ValueError: a spectrum cannot be used, or no grid is given and they share none.
    """
    items = list(single_spectra(objects))
    if not items:
        raise ValueError("no spectra; expected one or more")
    plain = [plain_spectrum(item, vacuum=True) for item in items]
    if grid is None:
        grid = _shared_grid(items, plain)
        flux, ivar = _placed(plain, grid)
    else:
        flux, ivar = rebin_spectra(plain, grid)
    rows = [_meta(item).get("row", index) for index, item in enumerate(items)]
    rest = all(_meta(item).get("frame") == "rest" for item in items)
    redshift = None if rest else np.array([redshift_of(item) for item in items])
    return Spectra(np.array(rows, np.int64), flux, ivar, grid, redshift)


def _shared_grid(items: list[Any], plain: list[Plain]) -> WaveGrid:
    """Give the one uniform grid of spectra: what they say in `meta` where that is true, else what is recognized."""
    stated = _meta(items[0]).get("grid")
    grid = WaveGrid(**stated) if isinstance(stated, Mapping) else None
    if grid is None or not np.array_equal(grid.wave, plain[0].wave):
        grid = uniform_grid(plain[0].wave)
    if grid is None:
        raise ValueError("the wavelengths are uniform neither in λ nor in log λ; expected a grid to rebin them to")
    return grid


def _placed(
    plain: list[Plain], grid: WaveGrid
) -> tuple[Float32[np.ndarray, "n pixels"], Float32[np.ndarray, "n pixels"]]:
    lengths = np.array([len(item.wave) for item in plain], np.int64)
    whole = [np.concatenate(values) for values in zip(*((p.wave, p.flux, p.ivar) for p in plain), strict=True)]
    flux, ivar, reasons = place_pixels(grid, lengths, whole[0], *(_to_float32(values) for values in whole[1:]))
    for index, reason in enumerate(reasons):
        if reason:
            raise ValueError(f"spectrum {index}: {reason}; expected the grid of the first, or a grid to rebin them to")
    return flux, ivar


def rebin_spectra(
    plain: Iterable[Plain], grid: WaveGrid
) -> tuple[Float32[np.ndarray, "n pixels"], Float32[np.ndarray, "n pixels"]]:
    pairs = [rebin_any(item.wave, item.flux, item.ivar, grid) for item in plain]
    flux, ivar = (np.array([_to_float32(pair[i]) for pair in pairs]).reshape(-1, grid.pixels) for i in (0, 1))
    good = np.isfinite(flux) & np.isfinite(ivar)
    return np.where(good, flux, np.float32(0)), np.where(good, ivar, np.float32(0))


def _to_float32(values: Values) -> Float32[np.ndarray, "m"]:
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float32)


def single_spectra(objects: Any) -> Iterator[Any]:
    """Give one-dimensional spectra, whatever they come in."""
    if not hasattr(objects, "spectral_axis"):
        for item in objects:
            yield from single_spectra(item)
    elif objects.flux.ndim <= 1:
        yield objects
    else:
        for index in range(objects.flux.shape[0]):
            yield from single_spectra(objects[index])


def plain_spectrum(item: Any, vacuum: bool, headers: Iterable[Mapping[str, Any]] = ()) -> Plain:
    """Convert one spectrum.

    Arguments:
        item: a one-dimensional `specutils.Spectrum`.
        vacuum: whether to take it as vacuum where nothing says.
        headers: what the file says beyond `item.meta`.

    Raises:
        UnusableError: it is in air or an unknown medium, has no uncertainty, or units that cannot be converted.
    """
    from astropy import units as u

    _check_medium(item, vacuum, headers)
    try:
        wave = item.spectral_axis.to_value(u.Angstrom, u.spectral())
    except u.UnitConversionError:
        raise UnusableError(f"spectral axis in {item.spectral_axis.unit}; expected wavelengths or the like") from None
    wave = np.asarray(wave, np.float64)
    if not (np.isfinite(wave) & (wave > 0)).all():
        raise UnusableError("wavelengths that are not positive numbers; expected Å")
    scale = _scale(item.flux.unit, wave)
    flux = np.asarray(item.flux.value, np.float64) * scale
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ivar = _inverse_variance(item) / scale**2
    order = np.argsort(wave, kind="stable")
    if len(wave) < 2 or (np.diff(wave[order]) <= 0).any():
        raise UnusableError("wavelengths repeat, or there are fewer than two; expected each once")
    good = np.isfinite(flux) & np.isfinite(ivar) & (ivar > 0)
    if item.mask is not None:
        good &= ~np.broadcast_to(np.asarray(item.mask, bool), good.shape)
    flux = np.where(np.isfinite(flux), flux, 0.0)
    return Plain(wave[order], flux[order], np.where(good, ivar, 0.0)[order])


def _scale(unit: Any, wave: Values) -> Values:
    """Give the factor from a flux unit to ours, pixel by pixel; 1 for a flux without a unit."""
    from astropy import units as u

    if unit in (u.dimensionless_unscaled, u.Unit(FLUX_UNIT)):
        return np.ones(len(wave))
    try:
        return np.asarray(unit.to(u.Unit(FLUX_UNIT), np.ones(len(wave)), u.spectral_density(wave * u.Angstrom)))
    except u.UnitConversionError:
        raise UnusableError(f"flux in {unit}; expected a flux density, or a relative flux without a unit") from None


def _inverse_variance(item: Any) -> Values:
    """Give the inverse variance in the unit of the flux, whatever kind of uncertainty there is; NaN where it is bad."""
    from astropy import units as u

    uncertainty = item.uncertainty
    kind = getattr(uncertainty, "uncertainty_type", None)
    if kind not in _POWERS:
        raise UnusableError(f"uncertainty of kind {kind}; expected errors, variances or inverse variances")
    native = item.flux.unit ** _POWERS[kind]
    values = np.asarray(uncertainty.array, np.float64)
    try:
        # Not through astropy's own conversions, which would round what is an inverse variance already.
        if uncertainty.unit is not None and uncertainty.unit != native:
            values = values * uncertainty.unit.to(native)
    except u.UnitConversionError:
        raise UnusableError(f"uncertainty in {uncertainty.unit}; expected {native} as of the flux") from None
    return np.where(values > 0, values, np.nan) ** (-2.0 / _POWERS[kind])


def _meta(item: Any) -> Mapping[str, Any]:
    return item.meta if isinstance(item.meta, Mapping) else {}


def cards_of(item: Any) -> dict[str, Any]:
    """Collect what the file's headers said, by upper-case keyword."""
    meta = _meta(item)
    cards: dict[str, Any] = {}
    sources: list[Any] = [meta, meta.get("header"), meta.get("primary_header")]
    for source in sources:
        # A FITS header behaves like a mapping without being one.
        if isinstance(source, Mapping) or hasattr(source, "cards"):
            cards |= {str(key).upper(): source[key] for key in source if str(key)}
    return cards


def _check_medium(item: Any, vacuum: bool, headers: Iterable[Mapping[str, Any]]) -> None:
    """Refuse a spectrum in air, and one that does not say unless the user has."""
    stated = item.spectral_axis.unit.physical_type in ("frequency", "energy")
    for cards in (cards_of(item), *headers):
        axes = [str(cards[key]).strip().upper() for key in cards if key.startswith("CTYPE")]
        said = str(cards.get("AIRORVAC", cards.get("MEDIUM", ""))).strip().lower()
        if said == "air" or cards.get("VACUUM") in (False, "F") or any(axis.startswith("AWAV") for axis in axes):
            raise UnusableError("wavelengths in air by the header; expected vacuum: convert them first")
        stated |= said.startswith("vac") or cards.get("VACUUM") in (True, "T")
        stated |= any(axis.startswith(("WAVE-", "FREQ")) or axis == "WAVE" for axis in axes)
    if not stated and not vacuum:
        raise UnusableError("air or vacuum is not stated; expected source.vacuum = true if you know it is vacuum")


def redshift_of(item: Any) -> float:
    """Give the redshift; NaN where it was never set, which specutils shows as exactly 0.

    Where `meta` has it too, that counts: specutils keeps a velocity, so that the last digit may be lost, and no 0.
    """
    try:
        z = float(np.asarray(getattr(item.redshift, "value", item.redshift)))
    except (TypeError, ValueError, AttributeError):
        z = 0.0
    stated = _meta(item).get("redshift")
    if isinstance(stated, int | float) and (z == 0 or abs(z - stated) < 1e-12):
        z = float(stated)
    elif z == 0:
        z = np.nan
    return z if np.isfinite(z) and z > -1 else float("nan")
