"""How good detectors are at planted anomalies: recall in top lists, area under the curve, strength at half recall.

Every planted spectrum is compared with one background, spectra of the same survey as they are. A measure is then a mean
over hosts, so that a bootstrap over hosts is one matrix product: counts of hosts times what each host contributes. The
same resampled hosts serve all detectors, kinds and strengths, which keeps their differences as sure as they are. The
background is kept as it is: intervals say what other hosts would give, against the same survey.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64

__all__ = [
    "ARTEFACTS",
    "CONFIDENCE",
    "TABLE",
    "Trials",
    "above",
    "chosen_level",
    "found",
    "group_means",
    "half_found",
    "host_means",
    "interval",
    "list_length",
    "pointed",
    "resampled",
    "rising",
    "strata",
    "stratified",
    "summarize",
    "table_rows",
    "tracked",
]

ARTEFACTS: Final = ("arm-step", "sky-residual", "cosmic-ray", "red-runaway", "calibration-step")
"""Kinds that the instrument or the reduction makes, not the sky."""

CONFIDENCE: Final = 0.95
"""Of all intervals, which are percentiles of the bootstrap."""

TABLE: Final = ("name", "kind", "measure", "level", "strength", "part", "value", "low", "high")
"""Columns of the table of all numbers."""

# Annotations below: what each host contributes, which hosts count, how often each is drawn, means of each replicate.
Each = Float[np.ndarray, "kinds hosts strengths detectors"]

Counted = Bool[np.ndarray, "kinds hosts strengths"]

Counts = Float64[np.ndarray, "replicates hosts"]

Means = Float64[np.ndarray, "replicates kinds strengths detectors"]


def list_length(background: int, level: float) -> int:
    """Give the length of the top list that holds this share of a survey; 0 where the survey is too small for one.

    Example:
        >>> list_length(1500, 0.001), list_length(300, 0.01), list_length(99, 0.01)
        (1, 3, 0)
    """
    # The product of a share and a whole number may lie a rounding error below a whole number.
    return int(np.floor(level * background + 1e-9))


def chosen_level(background: int, levels: Sequence[float]) -> float | None:
    """Choose the level of tables that show one: the middle, else the smallest above it that so few spectra allow.

    Example:
        >>> chosen_level(300, (0.001, 0.01, 0.05)), chosen_level(60, (0.001, 0.01, 0.05)), chosen_level(9, (0.05,))
        (0.01, 0.05, None)
    """
    ordered = sorted(levels)
    upward = ordered[(len(ordered) - 1) // 2 :]
    return next((level for level in upward if list_length(background, level)), None)


def above(
    planted: Float[np.ndarray, "*hosts detectors"], background: Float[np.ndarray, "n detectors"]
) -> Float64[np.ndarray, "*hosts detectors"]:
    """Give the share of the background that scores lower, ties by half; its mean is the area under the curve.

    A score that is NaN counts as lower than any other.

    References:
        Mann & Whitney 1947, Annals of Mathematical Statistics 18, 50; Hanley & McNeil 1982, Radiology 143, 29.
    """
    shares = np.empty(planted.shape)
    for index in range(background.shape[1]):
        known = np.sort(background[:, index])
        values = _ordered(planted[..., index])
        below = np.searchsorted(known, values, "left") + np.searchsorted(known, values, "right")
        shares[..., index] = below / (2.0 * len(known))
    return shares


def found(
    planted: Float[np.ndarray, "*hosts detectors"], background: Float[np.ndarray, "n detectors"], level: float
) -> Float64[np.ndarray, "*hosts detectors"]:
    """Give 1 where a planted spectrum would be among the top share of the background, 0 where not.

    It has to score higher than the last of the list as it is, so that a detector to which all are alike finds nothing.

    Returns:
        NaN everywhere where the background is too small to have such a list.
    """
    size = list_length(len(background), level)
    if not size:
        return np.full(planted.shape, np.nan)
    last = np.partition(background, len(background) - size, axis=0)[len(background) - size]
    return np.asarray(_ordered(planted) > last, dtype=np.float64)


def _ordered(scores: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Put NaN, which a sort takes for the largest, below all."""
    return np.where(np.isnan(scores), -np.inf, scores)


def resampled(hosts: int, replicates: int, seed: int) -> Counts:
    """Count how often each host is drawn in each resampling of the hosts; the first row is the sample itself."""
    rng = np.random.default_rng([seed, hosts, replicates])
    drawn = rng.multinomial(hosts, np.full(hosts, 1.0 / hosts), size=replicates)
    return np.concatenate([np.ones((1, hosts)), drawn.astype(np.float64)])


def host_means(each: Each, counted: Counted, counts: Counts) -> Means:
    """Average over the hosts that count, in every resampling; NaN where none does."""
    total = np.tensordot(counts, np.where(counted[..., None], each, 0.0), axes=(1, 1))
    number = np.tensordot(counts, counted.astype(np.float64), axes=(1, 1))[..., None]
    return np.where(number > 0, total / np.maximum(number, 1.0), np.nan)


def group_means(means: Means, groups: Sequence[Sequence[int]]) -> Means:
    """Average over the kinds of each group; kinds without a value are left out, NaN where none has one."""
    joined = []
    for group in groups:
        part = means[:, list(group)]
        known = ~np.isnan(part)
        number = known.sum(axis=1)
        joined.append(np.where(number > 0, np.where(known, part, 0.0).sum(axis=1) / np.maximum(number, 1), np.nan))
    return np.stack(joined, axis=1) if joined else means[:, :0]


def rising(values: Float64[np.ndarray, "*any strengths"]) -> Float64[np.ndarray, "*any strengths"]:
    """Fit the least-squares sequence that does not fall along the last axis (isotonic regression).

    By the formula max over j <= i of min over k >= i of mean(j..k), which all sequences share; they are short.

    Example:
        >>> rising(np.array([0.1, 0.5, 0.3, 0.9]))
        array([0.1, 0.4, 0.4, 0.9])

    References:
        Barlow, Bartholomew, Bremner & Brunk 1972, Statistical Inference under Order Restrictions, section 1.2.
    """
    size = values.shape[-1]
    sums = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)
    start, stop = np.arange(size)[:, None], np.arange(size)[None, :]
    mean = (sums[..., stop + 1] - sums[..., start]) / np.maximum(stop - start + 1, 1)
    # For each start the smallest mean that reaches so far or farther, then the largest of those that start before.
    mean = np.where(stop >= start, mean, np.inf)
    least = np.minimum.accumulate(mean[..., ::-1], axis=-1)[..., ::-1]
    least = np.where(stop >= start, least, -np.inf)
    return np.asarray(least.max(axis=-2))


def half_found(
    recall: Float64[np.ndarray, "*any strengths"], strengths: Float64[np.ndarray, "strengths"]
) -> Float64[np.ndarray, "*any"]:
    """Give the strength at which half are found: linear in the logarithm of the strength, along a rising recall.

    Arguments:
        recall: at each strength.
        strengths: from the smallest to the largest.

    Returns:
        0 where half are found at the smallest strength already, infinity where not even at the largest, NaN where the
        recall is not known.
    """
    known = ~np.isnan(recall).any(axis=-1)
    curve = rising(np.where(known[..., None], recall, 0.0))
    # A half that is summed up and divided may lie a rounding error below a half.
    reached = curve >= 0.5 - 1e-12
    right = np.maximum(reached.argmax(axis=-1), 1)
    right = np.minimum(right, len(strengths) - 1)
    left = np.maximum(right - 1, 0)
    low, high = (np.take_along_axis(curve, at[..., None], axis=-1)[..., 0] for at in (left, right))
    part = np.clip((0.5 - low) / np.where(high > low, high - low, 1.0), 0.0, 1.0)
    logs = np.log(strengths)
    within = np.exp(logs[left] + part * (logs[right] - logs[left]))
    strength = np.where(reached[..., 0], 0.0, np.where(reached[..., -1], within, np.inf))
    return np.where(known, strength, np.nan)


def interval(replicates: Float64[np.ndarray, "replicates *any"]) -> Float64[np.ndarray, "3 *any"]:
    """Give value, lower and upper end of the interval; a replicate without a value is left out, NaN where none has one.

    Ends are values of replicates themselves, not means of two of them, so that they may be infinite.
    """
    value, drawn = replicates[0], np.sort(replicates[1:], axis=0)  # NaN to the end
    number = (~np.isnan(drawn)).sum(axis=0)
    ends = []
    for share in ((1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0):
        place = np.clip(np.ceil(share * number).astype(np.int64) - 1, 0, max(len(drawn) - 1, 0))
        end = np.take_along_axis(drawn, place[None], axis=0)[0]
        ends.append(np.where(np.isnan(value), np.nan, end))
    return np.stack([value, *ends])


def strata(values: Float[np.ndarray, "hosts"], parts: int) -> list[Int64[np.ndarray, "m"]]:
    """Part hosts by a property into parts of equal number, as far as that goes; those without a value are in none."""
    known = np.flatnonzero(np.isfinite(values))
    ordered = known[np.argsort(values[known], kind="stable")]
    return [part.astype(np.int64) for part in np.array_split(ordered, parts) if len(part)]


# --- tables -----------------------------------------------------------------------------------------------------------

Groups = Mapping[str, Sequence[str]]
"""Names of groups and their kinds."""


@dataclass(frozen=True, eq=False)
class Trials:
    """Scores of all that was planted.

    Arguments:
        kinds: their names.
        detectors: names of the scores.
        strengths: from the smallest to the largest.
        reference: place of the strength of tables that show one.
        scores: of each kind, host and strength by each detector.
        possible: False where a kind cannot be planted in a host; such a host counts nowhere.
        background: scores of the survey's own spectra.
    """

    kinds: tuple[str, ...]
    detectors: tuple[str, ...]
    strengths: tuple[float, ...]
    reference: int
    scores: Float32[np.ndarray, "kinds hosts strengths detectors"]
    possible: Counted
    background: Float32[np.ndarray, "n detectors"]

    def members(self, groups: Groups) -> list[list[int]]:
        """Give the places of the kinds of each group."""
        return [[self.kinds.index(kind) for kind in kinds] for kinds in groups.values()]


def summarize(trials: Trials, groups: Groups, levels: Sequence[float], counts: Counts) -> dict[str, Any]:
    """Measure every detector on every kind and group at every strength.

    Arguments:
        trials: what was planted and how it was scored.
        groups: over whose kinds to average, each kind with the same weight.
        levels: shares of the survey that are looked at.
        counts: resampled hosts.

    Returns:
        Plain values: `listed`, the length of the top list at each level; `level` of tables that show one;
        `results[detector][kind or group]` with `recall[level]` and `auc`, each [value, low, high] for each strength,
        and `half`, the strength at which half are found at `level`: [value, low, high], each a number, "below" the
        smallest or "above" the largest strength; and for each group the `best` detector. None is what is not known.
    """
    size = len(trials.background)
    level = chosen_level(size, levels)
    means = {f"{one:g}": _means(trials, groups, found(trials.scores, trials.background, one), counts) for one in levels}
    means["auc"] = _means(trials, groups, above(trials.scores, trials.background), counts)
    tables = {key: _plain(interval(values)) for key, values in means.items()}
    half: list[Any] = [[None] * len(trials.detectors)] * (len(trials.kinds) + len(groups))
    if level is not None:
        strengths = np.asarray(trials.strengths)
        half = _plain(interval(half_found(np.moveaxis(means[f"{level:g}"], 2, 3), strengths)), zero="below")
    results: dict[str, Any] = {}
    for index, detector in enumerate(trials.detectors):
        results[detector] = {}
        for place, name in enumerate((*trials.kinds, *groups)):
            curves = {key: [row[index] for row in table[place]] for key, table in tables.items()}
            auc = curves.pop("auc")
            results[detector][name] = {"recall": curves, "auc": auc, "half": half[place][index] or [None] * 3}
    judged = means["auc" if level is None else f"{level:g}"][:, len(trials.kinds) :, trials.reference]
    best = {group: _best(trials.detectors, judged[:, place]) for place, group in enumerate(groups)}
    lists = {f"{one:g}": list_length(size, one) or None for one in levels}
    return {"listed": lists, "level": level, "results": results, "best": best}


def stratified(
    trials: Trials,
    groups: Groups,
    level: float | None,
    counts: Counts,
    properties: Mapping[str, Float[np.ndarray, "hosts"]],
    parts: int,
) -> list[dict[str, Any]]:
    """Measure at the reference strength on hosts of low to high S/N, redshift or another property.

    Returns:
        For each part the property that it is `by`, its `low` and `high` end, number of `hosts`, and
        `results[detector][kind or group]` with `recall` at the level and `auc`, each [value, low, high].
    """
    one = slice(trials.reference, trials.reference + 1)
    scores, possible = trials.scores[:, :, one], trials.possible[:, :, one]
    found_ = found(scores, trials.background, 0.0 if level is None else level)
    each = {"recall": found_, "auc": above(scores, trials.background)}
    told = []
    for by, values in properties.items():
        for hosts in strata(values, parts):
            tables = {}
            for key, value in each.items():
                means = host_means(value[:, hosts], possible[:, hosts], counts[:, hosts])
                means = np.concatenate([means, group_means(means, trials.members(groups))], axis=1)
                tables[key] = _plain(interval(means[:, :, 0]))
            results = {
                detector: {
                    name: {key: table[place][index] for key, table in tables.items()}
                    for place, name in enumerate((*trials.kinds, *groups))
                }
                for index, detector in enumerate(trials.detectors)
            }
            ends = [round(float(end), 6) for end in (values[hosts].min(), values[hosts].max())]
            told.append({"by": by, "low": ends[0], "high": ends[1], "hosts": len(hosts), "results": results})
    return told


def pointed(
    kinds: Sequence[str],
    groups: Groups,
    hits: Bool[np.ndarray, "kinds hosts"],
    chance: Float64[np.ndarray, "kinds hosts"],
    known: Bool[np.ndarray, "kinds hosts"],
    counts: Counts,
) -> dict[str, Any]:
    """Say how often an explainer points at what was planted, and how often it would by chance.

    Returns:
        For each kind and group `share` [value, low, high], `chance`, `hits` of the number `explained`.
    """
    both = np.stack([hits.astype(np.float64), chance], axis=-1)[:, :, None]
    means = host_means(both, known[:, :, None], counts)
    members = [[list(kinds).index(kind) for kind in group] for group in groups.values()]
    table = _plain(interval(np.concatenate([means, group_means(means, members)], axis=1)[:, :, 0]))
    told = {}
    places = [*([place] for place in range(len(kinds))), *members]
    for place, (name, chosen) in enumerate(zip((*kinds, *groups), places, strict=True)):
        number = {"hits": int((hits & known)[chosen].sum()), "explained": int(known[chosen].sum())}
        told[name] = {"share": table[place][0], "chance": table[place][1][0], **number}
    return told


def _means(trials: Trials, groups: Groups, each: Each, counts: Counts) -> Means:
    """Average over hosts for every kind, then over kinds for every group."""
    means = host_means(each, trials.possible, counts)
    return np.concatenate([means, group_means(means, trials.members(groups))], axis=1)


def _best(detectors: Sequence[str], replicates: Float64[np.ndarray, "replicates detectors"]) -> dict[str, Any] | None:
    """Name the best detector, and in what share of the resamplings none is better; None where nothing is known."""
    if np.isnan(replicates[0]).all():
        return None
    index = int(np.nanargmax(replicates[0]))
    drawn = replicates[1:][~np.isnan(replicates[1:, index])]
    leads = float((drawn[:, index] >= np.nanmax(drawn, axis=1)).mean()) if len(drawn) else None
    return {"detector": detectors[index], "value": _plain(interval(replicates[:, index])), "leads": leads}


def _plain(values: Float64[np.ndarray, "3 *any"], zero: Any = 0.0) -> Any:
    """Turn value, low and high along the first axis into lists of three along the last, in a file's few digits."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(one) for one in value]
        if np.isnan(value):
            return None
        return "above" if value == np.inf else round(value, 6) or zero

    return plain(np.moveaxis(values, 0, -1).tolist())


def tracked(facts: Mapping[str, Any]) -> dict[str, float]:
    """Give what is tracked: over all kinds, at the strength and level of tables that show one."""
    place = facts["strengths"].index(facts["strength"])
    found = {}
    for detector, results in facts["results"].items():
        if facts["level"] is not None:
            found[f"recall_{detector}"] = results["all"]["recall"][f"{facts['level']:g}"][place][0]
        found[f"auc_{detector}"] = results["all"]["auc"][place][0]
    found |= {f"pointing_{one['name']}": one["results"]["all"]["share"][0] for one in facts["pointing"]}
    return {name: value for name, value in found.items() if value is not None}


def table_rows(facts: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Give one line of cells, by `TABLE`, for each number; None is one that is not known."""
    smallest, largest = facts["strengths"][0], facts["strengths"][-1]

    def line(*keys: Any, triple: Sequence[Any]) -> tuple[Any, ...]:
        words = {"below": f"<{smallest:g}", "above": f">{largest:g}"}
        return (*keys, *(words.get(one, one) for one in triple))

    for name, kinds in facts["results"].items():
        for kind, found in kinds.items():
            for place, strength in enumerate(facts["strengths"]):
                for level, values in found["recall"].items():
                    yield line(name, kind, "recall", level, strength, "", triple=values[place])
                yield line(name, kind, "auc", "", strength, "", triple=found["auc"][place])
            yield line(name, kind, "half", facts["level"], "", "", triple=found["half"])
    for one in facts["strata"]:
        part = f"{one['by']} {one['low']:g} to {one['high']:g}"
        for name, kinds in one["results"].items():
            for kind, found in kinds.items():
                yield line(name, kind, "recall", facts["level"], facts["strength"], part, triple=found["recall"])
                yield line(name, kind, "auc", "", facts["strength"], part, triple=found["auc"])
    for pointer in facts["pointing"]:
        for kind, found in pointer["results"].items():
            yield line(pointer["name"], kind, "pointing", "", facts["strength"], "", triple=found["share"])
            yield line(pointer["name"], kind, "chance", "", facts["strength"], "", triple=[found["chance"], None, None])
