"""Emission lines and spectral indices of whole batches of spectra: fluxes, widths, velocities, each with its error.

Lines are Gaussians integrated over pixels. All narrow optical lines share one velocity and one width; amplitudes, and a
straight continuum under each group of lines, are linear. So the fit is one in two dimensions with a small linear system
for each group inside it (variable projection), and runs for all spectra at once. Errors are those of the whole fit:
that of a flux contains what velocity, width and continuum leave open.

Stellar absorption is not removed: under a Balmer line it takes 1-3 Å of equivalent width from most galaxies, up to 10 Å
after a starburst; `lines.ratios` allows for it. Nor is the instrument's resolution.

References:
    Golub & Pereyra 1973, SIAM J. Numer. Anal. 10, 413, and Kaufman 1975, BIT 15, 49: variable projection.
    Storey & Zeippen 2000, MNRAS 312, 813: ratios of doublets.
    Balogh et al. 1999, ApJ 527, 54: Dn4000. Worthey & Ottaviani 1997, ApJS 111, 377: Hdelta_A.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Float64, Int64

from distspec.spectra import LIGHT_SPEED, Spectra
from distspec.spectra.lines.tables import COMPLEXES, LINES, OXYGEN, Complex, LineTable, Window
from distspec.spectra.lines.wavelengths import EMISSION

__all__ = ["measure"]

_COVERED: Final = 0.8
"""Share of a line's profile that must lie on good pixels; 95 % lie within ±2 sigma."""

_SIDE: Final = 4
"""Good pixels without a line, with which a continuum is known."""

_START: Final = 12.0
"""Drop of chi-squared by which lines are worth a fit."""

_REAL: Final = 4.0
"""Errors, in units of the root of the reduced chi-squared if above 1, by which a line must stand out."""

_NEAR: Final = 500.0
"""km/s from the redshift, within which one line is enough."""

_PREFERRED: Final = 25.0
"""Drop of chi-squared that makes a broad component real; in units of the reduced chi-squared if above 1."""

_PRIOR: Final = 700.0
"""km/s; the search counts a drop of chi-squared 1 + (v / this)² times less at a velocity v; the fit does not."""

_NARROW: Final = ((-2000.0, 40.0), (2000.0, 700.0))
"""Lowest and highest velocity and sigma, km/s."""

_BROAD: Final = ((-3000.0, 600.0), (3000.0, 7000.0))

_UV: Final = ((-5000.0, 60.0), (5000.0, 7000.0))

_ASSUMED: Final = 150.0
"""sigma in km/s with which fluxes are measured where no line is found."""

_BLOCK: Final = 256
"""Spectra at a time; their windows then fit in the cache."""

_STEPS: Final = 25
"""Of the refinement at most; few spectra take more than six."""


# --- variable projection ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fit:
    """State of a fit at given velocities and widths, q of them.

    Arguments:
        chi2: at the best amplitudes and continua.
        slope, curve: half its gradient, downhill, and half its Gauss-Newton matrix, in the velocities and widths.
        found: amplitudes and continuum of each complex, their covariance at fixed velocity and width, and how they
            follow these.
        parts: chi2 of each complex.
    """

    chi2: Float64[np.ndarray, "n"]
    slope: Float64[np.ndarray, "n q"]
    curve: Float64[np.ndarray, "n q q"]
    found: list[tuple[Any, Any, Any]]
    parts: list[Float64[np.ndarray, "n"]]


@dataclass(frozen=True)
class _Model:
    """Complexes with the windows that they are fitted in."""

    parts: tuple[tuple[Complex, Window], ...]
    components: int = 1

    @classmethod
    def of(cls, spectra: Spectra, complexes: tuple[Complex, ...]) -> "_Model":
        windows = ((one, Window.of(spectra, one.low, one.high, one.skip)) for one in complexes)
        count = 1 + max(line.component for one in complexes for line in one.lines)
        return cls(tuple((one, window) for one, window in windows if window.ivar.any()), count)

    def __getitem__(self, rows: Any) -> "_Model":
        return _Model(tuple((one, window[rows]) for one, window in self.parts), self.components)

    @property
    def pixels(self) -> Float64[np.ndarray, "n"]:
        """Good pixels."""
        return np.asarray(sum((window.ivar > 0).sum(axis=1) for _, window in self.parts), np.float64)

    def fit(self, theta: Float64[np.ndarray, "n q"]) -> _Fit:
        """Fit amplitudes and continua at the velocity and sigma of each component, km/s."""
        count, q = theta.shape
        slope, curve = np.zeros((count, q)), np.zeros((count, q, q))
        chi2, found = [], []
        for one, window in self.parts:
            basis, change = self._basis(one, window, theta)
            weighted = basis * window.ivar[:, None]
            inverse = _inverse(weighted @ basis.transpose(0, 2, 1))
            values = (inverse @ (weighted @ window.flux[:, :, None]))[:, :, 0]
            left = window.flux - (values[:, None] @ basis)[:, 0]
            moved = np.zeros((count, q, left.shape[1]))
            for place, line in enumerate(one.lines):
                at = 2 * line.component
                moved[:, at : at + 2] += values[:, place, None, None] * change[place]
            pulled = moved * window.ivar[:, None]
            mixed = weighted @ moved.transpose(0, 2, 1)
            follow = inverse @ mixed
            chi2.append((left**2 * window.ivar).sum(axis=1))
            slope += (pulled @ left[:, :, None])[:, :, 0]
            curve += pulled @ moved.transpose(0, 2, 1) - mixed.transpose(0, 2, 1) @ follow
            found.append((values, inverse, follow))
        return _Fit(np.sum(chi2, axis=0), slope, curve, found, chi2)

    @staticmethod
    def _basis(one: Complex, window: Window, theta: Float64[np.ndarray, "n q"]) -> tuple[Any, list[Any]]:
        basis, change = [], []
        for line in one.lines:
            velocity, sigma = theta[:, 2 * line.component], theta[:, 2 * line.component + 1]
            parts = [
                [share * each for each in window.profile(EMISSION[name], velocity, sigma)]
                for name, share in line.shares.items()
            ]
            profile, by_velocity, by_sigma = (sum(each) for each in zip(*parts, strict=True))
            basis.append(profile)
            change.append(np.stack([by_velocity, by_sigma], axis=1))
        return np.stack([*basis, np.ones_like(window.flux), _across(one, window.middle)], axis=1), change

    def refine(self, theta: Float64[np.ndarray, "n q"], bounds: Any) -> Float64[np.ndarray, "n q"]:
        """Find the nearest minimum of chi-squared (Levenberg-Marquardt), each spectrum until it stands still."""
        low, high = (np.concatenate(each) for each in zip(*bounds, strict=True))
        best, active = np.clip(theta, low, high), np.arange(len(theta))
        here, damping = self.fit(best), np.full(len(theta), 1e-3)
        state = [here.chi2, here.slope, here.curve]
        for _ in range(_STEPS):
            model, (chi2, slope, curve), old = self[active], (each[active] for each in state), best[active]
            scale = np.maximum(np.diagonal(curve, axis1=1, axis2=2), 1e-30)
            step = _inverse(curve + np.eye(curve.shape[1]) * (damping[active, None] * scale)[:, None])
            move = (step @ slope[:, :, None])[:, :, 0]
            reach = np.repeat(old[:, 1::2], 2, axis=1) * np.tile([1.0, 0.5], move.shape[1] // 2)
            trial = np.clip(old + np.clip(move, -reach, reach), low, high)
            new = model.fit(trial)
            better = new.chi2 <= chi2
            for kept, got in zip(state, (new.chi2, new.slope, new.curve), strict=True):
                kept[active[better]] = got[better]
            best[active[better]] = trial[better]
            damping[active] = np.where(better, damping[active] * 0.1, damping[active] * 8)
            # Small against its error, or against itself where there is no noise to speak of.
            small = (np.abs(trial - old) * np.sqrt(scale) < 0.01) | (np.abs(trial - old) < 1e-4 * (1 + np.abs(old)))
            active = active[~(small.all(axis=1) & (better | (damping[active] > 1e3)) | (damping[active] > 1e8))]
            if not len(active):
                break
        return np.asarray(best)


def _across(one: Complex, wave: Any) -> Any:
    """Give where a wavelength lies in a complex, -1 to 1."""
    return (2 * wave - one.low - one.high) / (one.high - one.low)


def _inverse(matrix: Float64[np.ndarray, "n m m"]) -> Float64[np.ndarray, "n m m"]:
    """Invert positive matrices; a row of zeros, and what is the same as another row, do no harm."""
    size = np.sqrt(np.maximum(np.diagonal(matrix, axis1=1, axis2=2), 0.0))
    # A profile of which only the farthest wing is seen is not seen.
    size = np.where(size > 1e-60 * size.max(axis=1, keepdims=True), size, 0.0)
    scale = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    scaled = matrix * scale[:, :, None] * scale[:, None, :]
    # A template without a good pixel would be singular; its row then stands for itself.
    scaled += np.eye(matrix.shape[1]) * np.where(size > 0, 1e-10, 1.0)[:, None]
    return np.asarray(np.linalg.inv(scaled) * scale[:, :, None] * scale[:, None, :])


# --- the search -------------------------------------------------------------------------------------------------------

_VELOCITIES: Final = np.arange(-1500.0, 1501.0, 75.0)

_SIGMAS: Final = np.array([75.0, 130.0, 225.0, 390.0, 650.0])


@cache
def _templates(number: int) -> tuple[Any, Any, list[Any]]:
    """Give edges of bins of 75 km/s (Å), where in a complex they lie, and its lines at each sigma and velocity."""
    one = COMPLEXES["sought"][number]
    bins = int(np.log(one.high / one.low) * LIGHT_SPEED / 75.0)
    edges = np.geomspace(one.low, one.high, bins + 1)
    middle = 0.5 * (edges[1:] + edges[:-1])
    sigma, velocity = (each.ravel() for each in np.meshgrid(_SIGMAS, _VELOCITIES, indexing="ij"))
    profiles = []
    for line in one.lines:
        each = (
            share * np.exp(-0.5 * ((middle[:, None] / EMISSION[name] - 1) * LIGHT_SPEED - velocity) ** 2 / sigma**2)
            for name, share in line.shares.items()
        )
        profiles.append(sum(each))
    return edges, _across(one, middle), profiles


def _search(spectra: Spectra) -> tuple[Any, Float64[np.ndarray, "n 2"], Float64[np.ndarray, "n 2"]]:
    """Find by how much strong lines lower chi-squared, and where: velocity and sigma (km/s), by all and without Balmer.

    Sums of pixels are read at bins in velocity, which are the same for all spectra whatever their redshift. So the
    lines need be drawn once, and the work is matrix products. Only lines in emission count.
    """
    grid, count = spectra.grid, len(spectra)
    stretch = np.ones(count) if spectra.redshift is None else 1.0 + spectra.redshift
    known = np.isfinite(stretch) & (stretch > 0)
    ivar = np.where(spectra.good & known[:, None], spectra.ivar, 0.0).astype(np.float64)
    weighted = ivar * np.where(ivar > 0, spectra.flux, 0.0)
    sums = [np.pad(np.cumsum(each, axis=1), ((0, 0), (1, 0))) for each in (ivar, weighted)]
    stretch, rows = np.where(known, stretch, 1.0)[:, None], np.arange(count)[:, None]
    gain = np.zeros((2, count, len(_SIGMAS) * len(_VELOCITIES)))
    for number in range(len(COMPLEXES["sought"])):
        edges, across, profiles = _templates(number)
        place = np.clip(grid.position(edges * stretch) + 0.5, 0, grid.pixels)
        left = np.minimum(place.astype(np.int64), grid.pixels - 1)
        inside, pull = (
            np.diff(each[rows, left] + (place - left) * (each[rows, left + 1] - each[rows, left])) for each in sums
        )
        drop = _gain(inside, pull, across, profiles)
        balmer = any(name.startswith("H ") for line in COMPLEXES["sought"][number].lines for name in line.shares)
        gain += drop * np.array([1, not balmer])[:, None, None]
    gain /= 1 + (np.tile(_VELOCITIES, len(_SIGMAS)) / _PRIOR) ** 2
    best = gain.argmax(axis=2)
    start = np.stack([_VELOCITIES[best % len(_VELOCITIES)], _SIGMAS[best // len(_VELOCITIES)]], axis=2)
    return gain[0].max(axis=1), start[0], start[1]


def _gain(
    ivar: Float64[np.ndarray, "n b"], weighted: Float64[np.ndarray, "n b"], across: Any, profiles: list[Any]
) -> Float64[np.ndarray, "n k"]:
    """Give the drop of chi-squared by one or two lines of positive flux over a straight continuum."""
    straight = np.stack([np.ones_like(across), across])
    inverse = _inverse(np.einsum("nb,ib,jb->nij", ivar, straight, straight, optimize=True))
    level = np.einsum("nij,nj->ni", inverse, weighted @ straight.T)
    weighted = weighted - ivar * (level @ straight)
    over = [np.stack([ivar @ (row[:, None] * each) for row in straight], axis=1) for each in profiles]

    def product(i: int, j: int) -> Any:
        whole = ivar @ (profiles[i] * profiles[j])
        return whole - np.einsum("nik,nij,njk->nk", over[i], inverse, over[j], optimize=True) + (i == j) * 0.01 * whole

    # One hundredth more than there is keeps a line that the continuum could as well make from counting.
    drawn = [weighted @ each for each in profiles]
    sizes = [np.maximum(product(i, i), 1e-300) for i in range(len(profiles))]
    single = [np.maximum(pull, 0.0) ** 2 / size for pull, size in zip(drawn, sizes, strict=True)]
    if len(profiles) == 1:
        return np.asarray(single[0])
    mixed = product(0, 1)
    first, second = drawn[0] * sizes[1] - drawn[1] * mixed, drawn[1] * sizes[0] - drawn[0] * mixed
    det = np.maximum(sizes[0] * sizes[1] - mixed**2, 1e-300)
    both = (drawn[0] * first + drawn[1] * second) / det
    return np.asarray(np.where((first > 0) & (second > 0), both, np.maximum(*single)))


# --- measurements -----------------------------------------------------------------------------------------------------


def measure(spectra: Spectra) -> LineTable:
    """Fit the emission lines of all spectra.

    What is masked, or lies off the grid, takes no part. A spectrum whose redshift is not known gets NaN.

    Arguments:
        spectra: flux in any unit, in the rest frame or on an observed grid with redshifts.

    Example:
        >>> from distspec.spectra import WaveGrid
        >>> grid = WaveGrid.between("log", 4700.0, 5200.0, 200)
        >>> flux = 1 + 4 * np.exp(-0.5 * ((grid.wave - 4862.68) / 5) ** 2).astype(np.float32)[None]
        >>> table = measure(Spectra(np.arange(1), flux, np.full_like(flux, 100), grid))
        >>> round(float(table.of("H beta")[0][0]))
        50
    """
    blocks = range(0, max(len(spectra), 1), _BLOCK)
    return LineTable.join([_measure(spectra[start : start + _BLOCK]) for start in blocks])


def _measure(spectra: Spectra) -> LineTable:
    table, rows = LineTable.empty(len(spectra)), np.arange(len(spectra))
    stretch = np.ones(len(spectra)) if spectra.redshift is None else 1.0 + spectra.redshift
    model = _Model.of(spectra, COMPLEXES["other"] + COMPLEXES["narrow"])
    if model.parts:
        gain, theta, forbidden = _search(spectra)
        theta, free = _settle(model, theta, gain > _START, (0.0, _ASSUMED), _NARROW)
        fit, loose = _enter(table, rows, stretch, model, theta, free)
        _enter_motion(table, rows, theta, fit, loose, np.where(model.pixels > 0, _freedom(model), 0), free)
        _enter_broad(table, spectra, stretch, (theta, forbidden))
    for one in COMPLEXES["ultraviolet"]:
        model = _Model.of(spectra, (one,))
        if model.parts:
            tried = np.array([(v, s) for v in (-2000.0, -700.0, 0.0, 700.0) for s in (200.0, 600.0, 1500.0, 3500.0)])
            chi2 = np.stack([model.fit(np.tile(each, (len(spectra), 1))).chi2 for each in tried])
            theta, free = _settle(model, tried[chi2.argmin(axis=0)], model.pixels > 0, (0.0, 1500.0), _UV)
            _enter(table, rows, stretch, model, theta, free)
    return table


def _settle(
    model: _Model, theta: Float64[np.ndarray, "n 2"], worth: Bool[np.ndarray, "n"], assumed: Any, bounds: Any
) -> tuple[Float64[np.ndarray, "n 2"], Bool[np.ndarray, "n"]]:
    """Refine where it is worth it; where then no line is found, return to what is assumed, and say so.

    Far from the redshift two lines must be found, for among the features of a stellar continuum there is always one
    that looks like a line.
    """
    theta, free = np.where(worth[:, None], theta, assumed), worth.copy()
    if worth.any():
        part = model[worth]
        theta[worth] = part.refine(theta[worth], (bounds,))
        strength = _strength(part, part.fit(theta[worth]))
        several = (np.abs(theta[worth, 0]) < _NEAR) | ((strength > _REAL).sum(axis=1) > 1) | (bounds is _UV)
        free[worth] = (strength.max(axis=1) > _REAL) & several & _inside(theta[worth], bounds)
        free[worth] &= _straight(part, strength)
        theta = np.where(free[:, None], theta, assumed)
    return theta, free


def _inside(theta: Float64[np.ndarray, "n q"], bounds: Any) -> Bool[np.ndarray, "n"]:
    """Tell where the first component is what it should be, and did not end at a bound."""
    return np.asarray((theta[:, 1] < 0.99 * bounds[1][1]) & (np.abs(theta[:, 0]) < 0.99 * bounds[1][0]))


def _straight(model: _Model, strength: Float64[np.ndarray, "n all"]) -> Bool[np.ndarray, "n"]:
    """Tell where no forbidden line is in absorption by four errors, or by half as many as a narrow line in emission is.

    There is no such absorption: it tells of a continuum that is not straight, as that of cool stars.
    """
    lines = [line for one, _ in model.parts for line in one.lines]
    forbidden = np.array(["[" in next(iter(line.shares)) for line in lines])
    highest = (strength * np.array([line.component == 0 for line in lines])).max(axis=1)
    return np.asarray((-strength * forbidden).max(axis=1) < np.maximum(_REAL, 0.5 * highest))


def _strength(model: _Model, fit: _Fit) -> Float64[np.ndarray, "n all"]:
    """Give all amplitudes over their errors, which are enlarged where a complex is fitted badly."""
    ratios = []
    for (one, window), (values, inverse, _), chi2 in zip(model.parts, fit.found, fit.parts, strict=True):
        lines = len(one.lines)
        freedom = np.maximum((window.ivar > 0).sum(axis=1) - lines - 2, 1)
        enlarged = np.maximum(chi2 / freedom, 1.0)[:, None]
        error = np.sqrt(np.diagonal(inverse, axis1=1, axis2=2)[:, :lines] * enlarged)
        ratios.append(np.divide(values[:, :lines], error, out=np.zeros_like(error), where=error > 0))
    return np.concatenate(ratios, axis=1)


def _freedom(model: _Model) -> Float64[np.ndarray, "n"]:
    """Give the degrees of freedom, at least one."""
    fitted = sum((len(one.lines) + 2) * window.ivar.any(axis=1) for one, window in model.parts)
    return np.asarray(np.maximum(model.pixels - fitted - 2 * model.components, 1.0))


def _enter(
    table: LineTable,
    rows: Int64[np.ndarray, "n"],
    stretch: Float64[np.ndarray, "n"],
    model: _Model,
    theta: Float64[np.ndarray, "n q"],
    free: Bool[np.ndarray, "n"],
) -> tuple[_Fit, Float64[np.ndarray, "n q q"]]:
    """Write flux, width and continuum of the lines of a fit into rows of the table; give the fit and its covariance."""
    fit = model.fit(theta)
    loose = _inverse(fit.curve) * free[:, None, None]
    for (one, window), (values, inverse, follow) in zip(model.parts, fit.found, strict=True):
        covariance = inverse + follow @ loose @ follow.transpose(0, 2, 1)
        good, cover, beside = window.ivar > 0, {}, window.ivar > 0
        wanted: dict[str, tuple[list[int], float, float]] = {}
        for place, line in enumerate(one.lines):
            velocity, sigma = theta[:, 2 * line.component], theta[:, 2 * line.component + 1]
            for name, share in line.shares.items():
                drawn = window.profile(EMISSION[name], velocity, sigma)[0] * window.step
                title = f"broad {name}" if line.component else name
                cover[title] = (drawn * good).sum(axis=1)
                beside = beside & ((drawn < 1e-3) | (line.component > 0))
                wanted[title] = [place], share, EMISSION[name]
        if _PAIR[0] in cover:
            cover[OXYGEN] = np.minimum(*(cover[name] for name in _PAIR))
            wanted[OXYGEN] = [0, 1], 1.0, 0.5 * sum(EMISSION[name] for name in _PAIR)
        known = beside.sum(axis=1) >= _SIDE
        for title in wanted.keys() & set(LINES):
            places, share, wave = wanted[title]
            line, level = np.zeros((2, values.shape[1]))
            line[places], level[-2:] = share, (1.0, _across(one, wave))
            ok = known & (cover[title] >= _COVERED)
            _write(table, rows, LINES.index(title), ok, _numbers(values, covariance, line, level, stretch))
    return fit, loose


_PAIR: Final = ("[O II] 3727", "[O II] 3730")


def _write(table: LineTable, rows: Int64[np.ndarray, "n"], column: int, ok: Bool[np.ndarray, "n"], got: Any) -> None:
    into = table.flux, table.flux_error, table.width, table.width_error, table.continuum
    for kept, each in zip(into, got, strict=True):
        kept[rows, column] = np.where(ok, each, np.nan)


def _numbers(values: Any, covariance: Any, line: Any, level: Any, stretch: Any) -> tuple[Any, ...]:
    """Give flux and equivalent width of a sum of amplitudes, each with error, and the continuum."""
    flux, under = values @ line, values @ level
    spread, wobble = ((covariance @ each) @ each for each in (line, level))
    width = np.divide(flux, under, out=np.full_like(flux, np.nan), where=under > 0)
    scatter = spread + width**2 * wobble - 2 * width * ((covariance @ line) @ level)
    width_error = np.divide(np.sqrt(np.maximum(scatter, 0)), under, out=np.full_like(flux, np.nan), where=under > 0)
    return flux * stretch, np.sqrt(np.maximum(spread, 0)) * stretch, width, width_error, under


def _enter_motion(table: LineTable, rows: Any, theta: Any, fit: _Fit, loose: Any, freedom: Any, free: Any) -> None:
    """Write velocity, sigma and reduced chi-squared; those of the broad component, too, where there is one."""
    error = np.sqrt(np.maximum(np.diagonal(loose, axis1=1, axis2=2), 0))
    table.chi2[rows] = np.where(freedom > 0, fit.chi2 / np.maximum(freedom, 1), np.nan)
    into = [table.velocity, table.sigma, table.velocity_error, table.sigma_error]
    for kept, each in zip(into, (theta[:, 0], theta[:, 1], error[:, 0], error[:, 1]), strict=True):
        kept[rows] = np.where(free, each, np.nan)
    if theta.shape[1] > 2:
        table.broad_sigma[rows], table.broad_sigma_error[rows] = theta[:, 3], error[:, 3]


def _enter_broad(table: LineTable, spectra: Spectra, stretch: Any, starts: tuple[Any, ...]) -> None:
    """Try a broad component of the Balmer lines, and write the fit with it where it is clearly better.

    It is if chi-squared falls by more than 25 (times its reduced value, if that is above 1: what no continuum is
    straight enough for must not pass for a line), the redder line is positive by five errors, no line is negative by
    three, and sigma is between the bounds.
    """
    with_broad = _Model.of(spectra, COMPLEXES["broad"])
    if not with_broad.parts:
        return
    without, least = _Model.of(spectra, COMPLEXES["wide"]), np.full(len(spectra), np.inf)
    start, lowest = np.zeros((len(spectra), 4)), np.full(len(spectra), np.inf)
    for narrow in (*starts, np.full_like(starts[0], (0.0, _ASSUMED))):
        least = np.minimum(least, without.fit(narrow).chi2)
        for broad in (800.0, 1600.0, 3200.0):
            tried = np.column_stack([narrow, np.tile((0.0, broad), (len(spectra), 1))])
            chi2 = with_broad.fit(tried).chi2
            start = np.where((chi2 < lowest)[:, None], tried, start)
            lowest = np.minimum(lowest, chi2)
    rows = np.flatnonzero(least - lowest > _PREFERRED * np.maximum(lowest / _freedom(with_broad), 1.0))
    if not len(rows):
        return
    part, bounds = spectra[rows], (_NARROW, _BROAD)
    plain, rich = (_Model.of(part, COMPLEXES["other"] + COMPLEXES[kind]) for kind in ("wide", "broad"))
    least = plain.fit(plain.refine(start[rows, :2], bounds[:1])).chi2
    best = rich.refine(start[rows], bounds)
    fit = rich.fit(best)
    strength = _strength(rich, fit)
    balmer = strength[:, [line.component == 1 for one, _ in rich.parts for line in one.lines]]
    # What is not on a spectrum's pixels has a strength of exactly 0.
    redder = np.where(balmer[:, -1] != 0, balmer[:, -1], balmer[:, 0])
    bright = (redder > 5) & (balmer.min(axis=1) > -3) & _straight(rich, strength)
    drop = least - fit.chi2 > _PREFERRED * np.maximum(fit.chi2 / _freedom(rich), 1.0)
    taken = np.flatnonzero(drop & bright & (best[:, 3] > 1.01 * _BROAD[0][1]) & _inside(best[:, 2:], _BROAD))
    if len(taken):
        rich, best, into = rich[taken], best[taken], rows[taken]
        fit, loose = _enter(table, into, stretch[into], rich, best, np.ones(len(taken), bool))
        _enter_motion(table, into, best, fit, loose, _freedom(rich), _inside(best, _NARROW))
