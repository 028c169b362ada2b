"""`distspec compare`: layers of scores -> how far they agree, what they lean towards, and ensembles of them.

Every detector returns another list (Reis et al.). From the scores of the model and of the classical detectors, two or
more of them, it makes

- overlaps: how many spectra every two top lists (`compare.top`) share, and from it, by the exact hypergeometric
  law, how many anomalies there are, with intervals: for every pair, for all together, and for lists of other
  lengths (`compare.sizes`);
- leanings: what each list prefers among S/N, redshift, magnitudes, plate, fibre and exposure, and groups that share an
  exposure, as artefacts do;
- ensembles: the scores `rank_mean` and `rank_union` over all that is compared, in a layer of their own;
- errors: the tables of Sharma et al. for all scored spectra: errors, thirds by S/N, histograms, and lists beyond
  `compare.errors.sigma` and `.rmse`.

Settings that one would change first:

    [compare]
    scores = ["chi2", "density", "pca", "forest"]
    top = 500
    exposures = ["plate", "mjd"]

None of `scores` takes chi2, mse, density and every classical detector that there is. `report.score=rank_mean` ranks
the page by an ensemble; an ensemble says nothing of a single changed spectrum, so it cannot be explained.

The folder that is printed holds `comparison.json`, and as tables overlaps.csv, errors.csv and groups.csv. A
comparison belongs to its scores: after a store has grown, or a detector was added, it is made anew in another folder.

In the code: all is counted shard by shard, and what is kept has the size of its answer: lists, the values of their
members, one count for each exposure. The mathematics stands in `statistics/overlap.py`, `significance.py` and
`ensembles.py`; `bias.py` and `errors.py` here read the store for it; ensembles are written by `workers.py`.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from jaxtyping import Float32, Int64

from distspec.addresses import Place
from distspec.config import ENSEMBLES, Experiment
from distspec.errors import ConfigError, ShardError
from distspec.files import csv_text, write_folder
from distspec.results import facts as on_disk
from distspec.results.columns import Columns, exposure_columns, property_columns
from distspec.results.layout import compare_folder, ensemble_folder, ensemble_layer
from distspec.results.scores import Fold, Scores, joined_scores, top_list, top_lists
from distspec.runtime.passes import folding
from distspec.runtime.threads import one_thread
from distspec.runtime.workers import map_items
from distspec.stages.compare.bias import Groups, find_groups, measure_bias
from distspec.stages.compare.errors import Residuals, measure_residuals
from distspec.stages.compare.section import content, figures
from distspec.stages.compare.workers import EnsembleScorer
from distspec.stages.stage import Comparison, Job, Products, Section, Stage, State, stage_run
from distspec.statistics.ensembles import SurvivalFunction
from distspec.statistics.overlap import ASSUMPTION, Joint, curve, estimate
from distspec.statistics.summaries import ByName, Histogram
from distspec.store import Layer, SpectraStore

__all__ = ["CompareStage", "compare", "compared_of"]

_EXACT: Final = 200_000
"""Spectra up to which ensembles rank by all values; of more, by a sample and all of the top."""

_HERE: Final = 1_000_000
"""Spectra up to which ensembles are made in this process."""

_SAMPLE: Final = 50_000

_TOP: Final = 10_000

_SURVIVORS: Final = "survivors.npz"


class CompareStage(Stage):
    """Scores -> how far detectors agree, how many anomalies that implies, what each leans towards; ensembles."""

    name, uses = "compare", ("ingest", "train", "score", "detect")

    def state(self, job: Job) -> State:
        """Look for the comparison of these scores and the layer of their ensembles."""
        found = compared_of(job.experiment, job.store, job.table)
        whole = found is not None and found.ensembles is not None
        return State(int(whole), 1, "comparisons", "" if whole else "these scores are not compared")

    def find(self, job: Job) -> Products:
        """Open the comparison of these scores."""
        if job.have.scores is None and not job.have.detected:
            return job.have
        return job.having(comparison=compared_of(job.experiment, job.store, job.table))

    def make(self, job: Job) -> Products:
        """Compare, or finish doing so."""
        return job.having(comparison=compare(job.experiment, job.store, job.table))

    def told(self, made: Products) -> Iterator[tuple[str, str]]:
        """Name the folder."""
        if made.comparison is not None:
            yield "compared", str(made.comparison.folder)

    def sections(self, job: Job) -> Iterator[Section]:
        """Show how far scores agree."""
        if job.have.comparison is not None:
            facts = job.have.comparison.content
            yield Section(
                "compare", "Agreement", "compare/section.html.jinja", {"compared": content(facts)}, figures(facts)
            )


@one_thread()
def compare(experiment: Experiment, store: SpectraStore, scores: Scores) -> Comparison:
    """Compare scores and join them to ensembles, or finish doing so.

    Arguments:
        experiment: with the compare settings.
        store: the spectra.
        scores: layer of the score stage, if there is one, and those of the classical detectors.

    Raises:
        ConfigError: there are fewer than two scores or spectra, or a named score or column cannot be used.
        ShardError: a spectrum has one score and lacks another.
    """
    chosen = _chosen(experiment, scores)
    properties, kinds = property_columns(experiment.compare, store), exposure_columns(experiment.compare, store)
    found = compared_of(experiment, store, scores)
    if found is not None and found.ensembles is not None:
        return found
    folder = _folder(experiment, store, scores, chosen)
    lineage = {"store": store.digest, "scores": ", ".join(chosen.key)}
    workers = store.rows > _HERE
    with stage_run(experiment, store, "compare", folder.name, lineage, workers=workers) as run:
        fold = folding(experiment.runtime, "compare")
        survey = _take_survey(chosen, fold)
        ensembles = _join(experiment, store, chosen, survey, fold)
        facts, files = _compared(experiment, store, scores, survey, (properties, kinds), fold)
        written = on_disk.write(folder, "comparison.json", facts, files)
        run.metrics(_metrics(facts))
        run.summary(facts, "comparison.json")
    return Comparison(folder, written.content, ensembles)


def compared_of(experiment: Experiment, store: SpectraStore, scores: Scores) -> Comparison | None:
    """Open the comparison of these scores, if there is one."""
    names = joined_scores(experiment.compare.scores, scores)
    if len(names) < 2 or not set(names) <= set(scores.names):
        return None
    chosen = scores.only(names)
    folder = _folder(experiment, store, scores, chosen)
    found = on_disk.find(folder, "comparison.json", None, "compare")
    if found is None:
        return None
    name = ensemble_layer(store.digest, chosen.layers, chosen.names)
    layer = store.layer(name) if name in store.layers() else None
    ensembles = None if layer is None or layer.pending() else layer
    return Comparison(folder, found.content, ensembles)


def _folder(experiment: Experiment, store: SpectraStore, scores: Scores, chosen: Scores) -> Place:
    model = _model(scores)
    layers = dict.fromkeys([*chosen.layers, *([model] if model else [])])
    return compare_folder(experiment, store.digest, list(layers), chosen.names)


def _model(scores: Scores) -> Layer | None:
    """Find the layer that tells the errors of reconstructions."""
    return next((layer for layer in scores.layers if {"rmse", "difference"} <= set(layer.fields)), None)


def _chosen(experiment: Experiment, scores: Scores) -> Scores:
    """Pick the scores that are compared.

    Raises:
        ConfigError: one is not there, or there are fewer than two.
        StoreError: one is not finished.
    """
    names = joined_scores(experiment.compare.scores, scores)
    for name in names:
        if name not in scores.names:
            there = ", ".join(scores.names) or "none"
            raise ConfigError(f"compare.scores names {name!r}; there are {there}: run the stage that makes it first")
    if len(names) < 2:
        raise ConfigError(
            f"scores to compare: {', '.join(names) or 'none'}; expected two or more: run `distspec score` and "
            "`distspec detect`, or name some in compare.scores"
        )
    chosen = scores.only(names)
    for layer in chosen.layers:
        layer.require_finished("run `distspec score` and `distspec detect` to finish them")
    return chosen


# --- lists -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Survey:
    """How many spectra are scored, by shard, and how each score is distributed."""

    scored: Int64[np.ndarray, "shards"]
    histograms: dict[str, Histogram]

    @property
    def total(self) -> int:
        return int(self.scored.sum())

    def __add__(self, other: "_Survey") -> "_Survey":
        return _Survey(np.concatenate([self.scored, other.scored]), ByName(self.histograms) + other.histograms)


def _take_survey(chosen: Scores, fold: Fold) -> _Survey:
    """Count what is scored.

    Raises:
        ShardError: a spectrum has one score and lacks another.
        ConfigError: fewer than two are scored.
    """
    survey = fold(_Counter, (chosen,), range(chosen.shards), "count scores")
    if survey is None or survey.total < 2:
        scored = 0 if survey is None else survey.total
        raise ConfigError(f"{scored} spectra are scored; expected two or more to compare lists of them")
    return cast(_Survey, survey)


class _Counter:
    """Counts the scores of a shard."""

    def __init__(self, chosen: Scores) -> None:
        self._chosen = chosen

    def __call__(self, shard: int) -> _Survey:
        names, known = self._chosen.names, None
        histograms = {}
        for name, values in zip(names, self._chosen.read_shard(shard, *names), strict=True):
            mine = ~np.isnan(values)
            known = mine if known is None else known
            odd = np.flatnonzero(mine != known)
            if odd.size:
                row = self._chosen.bounds(shard)[0] + int(odd[0])
                raise ShardError(f"row {row} has only one of the scores {names[0]} and {name}; score and detect again")
            histograms[name] = Histogram.of(values)
        return _Survey(np.array([0 if known is None else known.sum()], np.int64), histograms)


def _compared(
    experiment: Experiment,
    store: SpectraStore,
    scores: Scores,
    survey: _Survey,
    leanings: tuple[Sequence[str], Sequence[Columns]],
    fold: Fold,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Make the content of comparison.json, and the tables beside it."""
    settings, (properties, kinds) = experiment.compare, leanings
    chosen = scores.only(list(survey.histograms))
    most, wanted = survey.total // 2, sorted({settings.top, *settings.sizes})
    g, bias = min(settings.top, most), min(settings.bias, survey.total)
    sizes = sorted({g, *(size for size in wanted if size <= most)})
    tops = top_lists(chosen, dict.fromkeys(chosen.names, max(*sizes, bias)), survey.histograms, fold)
    joints = curve({name: top.rows for name, top in tops.items()}, sizes, survey.total)
    pairs = {size: _pairs(joint, survey.total) for size, joint in joints.items()}
    listed = {name: top.rows[:g] for name, top in tops.items()}
    groups = find_groups(store, chosen, listed, kinds, asked=bool(settings.exposures), fold=fold)
    leaning = {name: top.rows[:bias] for name, top in tops.items()}
    model = _model(scores)
    errors = None if model is None else measure_residuals(store, model, settings.errors, fold)
    facts = {
        "store": store.digest,
        "layers": list(chosen.key),
        "names": chosen.names,
        "spectra": store.rows,
        "scored": survey.total,
        "top": g,
        "left_out": [size for size in wanted if size > most],
        "assumption": ASSUMPTION,
        "pairs": pairs[g],
        "joint": joints[g].to_dict(),
        "curve": [{"g": size, **joint.to_dict()} for size, joint in joints.items()],
        "bias": {"top": bias, **measure_bias(store, chosen, leaning, properties, fold)},
        "groups": groups.to_dict(),
        "errors": None if errors is None else errors.facts,
        "ensembles": ensemble_layer(store.digest, chosen.layers, chosen.names),
    }
    table = [(size, *pair.values()) for size, found in pairs.items() for pair in found]
    header = ("g", "first", "second", "shared", "n", "low68", "high68", "low95", "high95", "chapman", "at_limit")
    return facts, {
        "overlaps.csv": csv_text(header, table).encode(),
        "groups.csv": _groups_csv(store, groups),
        "errors.csv": _errors_csv(store, errors),
    }


def _pairs(joint: Joint, most: int) -> list[dict[str, Any]]:
    """Estimate n from each pair of lists alone; at its limit it is all scored spectra and may as well be more."""
    found = []
    for first, second in zip(*np.triu_indices(len(joint.names), 1), strict=True):
        shared, g1, g2 = (int(joint.overlaps[pair]) for pair in ((first, second), (first, first), (second, second)))
        alone = estimate(shared, g1, g2, most)
        pair = {"first": joint.names[first], "second": joint.names[second], "shared": shared, "n": alone.n}
        pair |= dict(zip(("low68", "high68", "low95", "high95"), (*alone.within68, *alone.within95), strict=True))
        found.append(pair | {"chapman": alone.chapman, "at_limit": int(alone.n == most)})
    return found


def _metrics(facts: dict[str, Any]) -> dict[str, float]:
    """Choose the numbers that runs are compared by; what is unknown has no point."""
    pairs, mean = facts["joint"]["pairs"], facts["joint"]["mean"]
    implied = facts["top"] ** 2 / mean if mean else None
    told = {
        "n_joint": pairs["n"],
        "n_low": pairs["within68"][0],
        "n_high": pairs["within68"][1],
        "mean_overlap": facts["joint"]["mean"],
        "distinct": facts["joint"]["distinct"],
        # Fewer anomalies than distinct spectra listed: the lists do not draw from one pool, and n means little.
        "not_one_pool": implied is not None and implied < 0.95 * facts["joint"]["distinct"],
        "smallest_p": min((test["corrected"] for test in facts["bias"]["tests"]), default=None),
        "groups": len(facts["groups"]["found"]),
        "listed_errors": facts["errors"]["beyond"]["either"] if facts["errors"] else None,
    }
    return {name: float(value) for name, value in told.items() if value is not None}


# --- tables ----------------------------------------------------------------------------------------------------------


def _ids(store: SpectraStore, rows: Int64[np.ndarray, "m"]) -> list[str]:
    """Read ids as text: neither a browser nor a spreadsheet keeps the digits of a large number."""
    return [str(value) for value in store.column("id", rows)]


def _groups_csv(store: SpectraStore, groups: Groups) -> bytes:
    """List the members of all groups, and the scores whose lists hold them."""
    header = ("columns", "label", "p", "row", "id", "scores")
    table: list[tuple[Any, ...]] = []
    for group in groups.found:
        for row, name in zip(group.rows.tolist(), _ids(store, group.rows), strict=True):
            scores = ", ".join(held.score for held in group.holdings if row in held.rows)
            table.append((", ".join(group.columns), group.label, group.p, row, name, scores))
    return csv_text(header, table).encode()


def _errors_csv(store: SpectraStore, errors: Residuals | None) -> bytes:
    """List the spectra beyond either cut on errors; only the header where there are none."""
    header = ("row", "id", "rmse", "difference", "sigmas", "snr")
    if errors is None:
        return csv_text(header, []).encode()
    ids, sigmas = _ids(store, errors.rows), errors.sigmas.round(3)
    columns = (errors.rows, ids, errors.rmse, errors.difference, sigmas, errors.snr)
    return csv_text(header, zip(*columns, strict=True)).encode()


# --- ensembles -------------------------------------------------------------------------------------------------------


def _join(experiment: Experiment, store: SpectraStore, chosen: Scores, survey: _Survey, fold: Fold) -> Layer:
    """Write the layer of the ensembles, or what is left of it."""
    name = ensemble_layer(store.digest, chosen.layers, chosen.names)
    attributes = {"scores": list(ENSEMBLES), "of": chosen.names, "layers": list(chosen.key)}
    layer = store.create_layer(name, dict.fromkeys(ENSEMBLES, ("f4", ())), attributes)
    pending = layer.pending()
    if not pending:
        return layer
    folder = ensemble_folder(experiment, name)
    if not (folder / _SURVIVORS).is_file():
        arrays: dict[str, Any] = {}
        for score in chosen.names:
            found = _distribution(chosen, score, survey, fold)
            arrays |= {f"{score}.edges": found.edges, f"{score}.counts": found.counts}
        stream = io.BytesIO()
        np.savez_compressed(stream, **arrays)
        write_folder(folder, {_SURVIVORS: stream.getvalue()})
    places = {score: chosen.layer(score).name for score in chosen.names}
    arguments = (store.address, folder / _SURVIVORS, name, places)
    here, needs = store.rows <= _HERE, experiment.runtime.needs("compare")
    for _ in map_items(EnsembleScorer, arguments, pending, experiment.runtime, "compare", needs=needs, here=here):
        pass
    return layer


def _distribution(chosen: Scores, name: str, survey: _Survey, fold: Fold) -> SurvivalFunction:
    """Count a score at its values: all of a small survey, else those of every so many-th spectrum and of the top."""
    total = survey.total
    step = 1 if total <= _EXACT else -(-total // _SAMPLE)
    first = np.concatenate([[0], survey.scored.cumsum()[:-1]])
    shards = range(chosen.shards)
    sample = fold(_Thinned, (chosen, name, first, step), shards, "sample scores").values
    if step > 1:
        sample = np.append(sample, top_list(chosen, name, _TOP, survey.histograms[name], fold).scores)
    return cast(SurvivalFunction, fold(_Survivors, (chosen, name, np.unique(sample)), shards, "count scores"))


@dataclass(frozen=True, eq=False)
class _Sample:
    values: Float32[np.ndarray, "n"]

    def __add__(self, other: "_Sample") -> "_Sample":
        return _Sample(np.concatenate([self.values, other.values]))


class _Thinned:
    """Takes every so many-th score of a shard, by the spectrum's number among all scored ones."""

    def __init__(self, chosen: Scores, name: str, first: Int64[np.ndarray, "shards"], step: int) -> None:
        self._chosen, self._name, self._first, self._step = chosen, name, first, step

    def __call__(self, shard: int) -> _Sample:
        # By that number: where shards begin changes nothing.
        return _Sample(_known_values(self._chosen, self._name, shard)[-self._first[shard] % self._step :: self._step])


class _Survivors:
    """Counts the scores of a shard at and between the edges of their distribution."""

    def __init__(self, chosen: Scores, name: str, edges: Float32[np.ndarray, "edges"]) -> None:
        self._chosen, self._name, self._edges = chosen, name, edges

    def __call__(self, shard: int) -> SurvivalFunction:
        return SurvivalFunction.count(self._edges, np.sort(_known_values(self._chosen, self._name, shard)))


def _known_values(chosen: Scores, name: str, shard: int) -> Float32[np.ndarray, "n"]:
    (values,) = chosen.read_shard(shard, name)
    return np.asarray(values[~np.isnan(values)])
