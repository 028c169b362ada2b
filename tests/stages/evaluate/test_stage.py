"""Planting into a store: nothing of it changes, hosts are held out, numbers are those of a plain computation."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from distspec.config import Experiment
from distspec.detectors.neural.scores import ModelScores
from distspec.errors import CheckpointError, ConfigError, StoreError
from distspec.pipeline import Products, run
from distspec.results.layout import evaluation_folder
from distspec.results.scores import Scores
from distspec.runtime.tracking import tracking_uri
from distspec.spectra import Spectra, WaveGrid
from distspec.stages.detect.stage import detect
from distspec.stages.evaluate import stage
from distspec.stages.evaluate.injection import inject
from distspec.stages.evaluate.stage import evaluate, evaluated_of
from distspec.stages.evaluate.workers import Injector, Job, Pointer
from distspec.stages.stage import Facts
from distspec.statistics.holdout import held_out
from distspec.store import Layer, SpectraStore
from tests.support.small import contents, small

KINDS = ("cosmic-ray", "extreme-lines", "wrong-redshift", "blend")
CHANGES: dict[str, Any] = {
    "detect": {"detectors": [{"kind": "pca", "components": 4}, {"kind": "isolation", "trees": 5}]},
    "evaluate": {
        "hosts": 12,
        "kinds": list(KINDS),
        "strengths": [2.0, 1.0, 0.5],
        "levels": [0.01, 0.1],
        "explained": 3,
        "bootstrap": 40,
    },
}


class Ready(NamedTuple):
    experiment: Experiment
    store: SpectraStore
    made: Products
    detected: dict[str, Layer]


def injector_of(ready: Ready) -> tuple[stage.Plan, Injector]:
    """A plan and what carries it out, in this process."""
    plan = stage._plan(ready.experiment, ready.store)
    places = stage._places(ready.experiment, ready.store, ready.detected)
    return plan, Injector(ready.store.path, plan, ready.experiment, ready.made.checkpoint.folder, places)


def like(experiment: Experiment, output: Path, **changes: Any) -> Experiment:
    """Give an experiment with another output and whole sections of settings changed."""
    tree = experiment.model_dump(mode="json") | {"output": str(output)} | changes
    return Experiment.model_validate_json(json.dumps(tree))


def test_ensembles_rank_planted_spectra_among_the_background() -> None:
    background = np.stack([np.arange(99, dtype=np.float32), np.arange(99, dtype=np.float32)[::-1]], axis=1)
    scores = np.array([[[[98.5, -5.0]], [[49.0, 49.0]], [[0.0, np.nan]]]], np.float32)
    possible = np.array([[[True], [True], [False]]])
    alone = stage.Trials(("a",), ("one", "two"), (1.0,), 0, scores, possible, background)
    trials = stage._with_ensembles(alone, ["one", "two"])
    assert trials.detectors == ("one", "two", "rank_mean", "rank_union")
    # The oddest by one and the least odd by the other; the middle by both; one that cannot be planted.
    mean, union = 10.0 ** -trials.scores[0, :, 0, 2:].T
    np.testing.assert_allclose(mean[:2], [(0.5 / 99 + 1.0) / 2, 50 / 99], rtol=1e-3)
    np.testing.assert_allclose(union[:2], [0.5 / 99, 50 / 99], rtol=1e-3)
    assert np.isnan(mean[2]) and np.isnan(union[2])
    np.testing.assert_allclose(10.0 ** -trials.background[:, 2], np.full(99, 50 / 99), rtol=1e-3)
    assert stage._with_ensembles(alone, ["one"]) is alone


@pytest.fixture(scope="module")
def ready(whole: tuple[Experiment, Products], tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """The survey with all there is in a model, in a place of its own, with two classical detectors beside the model."""
    output = tmp_path_factory.mktemp("evaluate") / "out"
    shutil.copytree(whole[0].output, output, ignore=shutil.ignore_patterns("mlflow.db*", "mlartifacts"))
    experiment = like(whole[0], output, **CHANGES)
    made = run(experiment, "score")
    store = SpectraStore.open(made.store.path, write=True)
    return Ready(experiment, store, made, detect(experiment, store))


@pytest.fixture(scope="module")
def evaluated(ready: Ready) -> tuple[Facts, dict[str, bytes], dict[str, bytes]]:
    """The evaluation, and all files of the store before and after it."""
    assert evaluated_of(ready.experiment, ready.store, ready.made.checkpoint, ready.detected) is None
    before = contents(Path(ready.store.path))
    found = evaluate(ready.experiment, ready.store, ready.made.checkpoint, ready.made.scores, ready.detected)
    return found, before, contents(Path(ready.store.path))


def test_nothing_of_the_store_is_changed(evaluated: tuple[Facts, dict[str, bytes], dict[str, bytes]]) -> None:
    _, before, after = evaluated
    assert before
    assert after == before


def test_every_detector_meets_every_kind(ready: Ready, evaluated: tuple[Facts, Any, Any]) -> None:
    found = evaluated[0]
    facts = found.content
    ensembles = ["rank_mean", "rank_union"]
    assert facts["detectors"] == [*Scores([ready.made.scores]).names, "pca", "isolation", *ensembles]
    assert facts["joined"] == ["chi2", "mse", "density", "pca", "isolation"]
    assert tuple(facts["kinds"]) == KINDS
    assert facts["strengths"] == [0.5, 1.0, 2.0]
    assert facts["strength"] == 1.0
    assert facts["groups"]["objects"] == ["extreme-lines", "blend"]
    assert facts["groups"]["artefacts"] == ["cosmic-ray"]
    assert facts["level"] == 0.1  # the middle of two is 0.01, which fewer than a hundred spectra cannot tell
    assert facts["listed"]["0.01"] is None
    for detector in facts["detectors"]:
        assert set(facts["results"][detector]) == {*KINDS, "all", "objects", "artefacts"}
        assert len({str(one) for one in facts["results"][detector]["wrong-redshift"]["auc"]}) == 1
    assert [part["by"] for part in facts["strata"]] == ["snr"] * 3 + ["z"] * 3
    assert sum(part["hosts"] for part in facts["strata"][:3]) == facts["hosts"] == 12
    assert [one["name"] for one in facts["pointing"]] == [
        "lime_density",
        "lime_chi2",
        "imo_density",
        "imo_chi2",
        "pca_region",
    ]
    assert all(one["results"]["cosmic-ray"]["explained"] == 3 for one in facts["pointing"])
    assert sorted(path.name for path in found.folder.iterdir()) == ["evaluation.csv", "evaluation.json"]
    assert json.loads((found.folder / "evaluation.json").read_text()) == facts


def test_numbers_are_those_of_a_plain_computation(ready: Ready, evaluated: tuple[Facts, Any, Any]) -> None:
    experiment, store, made, _ = ready
    facts = evaluated[0].content
    plan = stage._plan(experiment, store)
    usable = store.column("status") == 0
    validation = np.flatnonzero(usable & held_out(usable, experiment.train.validation, experiment.seed))
    assert facts["background"] == len(validation)
    hosts = store.take(plan.hosts, frozen=False)
    planted = inject(
        "extreme-lines", hosts, store.column("z", plan.hosts), 1.0, experiment.seed, experiment.ingest.prepare
    )
    assert planted.possible.all()
    scores = ModelScores(made.checkpoint, experiment.score)
    mine = scores(planted.spectra).scores[:, scores.names.index("relative")]
    background = made.scores.read("relative")[validation]
    told = facts["results"]["relative"]["extreme-lines"]
    truth = np.r_[np.ones(len(mine)), np.zeros(len(background))]
    assert told["auc"][1][0] == pytest.approx(roc_auc_score(truth, np.r_[mine, background]), abs=1e-5)
    last = np.sort(background)[-int(0.1 * len(background))]
    assert told["recall"]["0.1"][1][0] == pytest.approx((mine > last).mean(), abs=1e-5)


def test_strong_anomalies_are_found_and_seen_where_they_are(evaluated: tuple[Facts, Any, Any]) -> None:
    facts = evaluated[0].content
    assert facts["results"]["mse"]["cosmic-ray"]["auc"][2][0] > 0.9
    assert facts["results"]["pca"]["cosmic-ray"]["auc"][2][0] > 0.9
    assert facts["results"]["mse"]["extreme-lines"]["recall"]["0.1"][2][0] == 1.0
    told = {one["name"]: one["results"]["cosmic-ray"] for one in facts["pointing"]}
    assert told["pca_region"]["chance"] < 0.2
    assert told["pca_region"]["hits"] >= 2


def test_hosts_and_companions_are_held_out_of_every_fit(ready: Ready) -> None:
    experiment, store, *_ = ready
    plan = stage._plan(experiment, store)
    usable = store.column("status") == 0
    held = usable & held_out(usable, experiment.train.validation, experiment.seed)
    assert held[plan.hosts].all() and held[plan.companions].all()
    assert len(set(plan.hosts.tolist())) == len(plan.hosts) == 12
    assert (plan.hosts != plan.companions).all()
    more = experiment.model_copy(update={"evaluate": experiment.evaluate.model_copy(update={"hosts": 30})})
    wider = stage._plan(more, store)
    np.testing.assert_array_equal(wider.hosts[:12], plan.hosts)
    np.testing.assert_array_equal(wider.companions[:12], plan.companions)


@pytest.mark.parametrize("count", [2, 3, 7, 40, 201])
def test_a_companion_stands_some_places_away(rng: np.random.Generator, count: int) -> None:
    order = rng.permutation(count)
    others = stage._others(order, rng)
    place = np.argsort(order)
    away = np.abs(place[others] - place)
    assert away.min() >= max(1, int(0.05 * count))
    assert away.max() <= max(1, int(0.2 * count))
    assert stage._others(np.zeros(1, np.int64), rng).tolist() == [0]


def test_without_strength_scores_are_those_of_the_layers(ready: Ready) -> None:
    """Of a blend they are not, however faint: where nothing is known of the companion, pixels are masked."""
    plan, injector = injector_of(ready)
    for kind in ("cosmic-ray", "extreme-lines", "red-runaway"):
        seen, planted = injector._injected(Job(kind, 0, 12, False), 1e-9)
        assert planted.possible.all()
        table = Scores([ready.made.scores, *ready.detected.values()])
        known = np.stack([table.take(name, plan.hosts) for name in table.names], axis=1)
        np.testing.assert_allclose(injector._score(seen), known, rtol=2e-3)


@pytest.mark.slow
def test_what_the_sample_does_to_spectra_is_done_again(ray_session: None, tmp_path: Path) -> None:
    """Dropped wavelengths, a new norm, division by the mean: a change of no strength leaves what is read."""
    ingest = {
        "source": {"kind": "simulate", "spectra": 128, "anomalies": 0.0},
        "prepare": {
            "grid": {"scale": "log", "first": 3600.0, "last": 7400.0, "pixels": 240},
            "sample": {"missing_max": 0.1, "divide_by_mean": True, "impute": True},
        },
    }
    experiment = small(tmp_path / "out", ingest=ingest, evaluate={"hosts": 20}, train={"validation": 0.5})
    store = run(experiment, "ingest").store
    assert not store.statistics.is_identity
    plan = stage._plan(experiment, store)
    injector = Injector(store.path, plan, experiment, None, {})
    seen, _ = injector._injected(Job("red-runaway", 0, 20, False), 1e-9)
    known = store.take(plan.hosts)
    np.testing.assert_array_equal(seen.good, known.good)
    np.testing.assert_allclose(seen.flux, known.flux, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen.ivar, known.ivar, rtol=1e-3)


@pytest.mark.slow
def test_how_hosts_are_cut_into_parts_changes_no_score(ready: Ready) -> None:
    _, injector = injector_of(ready)
    _, whole = injector(Job("blend", 0, 12, False))
    parts = [injector(Job("blend", *span, False))[1] for span in ((0, 5), (5, 6), (6, 12))]
    np.testing.assert_allclose(np.concatenate([part["scores"] for part in parts]), whole["scores"], rtol=1e-4)
    np.testing.assert_array_equal(np.concatenate([part["possible"] for part in parts]), whole["possible"])


def test_a_second_call_does_nothing_and_the_evaluation_is_found_again(
    ready: Ready, evaluated: tuple[Facts, Any, Any]
) -> None:
    experiment, store, made, detected = ready
    path = evaluated[0].folder / "evaluation.json"
    stamp = path.stat().st_mtime_ns
    assert evaluate(experiment, store, made.checkpoint, made.scores, detected) == evaluated[0]
    assert path.stat().st_mtime_ns == stamp
    assert evaluated_of(experiment, store, made.checkpoint, detected) == evaluated[0]
    assert evaluated_of(experiment, store, None, detected) is None
    assert evaluated_of(experiment, store, None, {}) is None


@pytest.mark.slow
def test_any_number_of_workers_and_an_interruption_give_the_same_bytes(
    ready: Ready, evaluated: tuple[Facts, Any, Any], tmp_path: Path
) -> None:
    """Some parts are there, one is damaged, others are missing; one worker does the rest instead of two."""
    _, store, made, detected = ready
    folder = evaluated[0].folder
    before = contents(folder)
    experiment = like(ready.experiment, Path(ready.experiment.output), runtime={"workers": 1})
    plan, injector = injector_of(ready)
    jobs = stage._jobs(plan, 3)
    shutil.move(folder, tmp_path / "whole")
    for job in jobs[::2]:
        stage._write_part(folder / job.name, injector(job)[1])
    damaged = folder / jobs[0].name
    damaged.write_bytes(damaged.read_bytes()[:-30])
    evaluate(experiment, store, made.checkpoint, made.scores, detected)
    assert contents(folder) == before


@pytest.mark.slow
def test_parts_that_are_there_are_not_made_again(
    ready: Ready, evaluated: tuple[Facts, Any, Any], tmp_path: Path
) -> None:
    """Parts that say that everything is found are believed, all of them: no worker is started."""
    experiment, store, made, detected = ready
    folder = evaluated[0].folder
    shutil.move(folder, tmp_path / "whole")
    try:
        plan = stage._plan(experiment, store)
        for job in stage._jobs(plan, 3):
            size = job.stop - job.start
            part = {"scores": np.full((size, 3, 12), np.inf, np.float32), "possible": np.ones((size, 3), bool)}
            if job.explained:
                part = {"names": np.array([]), "regions": np.zeros(0, int), "known": np.ones(size, bool)}
                part |= dict.fromkeys(("hits", "chance"), np.zeros((0, size)))
            stage._write_part(folder / job.name, part)
        facts = evaluate(experiment, store, made.checkpoint, made.scores, detected).content
    finally:
        shutil.rmtree(folder)
        shutil.move(tmp_path / "whole", folder)
    assert facts["results"]["isolation"]["blend"]["recall"]["0.1"][0] == [1.0, 1.0, 1.0]
    assert facts["pointing"] == []
    assert any("not finite" in note for note in facts["notes"])


def test_runs_are_tracked(ready: Ready, evaluated: tuple[Facts, Any, Any]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(ready.experiment), tracking_uri(ready.experiment))
    found = client.get_experiment_by_name("whole")
    runs = client.search_runs([found.experiment_id], "tags.`distspec.stage` = 'evaluate'")
    told = runs[-1]
    assert told.info.status == "FINISHED"
    assert told.data.tags["distspec.model"] == ready.made.checkpoint.sha256
    expected = evaluated[0].content["results"]["pca"]["all"]
    assert told.data.metrics["auc_pca"] == pytest.approx(expected["auc"][1][0])
    assert told.data.metrics["recall_pca"] == pytest.approx(expected["recall"]["0.1"][1][0])
    assert "pointing_lime_chi2" in told.data.metrics
    names = {one.path for one in client.list_artifacts(told.info.run_id)}
    assert names == {"evaluation.json", "evaluation.png"}


def test_the_table_says_the_same(evaluated: tuple[Facts, Any, Any]) -> None:
    text = (evaluated[0].folder / "evaluation.csv").read_text("utf-8")
    lines = list(csv.DictReader(io.StringIO(text)))
    (line,) = [
        line
        for line in lines
        if [line[key] for key in ("name", "kind", "measure", "strength", "part")] == ["chi2", "blend", "auc", "2.0", ""]
    ]
    assert float(line["value"]) == evaluated[0].content["results"]["chi2"]["blend"]["auc"][2][0]


@pytest.mark.slow
def test_classical_detectors_need_no_model(ready: Ready) -> None:
    evaluate_ = {"hosts": 4, "kinds": ["red-runaway"], "explained": 0, "strengths": [1.0]}
    experiment = like(ready.experiment, Path(ready.experiment.output), evaluate=evaluate_)
    facts = evaluate(experiment, ready.store, None, None, ready.detected).content
    assert facts["detectors"] == ["pca", "isolation", "rank_mean", "rank_union"]
    assert facts["model"] is None
    assert facts["pointing"] == []
    assert evaluated_of(experiment, ready.store, None, ready.detected).content == facts


@pytest.mark.slow
def test_without_a_model_explainers_point_that_ask_none(ready: Ready) -> None:
    evaluate_ = {"hosts": 4, "kinds": ["red-runaway"], "explained": 2, "strengths": [1.0]}
    segments = {"kind": "uniform", "count": 20}
    methods = [
        {"kind": "lime", "samples": 60, "segments": segments},
        {"kind": "lime", "name": "scale", "samples": 60, "segments": segments, "perturbation": {"kind": "scale"}},
        {"kind": "occlusion", "stride": 16},
        {"kind": "occlusion", "name": "filled", "baseline": "reconstruction"},
        {"kind": "imo", "windows": [16], "baselines": 2},
    ]
    explain = {"scores": ["pca"], "methods": methods}
    experiment = like(ready.experiment, Path(ready.experiment.output), evaluate=evaluate_, explain=explain)
    facts = evaluate(experiment, ready.store, None, None, ready.detected).content
    assert [one["name"] for one in facts["pointing"]] == ["scale_pca", "occlusion_pca", "pca_region"]


def test_what_cannot_be_evaluated_is_refused_in_one_line(ready: Ready, tmp_path: Path) -> None:
    experiment, store, made, detected = ready
    with pytest.raises(ConfigError, match="no detector to evaluate"):
        evaluate(experiment, store, None, None, {})
    with pytest.raises(ConfigError, match="run `distspec score` first"):
        evaluate(experiment, store, made.checkpoint, None, detected)
    with pytest.raises(CheckpointError, match="is not of model"):
        evaluate(experiment, store, made.checkpoint, detected["pca"], {})
    unfinished = store.create_layer("detect-unfinished", {"pca": ("f4", ())}, {"scores": ["pca"]})
    with pytest.raises(StoreError, match="lacks 1 of 1 shards"):
        evaluate(experiment, store, None, None, {"pca": unfinished})


def test_a_file_of_another_schema_is_refused(ready: Ready) -> None:
    layers = list(ready.detected.values())
    folder = evaluation_folder(ready.experiment, ready.store.digest, layers)
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text('{"schema": 0}')
    try:
        with pytest.raises(CheckpointError, match="schema 0, expected 1"):
            evaluated_of(ready.experiment, ready.store, None, ready.detected)
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_named_model_may_have_seen_the_hosts(ready: Ready) -> None:
    score_ = {"checkpoint": ready.made.checkpoint.folder}
    named = like(ready.experiment, Path(ready.experiment.output), score=score_)
    plan = stage._plan(named, ready.store)
    shape = (len(plan.kinds), 2, 3, 1)
    trials = stage.Trials(
        plan.kinds,
        ("mse",),
        plan.strengths,
        1,
        np.zeros(shape, np.float32),
        np.ones(shape[:3], bool),
        np.zeros((9, 1), np.float32),
    )
    assert any("score.checkpoint" in note for note in stage._notes(named, ready.store, plan, trials))
    assert not any("score.checkpoint" in note for note in stage._notes(ready.experiment, ready.store, plan, trials))


def test_a_pointer_is_judged_by_what_its_region_overlaps() -> None:
    """Three regions of two pixels; planted in the second, in the second and third, and in the first."""
    covers = np.repeat(np.eye(3, dtype=bool), 2, axis=1)
    region = np.zeros((4, 6), bool)
    region[0, 2], region[1, 3:5], region[2, 0], region[3, 5] = True, True, True, True
    answers = np.array([1, 1, 2, -1])
    grid = WaveGrid.between("log", 4000.0, 5000.0, 6)
    spectra = Spectra(np.arange(4), np.ones((4, 6), np.float32), np.ones((4, 6), np.float32), grid)
    hits, chance = Pointer("x", covers, lambda seen: answers[seen.rows]).judge(spectra, region)
    assert hits.tolist() == [True, True, False, False]
    np.testing.assert_allclose(chance, [1 / 3, 2 / 3, 1 / 3, 1 / 3])
