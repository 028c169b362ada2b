"""What the members of each cluster have in common: peaks of their weights, stacks, properties, exposures, truth."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Float32, Float64, Int64, Shaped

from distspec.config import Experiment
from distspec.results.columns import exposure_columns
from distspec.results.truth import has_truth
from distspec.spectra.lines.wavelengths import ABSORPTION, EMISSION
from distspec.spectra.segments import run_around
from distspec.statistics.clustering import agreement_with, largest_groups
from distspec.statistics.summaries import Moments, row_median
from distspec.store import SpectraStore

__all__ = [
    "Peak",
    "axis_of",
    "concentrations",
    "counts_of",
    "mean_of",
    "moved",
    "number",
    "peaks",
    "plain",
    "planted",
    "quantiles",
    "stacks",
]

_MEDIAN: Final = 2_000
"""Members of a cluster whose median is taken."""

_CHUNK: Final = 1_024
"""Spectra that are read at a time."""

_QUANTILES: Final = (0.025, 0.16, 0.5, 0.84, 0.975)

_BINS: Final = 20

_PEAKS: Final = 5

_LOWEST: Final = 0.3

_HALF: Final = 0.5
"""Peaks of the mean weights that are told: how many, from which height on, and where each ends."""

_LINES: Final = 4
"""A peak over more lines than this is named after none: it is continuum."""


@dataclass(frozen=True)
class Peak:
    """Where the mean weights of a cluster are large.

    Arguments:
        low, high: where it has fallen to half of its height, Å.
        top: centre of its heaviest region, Å.
        value: its mean |weight|, 1 for that of the largest peak.
        signed: mean weight there, on the same scale: as large as `value` where all members agree on the sign.
        lines: names of those within it.
    """

    low: float
    high: float
    top: float
    value: float
    signed: float
    lines: tuple[str, ...]


def peaks(
    mean: Float64[np.ndarray, "regions"],
    signed: Float64[np.ndarray, "regions"],
    edges: Float64[np.ndarray, "regions+1"],
    rest: bool,
) -> list[Peak]:
    """Find the peaks of mean weights, the highest first; those below 0.3 are left out.

    Arguments:
        mean: |weights|, the largest of them 1.
        signed: weights on the same scale.
        edges: of the regions, Å.
        rest: whether these are wavelengths at rest, where lines have their names.
    """
    left = mean.copy()
    found: list[Peak] = []
    while len(found) < _PEAKS and left.max(initial=0.0) >= _LOWEST:
        top = int(left.argmax())
        start, stop = run_around(left > _HALF * left[top], top)
        low, high = float(edges[start]), float(edges[stop])
        middle = float((edges[top] + edges[top + 1]) / 2)
        lines = _lines(low, high) if rest else ()
        found.append(Peak(low, high, middle, float(mean[top]), float(signed[top]), lines))
        left[start:stop] = 0.0
    return found


def _lines(low: float, high: float) -> tuple[str, ...]:
    """Name the emission lines between two wavelengths at rest, else the absorption lines; of many none."""
    emitted, absorbed = ([name for name, wave in of.items() if low <= wave < high] for of in (EMISSION, ABSORPTION))
    names = emitted or absorbed
    return tuple(names) if len(names) <= _LINES else ()


def stacks(
    store: SpectraStore, rows: Int64[np.ndarray, "n"], labels: Int64[np.ndarray, "n"], told: int
) -> list[dict[str, Any]]:
    """Average the members of the first clusters over their good pixels, in one pass over the store."""
    pixels = store.grid.pixels
    moments = [Moments.zero(pixels) for _ in range(told)]
    kept: list[list[Float32[np.ndarray, "m pixels"]]] = [[] for _ in range(told)]
    sizes = np.bincount(labels[labels >= 0], minlength=told)
    # Members are in the order of their scores; the median is that of as many as allowed, evenly spaced among them.
    median = np.zeros(len(rows), bool)
    for label in range(told):
        members = np.flatnonzero(labels == label)
        median[members[np.unique(np.linspace(0, len(members) - 1, min(_MEDIAN, len(members))).astype(int))]] = True
    chosen = np.flatnonzero((labels >= 0) & (labels < told))
    chosen = chosen[np.argsort(rows[chosen], kind="stable")]
    for start in range(0, len(chosen), _CHUNK):
        part = chosen[start : start + _CHUNK]
        spectra = store.take(rows[part])
        good = spectra.ivar > 0
        for label in np.unique(labels[part]).tolist():
            mine = labels[part] == label
            moments[label] += Moments.of(spectra.flux[mine], good[mine])
            mine &= median[part]
            # NaN stands for what does not count: a good pixel holds a number.
            kept[label].append(np.where(good[mine], spectra.flux[mine], np.float32(np.nan)))
    described = []
    for label, (sums, parts) in enumerate(zip(moments, kept, strict=True)):
        values = np.concatenate(parts).T
        middle = row_median(values, ~np.isnan(values))
        mean = np.where(sums.weight > 0, sums.mean, np.nan)
        described.append(
            {"mean": plain(mean), "median": plain(middle), "of": int(sizes[label]), "median_of": values.shape[1]}
        )
    return described


def moved(own: Float64[np.ndarray, "m"], redshifts: Shaped[np.ndarray, "m"], frame: str) -> dict[str, Any] | None:
    """Tell where the heaviest regions of members lie in either frame: what keeps its place is of that frame.

    Returns:
        Quantiles over members of known redshift of the wavelengths, Å: on the store's grid, and in the other frame.
    """
    stretch = 1.0 + redshifts.astype(np.float64)
    known = np.isfinite(stretch) & (stretch > 0)
    if not known.any():
        return None
    here = own[known]
    there = here * stretch[known] if frame == "rest" else here / stretch[known]
    levels = [plain(np.quantile(waves, _QUANTILES), 8) for waves in (here, there)]
    return {"frame": "observed" if frame == "rest" else "rest", "own": levels[0], "quantiles": levels[1]}


def axis_of(values: Shaped[np.ndarray, "n"]) -> dict[str, Any]:
    """Give the bins that the histograms of a property share, and how all spectra lie in them."""
    known = values[np.isfinite(values)].astype(np.float64)
    low, high = np.quantile(known, (0.005, 0.995)).tolist() if len(known) else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - 0.5, high + 0.5
    axis = {"edges": plain(np.linspace(low, high, _BINS + 1), 9)}
    return axis | quantiles(values, axis)


def quantiles(values: Shaped[np.ndarray, "n"], axis: dict[str, Any]) -> dict[str, Any]:
    """Give quantiles and a histogram; what is beyond its ends is counted there."""
    known = values[np.isfinite(values)].astype(np.float64)
    edges = np.array(axis["edges"])
    counts = np.histogram(np.clip(known, edges[0], edges[-1]), edges)[0]
    levels = plain(np.quantile(known, _QUANTILES)) if len(known) else None
    return {"known": len(known), "quantiles": levels, "counts": counts.tolist()}


def counts_of(values: Shaped[np.ndarray, "n"]) -> dict[str, int]:
    names, counts = np.unique(values.astype(np.str_), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {str(names[place]): int(counts[place]) for place in order}


def concentrations(
    experiment: Experiment,
    store: SpectraStore,
    rows: Int64[np.ndarray, "n"],
    labels: Int64[np.ndarray, "n"],
    clusters: list[dict[str, Any]],
) -> dict[str, Any]:
    """Test each cluster for members of one exposure or part of the instrument, and tell it of each."""
    used: dict[tuple[str, ...], Shaped[np.ndarray, "n"]] = {}
    parted: set[bytes] = set()
    for columns in exposure_columns(experiment.compare, store):
        keys = _keys(store, columns, rows)
        names, first, place = np.unique(keys, return_index=True, return_inverse=True)
        # Numbered by first appearance, so that plates of one exposure each are not tested twice.
        parts = np.argsort(np.argsort(first))[place].tobytes()
        if 2 * int((keys != "").sum()) > len(rows) and (names != "").sum() > 1 and parts not in parted:
            used[columns] = keys
            parted.add(parts)
    tests = max(1, len(used) * len(clusters))
    for columns, keys in used.items():
        for one in largest_groups(labels, keys):
            if one.label is not None:
                told = asdict(one) | {"columns": list(columns), "p": min(1.0, one.p * tests)}
                clusters[one.cluster]["exposures"].append(told)
    for described in clusters:
        described["exposures"].sort(key=lambda one: (one["p"], one["columns"]))
    kinds = [{"columns": list(columns), "labels": len(np.unique(keys[keys != ""]))} for columns, keys in used.items()]
    return {"kinds": kinds, "tests": tests}


def _keys(store: SpectraStore, columns: Sequence[str], rows: Int64[np.ndarray, "n"]) -> Shaped[np.ndarray, "n"]:
    """Join columns to text such as "plate 266, mjd 51630"; empty where one of them is unknown."""
    keys, known = np.full(len(rows), "", np.str_), np.ones(len(rows), bool)
    for name in columns:
        values = store.column(name, rows)
        values = values if values.dtype.kind in "iufb" else values.astype(np.str_)
        # Sources write -1 in whole numbers and empty text where they know nothing.
        known &= values != -1 if values.dtype.kind == "i" else values != "" if values.dtype.kind == "U" else True
        text = np.char.add(f"{name} ", values.astype(np.str_))
        keys = np.char.add(np.char.add(keys, ", "), text) if name != columns[0] else text
    return np.where(known, keys, "")


def planted(store: SpectraStore, rows: Int64[np.ndarray, "n"], labels: Int64[np.ndarray, "n"]) -> dict[str, Any] | None:
    """Compare clusters with the kinds of planted anomalies, among all spectra and among planted ones alone."""
    if not has_truth(store):
        return None
    kinds = store.column("anomaly", rows).astype(np.str_)
    planted = np.flatnonzero(kinds != "")
    every, alone = agreement_with(labels, kinds).to_dict(), agreement_with(labels[planted], kinds[planted]).to_dict()
    # The table of all holds that of the planted ones.
    return {"all": every, "planted": {name: alone[name] for name in alone if name not in ("kinds", "table")}}


def mean_of(values: Float64[np.ndarray, "n"]) -> float | None:
    known = values[~np.isnan(values)]
    return number(float(known.mean())) if len(known) else None


def plain(values: Float64[np.ndarray, "n"], digits: int = 6) -> list[float | None]:
    return [number(value, digits) for value in values.tolist()]


def number(value: float, digits: int = 6) -> float | None:
    """Keep some significant digits; None for what is no number, which JSON has no word for."""
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None
