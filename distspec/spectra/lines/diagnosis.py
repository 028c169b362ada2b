"""What lines, indices and an explanation suggest about an outlier, in words that are no more certain than the numbers.

References:
    Pettini & Pagel 2004, MNRAS 348, L59: O3N2.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Float64

from distspec.spectra import LIGHT_SPEED, WaveGrid
from distspec.spectra.lines.ratios import CASE_B, CLASSES, bpt, decrement
from distspec.spectra.lines.tables import OXYGEN, RATIOS, Indices, LineTable, Ratios
from distspec.spectra.lines.wavelengths import ABSORPTION, EMISSION

__all__ = ["Diagnosis", "Frames", "Region", "cluster_sentence", "frame_of_peaks", "regions", "sentence"]

_SKY: Final = {"5577": 5578.89, "6300": 6302.05, "6363": 6365.54}
"""Lines of the night sky by the names that they go by; vacuum Å, observed."""

_TELLURIC: Final = ((6860.0, 6950.0), (7590.0, 7720.0))
"""B and A band of oxygen, Å, observed."""

_NEAR: Final = 500.0
"""km/s, within which a line is named."""

_SHARE: Final = 0.25
"""Of the largest |weight| and of the heaviest region; what is below is no region."""

_LISTED: Final = 3
"""Regions that are named, and lines inside each."""


@dataclass(frozen=True)
class Frames:
    """How far peaks scatter in either frame.

    Arguments:
        rest, observed: scatter, 1.4826 times the median distance from the median, km/s.
        frame: "rest" or "observed", whichever agrees twice as well; "" where redshifts are too alike to tell.
        place: median of the peaks in that frame, Å; NaN where there is none.
    """

    rest: float
    observed: float
    frame: str
    place: float


def frame_of_peaks(peak_rest: Float64[np.ndarray, "n"], z: Float64[np.ndarray, "n"]) -> Frames:
    """Tell whether peaks (Å at rest) of spectra at redshifts z agree at rest, as lines do, or observed, as faults."""
    known = np.isfinite(peak_rest) & np.isfinite(z) & (peak_rest > 0) & (z > -1)
    if known.sum() < 5:
        return Frames(np.nan, np.nan, "", np.nan)
    stretch = np.log1p(z[known])
    rest = np.log(peak_rest[known])

    def scatter(values: Any) -> float:
        return float(1.4826 * LIGHT_SPEED * np.median(np.abs(values - np.median(values))))

    at_rest, observed, apart = scatter(rest), scatter(rest + stretch), scatter(stretch)
    low, high = sorted((at_rest, observed))
    told = apart > 2 * _NEAR and high > 2 * low
    frame = ("rest" if at_rest < observed else "observed") if told else ""
    place = np.exp(np.median(rest + stretch * (frame == "observed"))) if told else np.nan
    return Frames(at_rest, observed, frame, float(place))


@dataclass(frozen=True)
class Region:
    """Neighbouring pixels of large weight.

    Arguments:
        low, high: where it begins and ends, Å on the grid's axis.
        center: mean wavelength by |weight|, Å on the grid's axis.
        share: of the sum of |weight|.
        weight: sum of the weights, with its sign.
        lines: named lines in it or within 500 km/s of its centre, nearest first.
        doubts: why it may be an artefact: a line of the sky, a telluric band, an end of the grid or of the good pixels.
        break_: whether it overlaps the bands of Dn4000.
        observed: whether the grid's axis is that of the observer.
    """

    low: float
    high: float
    center: float
    share: float
    weight: float
    lines: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    break_: bool = False
    observed: bool = False

    @property
    def label(self) -> str:
        """Say where it is, what lies there, and what may be wrong with it."""
        places = [", ".join(self.lines)] if self.lines else ["the 4000 Å break"] if self.break_ else []
        at = f", at {places[0]}" if places else ""
        doubt = f"; {' and '.join(self.doubts)}: may be an artefact" if self.doubts else ""
        axis = "observed" if self.observed else "at rest"
        return f"{self.low:.0f}-{self.high:.0f} Å {axis} ({100 * self.share:.0f} % of the weight{at}{doubt})"


@dataclass(frozen=True)
class Diagnosis:
    """What may be said of a spectrum or of a cluster.

    Arguments:
        regions: heaviest first.
        findings: clauses, each with its numbers.
        text: all of it.
    """

    regions: tuple[Region, ...]
    findings: tuple[str, ...]
    text: str


def regions(
    weights: Float64[np.ndarray, "pixels"],
    grid: WaveGrid,
    redshift: float | None = None,
    z: float = np.nan,
    good: Bool[np.ndarray, "pixels"] | None = None,
) -> tuple[Region, ...]:
    """Find the one to three heaviest regions of an explanation, heaviest first; none where all weights are 0.

    A region is a run of pixels with the same sign and at least a quarter of the largest |weight|; runs less than 500
    km/s apart are one. A region with less than a quarter of the heaviest one's weight is left out.

    Arguments:
        weights: of the pixels; what is not finite counts as 0.
        redshift: of the lines on this grid; None for the rest frame. NaN names no line.
        z: redshift of the object, by which pixels in the rest frame are traced to the detector; NaN: not traced.
        good: pixels with data; none takes all.
    """
    weights = np.where(np.isfinite(weights), weights, 0.0).astype(np.float64)
    size, total = np.abs(weights), float(np.abs(weights).sum())
    if not 0 < total < np.inf:
        return ()
    large = (size >= _SHARE * size.max()) * np.sign(weights)
    starts = np.flatnonzero((large != 0) & (large != np.concatenate([[0], large[:-1]])))
    stops = np.flatnonzero((large != 0) & (large != np.concatenate([large[1:], [0]]))) + 1
    close = LIGHT_SPEED * np.log(grid.edges[starts[1:]] / grid.edges[stops[:-1]]) < _NEAR
    apart = ~(close & (large[starts[1:]] == large[starts[:-1]]))
    starts, stops = starts[np.concatenate([[True], apart])], stops[np.concatenate([apart, [True]])]
    bounds = np.stack([starts, stops], axis=1).ravel()
    padded = np.concatenate([[size, weights, size * grid.wave], np.zeros((3, 1))], axis=1)
    sums, signed, moment = np.add.reduceat(padded, bounds, axis=1)[:, ::2]
    order = np.argsort(-sums, kind="stable")[:_LISTED]
    seen = np.ones(grid.pixels, bool) if good is None else good
    found = []
    for k in order[sums[order] >= _SHARE * sums[order[0]]]:
        start, stop, center = int(starts[k]), int(stops[k]), float(moment[k] / sums[k])
        low, high = float(grid.edges[start]), float(grid.edges[stop])
        stretch = 1.0 if redshift is None else 1.0 + redshift
        broken = bool(low < 4100 * stretch and high > 3850 * stretch)
        doubts = _sky(low, high, center, 1.0 + z if redshift is None else 1.0) + _ends(start, stop, seen)
        lines = _lines(low / stretch, high / stretch, center / stretch)
        found.append(
            Region(
                low, high, center, float(sums[k]) / total, float(signed[k]), lines, doubts, broken, redshift is not None
            )
        )
    return tuple(found)


def _lines(low: float, high: float, center: float) -> tuple[str, ...]:
    """Name the lines between two wavelengths at rest or within 500 km/s of the centre, nearest first."""
    distance = {name: abs(np.log(wave / center)) * LIGHT_SPEED for name, wave in (EMISSION | ABSORPTION).items()}
    inside = {name for name, wave in (EMISSION | ABSORPTION).items() if low <= wave <= high}
    near = sorted((far, name) for name, far in distance.items() if far <= _NEAR or name in inside)
    return tuple(name for _, name in near[:_LISTED])


def _sky(low: float, high: float, center: float, stretch: float) -> tuple[str, ...]:
    """Say at which feature of the sky a region lies. A wide one must have its centre there, for it holds many."""
    if not np.isfinite(stretch):
        return ()
    low, high, center = low * stretch, high * stretch, center * stretch
    reach = (low, high) if LIGHT_SPEED * np.log(high / low) < 10 * _NEAR else (center, center)
    margin = _NEAR / LIGHT_SPEED
    near = (name for name, wave in _SKY.items() if reach[0] / (1 + margin) <= wave <= reach[1] * (1 + margin))
    found = [f"at the sky line {name}" for name in near]
    found += [f"in the telluric band {a:.0f}-{b:.0f} Å" for a, b in _TELLURIC if a <= center <= b]
    return tuple(found)


def _ends(start: int, stop: int, good: Bool[np.ndarray, "pixels"]) -> tuple[str, ...]:
    """Say whether a region touches an end of the grid or of the good pixels, or has none."""
    if not good[start:stop].any():
        return ("without a good pixel",)
    there = np.flatnonzero(good)
    if start == 0 or stop == len(good):
        return ("at the end of the grid",)
    return ("at the end of the good pixels",) if start <= there[0] + 1 or stop >= there[-1] else ()


def _pm(value: float, error: float, unit: str = "") -> str:
    """Write a number to the digits that its error leaves: one of the error, two if the first is 1."""
    digits = 0
    if 0 < error < np.inf:
        digits = max(0, -int(np.floor(np.log10(error))) + (f"{error:e}"[0] == "1"))
    return f"{value:,.{digits}f} ± {error:,.{digits}f}{unit and ' ' + unit}".replace("-", "−")


def _clear(value: Any, error: Any, least: float = 5.0) -> bool:
    return bool(np.isfinite(value) and error > 0 and abs(value) > least * error)


def _pointed(found: tuple[Region, ...]) -> set[str]:
    """Name the lines in regions; the pair of [O II] as one."""
    return {OXYGEN if name.startswith("[O II]") else name for region in found for name in region.lines}


def _line_findings(table: LineTable, lines: set[str], star: bool) -> list[str]:
    """Say what strong lines suggest, and how strong those are that lie in a region."""
    found = []
    for name in (name for name in table.names if not name.startswith("broad")):
        (width,), (error,) = table.width_of(name)
        extreme = _EXTREME.get(name, np.inf) < width
        absorbed = width < 0 and "[" not in name  # forbidden lines do not absorb
        if _clear(width, error) and (extreme or (name in lines and (width > 0 or absorbed))):
            note = ": extreme emission lines" if extreme else ": in absorption" if absorbed else ""
            found.append(f"EW({name}) = {_pm(width, error, 'Å')}{note}")
    if star:
        return found
    velocity, error = table.velocity[0], table.velocity_error[0]
    if _clear(velocity, error) and abs(velocity) > _OFFSET:
        found.append(f"lines offset by {_pm(velocity, error, 'km/s')}: redshift may be wrong")
    if np.isfinite(table.broad_sigma[0]):
        numbers = _pm(table.broad_sigma[0], table.broad_sigma_error[0], "km/s")
        found.append(f"broad Balmer lines (sigma {numbers}): possible view of a nucleus")
    return found


_EXTREME: Final = {"[O III] 5008": 100.0, "H alpha": 200.0, "Ly alpha": 200.0}
"""Equivalent widths (Å) from which on lines are called extreme."""

_STAR: Final = 0.002
"""Redshift below which a spectrum may be that of a star, of which nothing is said that is meant for galaxies."""

_OFFSET: Final = 300.0
"""km/s, from which on a redshift may be wrong."""


def _ratio_findings(table: LineTable, found: Ratios, lines: set[str]) -> list[str]:
    """Say what line ratios suggest. That a galaxy forms stars is said only where the explanation points at a line."""
    said, classes = [], bpt(found)
    name, probability = str(classes.names[0]), float(classes.probability[0])
    if name and (name != "star-forming" or lines & {x for pair in RATIOS.values() for x in pair}):
        (o3,), (o3_error,) = found.of("O3")
        (n2,), (n2_error,) = found.of("N2")
        numbers = [f"log [O III]/Hb = {_pm(o3, o3_error)}"]
        if np.isfinite(n2):
            numbers.insert(0, f"log [N II]/Ha = {_pm(n2, n2_error)}")
        like = {"Seyfert": "a Seyfert nucleus", "LINER": "a LINER", "AGN": "an active nucleus"}
        like |= {"composite": "a composite of stars and nucleus", "star-forming": "a star-forming galaxy"}
        sure = "" if probability > 0.9 else f"; within errors of the dividing line, {100 * probability:.0f} % sure"
        said.append(f"line ratios like those of {like[name]} ({', '.join(numbers)}{sure})")
    dust = decrement(table)
    (ratio,), (error,) = dust.ratio, dust.error
    if _clear(ratio - CASE_B, error, 3.0) and ratio > 4:
        said.append(f"Balmer decrement {_pm(ratio, error)}: E(B-V) about {dust.ebv[0]:.2f} ± {dust.ebv_error[0]:.2f}")
    elif _clear(ratio - CASE_B, error, 3.0) and ratio < CASE_B:
        said.append(f"Balmer decrement {_pm(ratio, error)}, below that without dust: possible fault of calibration")
    return said


def _index_findings(index: Indices, table: LineTable, at_break: bool, star: bool) -> list[str]:
    """Say what the break and H delta suggest about stars."""
    d4000, error = float(index.d4000[0]), float(index.d4000_error[0])
    h_delta, h_error = float(index.h_delta[0]), float(index.h_delta_error[0])
    numbers = f"Dn4000 = {_pm(d4000, error)}"
    if _clear(h_delta, h_error, 3.0) and h_delta > 5 and np.isfinite(d4000):
        (width,), (width_error,) = table.width_of("H alpha")
        quiet = width + 3 * width_error < 5
        what = "suggests young stars" if d4000 >= 1.4 else "may be past a burst" if quiet else "suggests a recent burst"
        what = "suggests a hot star" if star else what
        return [f"{numbers} and strong Hdelta absorption ({_pm(h_delta, h_error, 'Å')}): {what}"]
    if at_break and _clear(d4000, error):
        age = ": suggests old stars" if d4000 > 1.6 else ": suggests young stars" if d4000 < 1.3 else ""
        return [numbers + ("" if star else age)]
    return []


_NOTHING: Final = "No line or known region explains it."


def _compose(found: tuple[Region, ...], findings: list[str]) -> Diagnosis:
    """Put regions and findings into sentences."""
    parts = []
    if found:
        parts.append("The explanation points at " + "; at ".join(region.label for region in found) + ".")
    parts += [each[0].upper() + each[1:] + "." for each in findings]
    if not findings and not any(region.lines or region.doubts or region.break_ for region in found):
        parts.append(_NOTHING)
    return Diagnosis(found, tuple(findings), " ".join(parts))


def sentence(
    weights: Float64[np.ndarray, "pixels"],
    grid: WaveGrid,
    redshift: float | None,
    z: float,
    table: LineTable,
    index: Indices,
    found: Ratios,
    good: Bool[np.ndarray, "pixels"] | None = None,
) -> Diagnosis:
    """Say in words what the explanation of one spectrum points at, and what its lines suggest.

    Arguments:
        weights: of the pixels, by any method.
        grid: of the weights.
        redshift: of lines on the grid; None for the rest frame.
        z: redshift of the object, NaN where unknown.
        table, index, found: of this spectrum alone.
        good: pixels with data.

    Raises:
        ValueError: the tables are not those of one spectrum.
    """
    if not len(table) == len(index.d4000) == len(found.value) == 1:
        raise ValueError(f"tables of {len(table)}, {len(index.d4000)} and {len(found.value)} spectra; expected one")
    places = regions(weights, grid, redshift, z, good)
    lines, star = _pointed(places), abs(z) < _STAR
    findings = _line_findings(table, lines, star) + ([] if star else _ratio_findings(table, found, lines))
    findings += _index_findings(index, table, any(region.break_ for region in places), star)
    return _compose(places, findings)


def cluster_sentence(
    weights: Float64[np.ndarray, "pixels"],
    grid: WaveGrid,
    table: LineTable,
    index: Indices,
    found: Ratios,
    z: Float64[np.ndarray, "n"],
    peaks: Float64[np.ndarray, "n"] | None = None,
    rest: bool = True,
) -> Diagnosis:
    """Say in words what the members of a cluster have in common: medians, and the share for which each holds.

    Arguments:
        weights: mean over the members' explanations.
        grid: of the weights.
        table, index, found: of the n members.
        z: redshifts of the members.
        peaks: heaviest wavelength of each member's explanation, Å on the grid's axis.
        rest: whether the grid is in the rest frame. On an observed grid lines are named if members have one redshift.
    """
    known = z[np.isfinite(z)]
    middle, spread = (float(np.median(known)), float(np.ptp(known))) if len(known) else (np.nan, np.inf)
    alike = LIGHT_SPEED * spread < _NEAR * (1 + middle)
    places = regions(weights, grid, None if rest else middle if alike else np.nan, middle if alike else np.nan)
    findings = [] if peaks is None else _frame_findings(peaks if rest else peaks / (1 + z), z)
    return _compose(places, findings + _shares(table, index, found, _pointed(places)))


def _frame_findings(peaks: Float64[np.ndarray, "n"], z: Float64[np.ndarray, "n"]) -> list[str]:
    frames = frame_of_peaks(peaks, z)
    if frames.frame != "observed" or frames.observed > 2 * _NEAR:
        return []
    sky = "".join(f", {each}" for each in _sky(frames.place, frames.place, frames.place, 1.0))
    numbers = f"scatter {frames.observed:,.0f} km/s, {frames.rest:,.0f} km/s at rest"
    return [f"explanations agree at {frames.place:.0f} Å as observed ({numbers}){sky}: possible artefact"]


def _shares(table: LineTable, index: Indices, found: Ratios, lines: set[str]) -> list[str]:
    """Say how many members have which lines, class and indices, and the median and middle 68 % of the numbers."""
    count, said = len(table), []
    for name in table.names:
        width, error = table.width_of(name)
        has = np.isfinite(width) & (width > 5 * error) & (not name.startswith("broad"))
        if has.any() and (name in lines or np.median(width[has]) > _EXTREME.get(name, np.inf)):
            said.append(f"{has.sum()} of {count} members have {name} at > 5 sigma; {_middle('EW', width[has], 'Å')}")
    classes = bpt(found).names
    kinds = [(int((classes == kind).sum()), kind) for kind in CLASSES[1:] if (classes == kind).any()]
    if kinds:
        shares = ", ".join(f"{number} {kind}" for number, kind in sorted(kinds, key=lambda each: -each[0]))
        said.append(f"by line ratios, of {count} members: {shares}, {count - sum(n for n, _ in kinds)} unknown")
    broad = np.isfinite(table.broad_sigma)
    if broad.sum() > 0.1 * count:
        numbers = _middle("sigma", table.broad_sigma[broad], "km/s")
        said.append(f"{broad.sum()} of {count} have broad Balmer lines; {numbers}")
    off = (np.abs(table.velocity) > _OFFSET) & (np.abs(table.velocity) > 5 * table.velocity_error)
    if off.sum() > 0.1 * count:
        numbers = _middle("offset", table.velocity[off], "km/s")
        said.append(f"{off.sum()} of {count} have lines offset by > 300 km/s: redshifts may be wrong; {numbers}")
    strong = (index.h_delta > 5) & (index.h_delta > 3 * index.h_delta_error)
    if strong.sum() > 0.1 * count:
        numbers = _middle("index", index.h_delta[strong], "Å")
        said.append(f"{strong.sum()} of {count} have strong Hdelta absorption, which suggests young stars; {numbers}")
    return said


def _middle(name: str, values: Float64[np.ndarray, "n"], unit: str) -> str:
    """Write median and, of more than three, the middle 68 %, to three digits."""
    low, middle, high = np.quantile(values, (0.16, 0.5, 0.84))
    digits = max(0, 2 - int(np.floor(np.log10(abs(middle))))) if middle else 0
    unit = unit and " " + unit
    if len(values) < 4:
        # Of so few there is no distribution.
        return f"median {name} {middle:,.{digits}f}{unit}"
    return f"median {name} {middle:,.{digits}f}{unit}, 68 % within {low:,.{digits}f} to {high:,.{digits}f}{unit}"
