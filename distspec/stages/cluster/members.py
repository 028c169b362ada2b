"""What the members of each cluster have in common: stacks, where their weights lie, properties, exposures, truth."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from jaxtyping import Float32, Float64, Int64, Shaped

from distspec.config import Experiment
from distspec.results.columns import kinds_of
from distspec.results.truth import has_truth
from distspec.statistics.clustering import agreement_with, concentration
from distspec.statistics.summaries import Moments, row_median
from distspec.store import SpectraStore

_MEDIAN: Final = 2_000
"""Members of a cluster whose median is taken."""

_CHUNK: Final = 1_024
"""Spectra that are read at a time."""

_QUANTILES: Final = (0.025, 0.16, 0.5, 0.84, 0.975)

_BINS: Final = 20


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
    quantiles = [plain(np.quantile(waves, _QUANTILES), 8) for waves in (here, there)]
    return {"frame": "observed" if frame == "rest" else "rest", "own": quantiles[0], "quantiles": quantiles[1]}


def axis_of(values: Shaped[np.ndarray, "n"]) -> dict[str, Any]:
    """Give the bins that the histograms of a property share, and how all spectra lie in them."""
    known = values[np.isfinite(values)].astype(np.float64)
    low, high = np.quantile(known, (0.005, 0.995)).tolist() if len(known) else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - 0.5, high + 0.5
    axis = {"edges": plain(np.linspace(low, high, _BINS + 1), 9)}
    return axis | spread(values, axis)


def spread(values: Shaped[np.ndarray, "n"], axis: dict[str, Any]) -> dict[str, Any]:
    """Give quantiles and a histogram; what is beyond its ends is counted there."""
    known = values[np.isfinite(values)].astype(np.float64)
    edges = np.array(axis["edges"])
    counts = np.histogram(np.clip(known, edges[0], edges[-1]), edges)[0]
    quantiles = plain(np.quantile(known, _QUANTILES)) if len(known) else None
    return {"known": len(known), "quantiles": quantiles, "counts": counts.tolist()}


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
    for columns in kinds_of(experiment.compare, store):
        keys = _keys(store, columns, rows)
        names, first, place = np.unique(keys, return_index=True, return_inverse=True)
        # Numbered by first appearance, so that plates of one exposure each are not tested twice.
        parts = np.argsort(np.argsort(first))[place].tobytes()
        if 2 * int((keys != "").sum()) > len(rows) and (names != "").sum() > 1 and parts not in parted:
            used[columns] = keys
            parted.add(parts)
    tests = max(1, len(used) * len(clusters))
    for columns, keys in used.items():
        for one in concentration(labels, keys):
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
