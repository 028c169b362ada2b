"""Quantities that lines are measured by: which are fitted together, tables of fluxes and widths, indices and ratios.

Wavelengths are vacuum Å at rest.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Final, NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Float64
from scipy.special import ndtr

from distspec.spectra import LIGHT_SPEED, Spectra

__all__ = [
    "COMPLEXES",
    "LINES",
    "OXYGEN",
    "RATIOS",
    "Complex",
    "FittedLine",
    "Indices",
    "LineTable",
    "Ratios",
    "Rows",
    "Window",
    "balmer",
    "indices",
    "ratio_of",
    "ratios",
]

OXYGEN: Final = "[O II] 3727+3730"
"""The sum of the pair, which is known well also where the two are not resolved."""

LINES: Final[tuple[str, ...]] = (
    *("[O II] 3727", "[O II] 3730", OXYGEN, "[Ne III] 3869", "H delta", "H gamma", "[O III] 4364", "He II 4687"),
    *("H beta", "[O III] 4960", "[O III] 5008", "He I 5877", "[O I] 6302", "[N II] 6550", "H alpha", "[N II] 6585"),
    *("[S II] 6718", "[S II] 6733", "Ly alpha", "C IV 1549", "C III] 1909", "Mg II 2799"),
    *("broad H beta", "broad H alpha"),
)
"""What is measured. The broad Balmer lines are NaN where no broad component is preferred."""


class FittedLine(NamedTuple):
    """What has one amplitude in a fit.

    Arguments:
        shares: lines, each with its flux relative to the amplitude; more than one where a doublet's ratio is fixed.
        component: 0 narrow, 1 broad; the lines of a component share velocity and width.
    """

    shares: dict[str, float]
    component: int = 0


@dataclass(frozen=True)
class Complex:
    """Lines that are fitted over one straight continuum.

    Arguments:
        low, high: where the continuum begins and ends, vacuum Å at rest.
        lines: amplitudes.
        skip: wavelengths between which pixels are left out, vacuum Å at rest.
    """

    low: float
    high: float
    lines: tuple[FittedLine, ...]
    skip: tuple[float, float] = (0.0, 0.0)


def _singles(*names: str) -> tuple[FittedLine, ...]:
    return tuple(FittedLine({name: 1.0}) for name in names)


# The upper levels are common: 2.98 of Storey & Zeippen 2000 (MNRAS 312, 813), 2.94 as is usual for [N II].
_O3: Final = FittedLine({"[O III] 5008": 1.0, "[O III] 4960": 1 / 2.98})

_N2: Final = FittedLine({"[N II] 6585": 1.0, "[N II] 6550": 1 / 2.94})

_S2: Final = _singles("[S II] 6718", "[S II] 6733")

_WIDE: Final = (
    Complex(4720.0, 5080.0, (*_singles("H beta"), _O3)),
    Complex(6340.0, 6800.0, (*_singles("H alpha"), _N2, *_S2)),
)

COMPLEXES: Final[dict[str, tuple[Complex, ...]]] = {
    "other": (
        Complex(3700.0, 3757.0, _singles("[O II] 3727", "[O II] 3730")),
        Complex(3844.0, 3883.0, _singles("[Ne III] 3869")),
        Complex(4060.0, 4145.0, _singles("H delta")),
        Complex(4315.0, 4410.0, _singles("H gamma", "[O III] 4364")),
        Complex(4650.0, 4725.0, _singles("He II 4687")),
        Complex(5820.0, 5935.0, _singles("He I 5877"), (5884.0, 5905.0)),  # interstellar sodium
        Complex(6260.0, 6345.0, _singles("[O I] 6302")),
    ),
    "narrow": (
        Complex(4800.0, 4925.0, _singles("H beta")),
        Complex(4925.0, 5060.0, (_O3,)),
        Complex(6480.0, 6650.0, (*_singles("H alpha"), _N2)),
        Complex(6680.0, 6775.0, _S2),
    ),
    "wide": _WIDE,
    "broad": tuple(
        replace(one, lines=(*one.lines, FittedLine({name: 1.0}, 1)))
        for one, name in zip(_WIDE, ("H beta", "H alpha"), strict=True)
    ),
    "ultraviolet": (
        Complex(1195.0, 1290.0, _singles("Ly alpha", "N V 1240")),
        Complex(1465.0, 1620.0, _singles("C IV 1549")),
        Complex(1830.0, 1990.0, _singles("C III] 1909")),
        Complex(2650.0, 2950.0, _singles("Mg II 2799")),
    ),
    "sought": (
        Complex(3685.0, 3772.0, (FittedLine({"[O II] 3727": 0.5, "[O II] 3730": 0.5}),)),
        Complex(4780.0, 4940.0, _singles("H beta")),
        Complex(4900.0, 5070.0, (_O3,)),
        Complex(6470.0, 6660.0, (*_singles("H alpha"), _N2)),
        Complex(6660.0, 6790.0, (FittedLine({"[S II] 6718": 0.55, "[S II] 6733": 0.45}),)),
    ),
}
"""Lines that are fitted together: optical ones (`other` and `narrow`), the regions of the two strongest Balmer lines
without and with broad components (`wide`, `broad`; in place of `narrow`), ultraviolet ones (each of its own width),
and the strong ones by which a velocity is first sought.
"""


@dataclass(frozen=True)
class Rows:
    """Arrays that all have the spectra along their first axis."""

    def __getitem__(self, rows: Any) -> Self:
        """Select spectra by a slice, an index array or a boolean mask."""
        return type(self)(*(getattr(self, each.name)[rows] for each in fields(self)))


@dataclass(frozen=True)
class Window(Rows):
    """Pixels of n spectra between two wavelengths at rest; ivar and flux are 0 where a pixel does not count.

    Arguments:
        edges: of the pixels, Å at rest. Beyond the grid's end they stand still, and pixels have no width.
        step: width of the pixels, Å at rest; 1 beyond the grid's end.
    """

    flux: Float64[np.ndarray, "n w"]
    ivar: Float64[np.ndarray, "n w"]
    edges: Float64[np.ndarray, "n w+1"]
    step: Float64[np.ndarray, "n w"]

    @classmethod
    def of(cls, spectra: Spectra, low: float, high: float, skip: tuple[float, float] = (0.0, 0.0)) -> "Window":
        """Take the pixels of all spectra between `low` and `high` (Å at rest), less those between the ends of `skip`.

        Spectra of unknown redshift have none.
        """
        grid = spectra.grid
        stretch = np.ones(len(spectra)) if spectra.redshift is None else 1.0 + spectra.redshift
        known = np.isfinite(stretch) & (stretch > 0)
        stretch = np.where(known, stretch, 1.0)
        # Not beyond either end by more than a pixel: a line far outside needs no pixels.
        start, stop = (np.clip(np.rint(grid.position(end * stretch)), -1, grid.pixels) for end in (low, high))
        index = start[:, None].astype(np.int64) + np.arange(int((stop - start).max(initial=0)) + 2)
        edges = grid.edges[np.clip(index, 0, grid.pixels)] / stretch[:, None]
        index, step = index[:, :-1], np.diff(edges)
        inside = known[:, None] & (index <= stop[:, None]) & (step > 0)
        middle = 0.5 * (edges[:, 1:] + edges[:, :-1])
        inside &= (middle < skip[0]) | (middle > skip[1])
        pixel = np.clip(index, 0, grid.pixels - 1), np.arange(len(spectra))[:, None]
        ivar = spectra.ivar[pixel[1], pixel[0]].astype(np.float64)
        good = inside & (ivar > 0)
        flux = np.where(good, spectra.flux[pixel[1], pixel[0]], 0.0).astype(np.float64)
        return cls(flux, np.where(good, ivar, 0.0), edges, np.where(step > 0, step, 1.0))

    @property
    def middle(self) -> Float64[np.ndarray, "n w"]:
        """Give the centres of the pixels, Å at rest."""
        return np.asarray(0.5 * (self.edges[:, 1:] + self.edges[:, :-1]))

    def profile(
        self, wave: float, velocity: Float64[np.ndarray, "n"], sigma: Float64[np.ndarray, "n"]
    ) -> tuple[Float64[np.ndarray, "n w"], Float64[np.ndarray, "n w"], Float64[np.ndarray, "n w"]]:
        """Give the mean density (1/Å) in each pixel of a Gaussian of unit flux at rest wavelength `wave`, and its
        derivatives by velocity and sigma (km/s).
        """
        unit = wave / LIGHT_SPEED
        place = (self.edges - (wave + unit * velocity)[:, None]) / (unit * sigma[:, None])
        height = np.exp(-0.5 * place**2) / (np.sqrt(2 * np.pi) * sigma[:, None])
        density, by_velocity, by_sigma = (np.diff(each) / self.step for each in (ndtr(place), -height, -height * place))
        return density, by_velocity, by_sigma


@dataclass(frozen=True)
class LineTable(Rows):
    """Emission lines of n spectra. NaN: not measured.

    Arguments:
        flux, flux_error: of each line in `LINES`, unit of flux x Å on the grid's own axis. NaN where less than 80 % of
            the line's profile, or fewer than four pixels beside the lines, are good. Negative in absorption.
        width, width_error: equivalent width, Å at rest, positive in emission. NaN where the continuum is not positive.
        continuum: under the line, in the unit of flux.
        velocity, velocity_error: of the narrow optical lines together against the redshift, km/s. NaN where none of
            them is found; fluxes are then those at the redshift with a sigma of 150 km/s, and consistent with 0.
        sigma, sigma_error: of these lines, km/s as observed. Broader ones than 700 km/s are the broad component's.
        broad_sigma, broad_sigma_error: of the broad component of the Balmer lines, km/s; NaN where none is preferred.
        chi2: reduced, over the pixels that the optical fit used (NaN if none).
    """

    flux: Float64[np.ndarray, "n lines"]
    flux_error: Float64[np.ndarray, "n lines"]
    width: Float64[np.ndarray, "n lines"]
    width_error: Float64[np.ndarray, "n lines"]
    continuum: Float64[np.ndarray, "n lines"]
    velocity: Float64[np.ndarray, "n"]
    velocity_error: Float64[np.ndarray, "n"]
    sigma: Float64[np.ndarray, "n"]
    sigma_error: Float64[np.ndarray, "n"]
    broad_sigma: Float64[np.ndarray, "n"]
    broad_sigma_error: Float64[np.ndarray, "n"]
    chi2: Float64[np.ndarray, "n"]

    names: ClassVar[tuple[str, ...]] = LINES

    def __len__(self) -> int:
        return len(self.velocity)

    def of(self, name: str) -> tuple[Float64[np.ndarray, "n"], Float64[np.ndarray, "n"]]:
        """Give flux of a line and its error."""
        place = self.names.index(name)
        return self.flux[:, place], self.flux_error[:, place]

    def width_of(self, name: str) -> tuple[Float64[np.ndarray, "n"], Float64[np.ndarray, "n"]]:
        """Give equivalent width of a line and its error, Å."""
        place = self.names.index(name)
        return self.width[:, place], self.width_error[:, place]

    @classmethod
    def empty(cls, count: int) -> "LineTable":
        """Make the table in which nothing is measured."""
        return cls(*(np.full((count, len(LINES))[: 1 + (k < 5)], np.nan) for k in range(12)))

    @classmethod
    def join(cls, parts: "list[LineTable]") -> "LineTable":
        """Put tables one below the other."""
        return cls(*(np.concatenate([getattr(one, each.name) for one in parts]) for each in fields(cls)))


@dataclass(frozen=True)
class Indices(Rows):
    """Indices of n spectra; NaN where less than 80 % of a band is good.

    Arguments:
        d4000, d4000_error: mean flux per frequency in 4000-4100 Å over that in 3850-3950 Å.
        h_delta, h_delta_error: Lick index Hdelta_A, Å at rest, positive in absorption; as observed, not brought to the
            resolution of the Lick system.
    """

    d4000: Float64[np.ndarray, "n"]
    d4000_error: Float64[np.ndarray, "n"]
    h_delta: Float64[np.ndarray, "n"]
    h_delta_error: Float64[np.ndarray, "n"]


_JUDGED: Final = 0.8
"""Share of a band that must be good."""

_BREAK: Final = ((3850.0, 3950.0), (4000.0, 4100.0))
"""Bands of Dn4000 (Balogh et al. 1999), taken as vacuum; 1 Å changes the index by less than its errors."""

_H_DELTA: Final = ((4042.742, 4082.652), (4084.653, 4123.413), (4129.665, 4162.173))
"""Blue continuum, band, red continuum of Hdelta_A (Worthey & Ottaviani 1997, table 1), brought from air to vacuum."""


def indices(spectra: Spectra) -> Indices:
    """Measure Dn4000 and Hdelta_A. Pixels count by the part that lies in a band; masked ones are left out of it."""
    window = Window.of(spectra, 3840.0, 4172.0)
    variance = np.divide(1.0, window.ivar, out=np.zeros_like(window.ivar), where=window.ivar > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Indices(*_break(window, variance), *_h_delta(window, variance))


def _share(window: Window, band: tuple[float, float]) -> Float64[np.ndarray, "n w"]:
    """Give weights of pixels in a band, with sum 1; NaN where too little of it is good."""
    inside = np.minimum(window.edges[:, 1:], band[1]) - np.maximum(window.edges[:, :-1], band[0])
    weight = np.where(window.ivar > 0, np.maximum(inside, 0.0), 0.0)
    total = weight.sum(axis=1, keepdims=True)
    return np.where(total >= _JUDGED * (band[1] - band[0]), weight / total, np.nan)


def _break(window: Window, variance: Float64[np.ndarray, "n w"]) -> tuple[Any, Any]:
    per_frequency = window.middle**2
    blue, red = (_share(window, band) * per_frequency for band in _BREAK)
    below, above = ((part * window.flux).sum(axis=1) for part in (blue, red))
    index = np.where(below > 0, above / below, np.nan)
    by_flux = (red - index[:, None] * blue) / below[:, None]
    return index, np.sqrt((by_flux**2 * variance).sum(axis=1))


def _h_delta(window: Window, variance: Float64[np.ndarray, "n w"]) -> tuple[Any, Any]:
    blue, band, red = (_share(window, each) for each in _H_DELTA)
    left, right = ((low + high) / 2 for low, high in (_H_DELTA[0], _H_DELTA[2]))
    across = (window.middle - left) / (right - left)
    below, above = ((part * window.flux).sum(axis=1)[:, None] for part in (blue, red))
    level = below + across * (above - below)
    level = np.where((below > 0) & (above > 0), level, np.nan)
    width = _H_DELTA[1][1] - _H_DELTA[1][0]
    # A continuum that is extrapolated to below 0 far from the band must not reach the sum.
    taken = np.where(band > 0, band / np.where(band > 0, level, 1.0), np.where(np.isnan(band), np.nan, 0.0))
    index = width * (1 - (taken * window.flux).sum(axis=1))
    pull = np.where(band > 0, taken * window.flux / np.where(band > 0, level, 1.0), 0.0)
    by_flux = (
        (pull * (1 - across)).sum(axis=1)[:, None] * blue + (pull * across).sum(axis=1)[:, None] * red - taken
    ) * width
    return index, np.sqrt((by_flux**2 * variance).sum(axis=1))


RATIOS: Final = {
    "O3": ("[O III] 5008", "H beta"),
    "N2": ("[N II] 6585", "H alpha"),
    "S2": ("[S II] 6718+6733", "H alpha"),
    "O1": ("[O I] 6302", "H alpha"),
    "O3N2": ("[O III] 5008 / H beta", "[N II] 6585 / H alpha"),
    "O3O2": ("[O III] 5008", OXYGEN),
}
"""Ratios of lines, by their short names."""

_SIGMAS: Final = 3.0
"""Errors by which a line must be above 0 to enter a ratio."""


@dataclass(frozen=True)
class Ratios(Rows):
    """Decadic logarithms of line ratios of n spectra, in the order of `RATIOS`.

    Arguments:
        value, error: NaN unless all lines are 3 errors above 0.
        upper, lower: where one line is not: whether the ratio is below, or above, `limit`. Not told of O3N2.
        limit: with three errors in place of the line that is not seen.
    """

    value: Float64[np.ndarray, "n 6"]
    error: Float64[np.ndarray, "n 6"]
    upper: Bool[np.ndarray, "n 6"]
    lower: Bool[np.ndarray, "n 6"]
    limit: Float64[np.ndarray, "n 6"]

    def of(self, name: str) -> tuple[Float64[np.ndarray, "n"], Float64[np.ndarray, "n"]]:
        """Give one ratio of all spectra and its error."""
        place = list(RATIOS).index(name)
        return self.value[:, place], self.error[:, place]


def ratios(table: LineTable, absorption: float = 1.0) -> Ratios:
    """Give the logarithms of line ratios, with errors and limits. Errors of different lines count as independent.

    Arguments:
        absorption: as of `balmer`.
    """
    sulfur = [table.of(name) for name in ("[S II] 6718", "[S II] 6733")]
    fluxes = {name: table.of(name) for pair in RATIOS.values() for name in pair if name in LINES}
    fluxes["[S II] 6718+6733"] = sulfur[0][0] + sulfur[1][0], np.hypot(sulfur[0][1], sulfur[1][1])
    fluxes |= {name: balmer(table, name, absorption) for name in ("H beta", "H alpha")}
    columns = {name: ratio_of(fluxes[a], fluxes[b]) for name, (a, b) in RATIOS.items() if name != "O3N2"}
    (o3, o3_error, no, *_), (n2, n2_error, *_) = columns["O3"], columns["N2"]
    columns["O3N2"] = o3 - n2, np.hypot(o3_error, n2_error), no & False, no & False, np.full(len(table), np.nan)
    return Ratios(*(np.stack(each, axis=1) for each in zip(*(columns[name] for name in RATIOS), strict=True)))


def balmer(table: LineTable, name: str, absorption: float) -> tuple[Any, Any]:
    """Give flux and error of a Balmer line over stars.

    Arguments:
        absorption: equivalent width, Å, of what stars take from under a line: it is added, and counts whole as an
            error, for it is 0 to 2 in most galaxies. A line that is not 3 errors above 0 without it stays so.
    """
    flux, error = table.of(name)
    width = table.width_of(name)[0]
    lift = absorption * np.nan_to_num(np.divide(flux, width, out=np.zeros_like(flux), where=width != 0))
    lift = np.where(flux >= _SIGMAS * error, lift, 0.0)
    return flux + lift, np.minimum(np.hypot(error, lift), np.where(lift > 0, (flux + lift) / _SIGMAS, np.inf))


def ratio_of(above: tuple[Any, Any], below: tuple[Any, Any]) -> tuple[Any, Any, Any, Any, Any]:
    """Give value, error, upper, lower and limit, as of `Ratios`, of two lines (flux and error each)."""
    (top, top_error), (bottom, bottom_error) = above, below
    seen, also = ((flux >= _SIGMAS * error) & (flux > 0) for flux, error in (above, below))
    known, upper, lower = seen & also, also & ~seen & (top_error > 0), seen & ~also & (bottom_error > 0)
    top, bottom = np.where(upper, _SIGMAS * top_error, top), np.where(lower, _SIGMAS * bottom_error, bottom)
    there = known | upper | lower
    top, bottom = np.where(there, top, np.nan), np.where(there, bottom, np.nan)
    value, error = np.log10(top / bottom), np.hypot(top_error / top, bottom_error / bottom) / np.log(10)
    return *(np.where(known, each, np.nan) for each in (value, error)), upper, lower, np.where(known, np.nan, value)
