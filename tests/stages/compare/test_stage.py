"""The whole comparison against answers known by hand."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from distspec.config import Experiment
from distspec.errors import ConfigError, ShardError
from distspec.pipeline import Products
from distspec.results.scores import Scores
from distspec.stages.compare import stage
from distspec.stages.compare.stage import compare, compared_of
from distspec.store import Inventory, SpectraStore
from tests.support.small import small
from tests.support.surveys import make_layer, make_survey, write_rows

ROWS = 3_000
ASIDE = np.arange(ROWS) % 60 == 11
KNOWN = np.flatnonzero(~ASIDE)

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database of runs for all tests here: it takes seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('runs') / 'mlflow.db'}"


@pytest.fixture
def experiment(tmp_path: Path, tracked: str) -> Experiment:
    return small(tmp_path / "out", tracking={"uri": tracked}, compare={"top": 300, "sizes": [50, 100, 300, 2_000]})


@pytest.fixture
def columns(rng: np.random.Generator) -> dict[str, np.ndarray]:
    plate = rng.integers(260, 290, ROWS)
    return {
        "snr": rng.lognormal(2.0, 0.5, ROWS).astype(np.float32),
        "z": rng.random(ROWS),
        "plate": plate,
        "mjd": 51_600 + plate % 4,
        "status": np.where(ASIDE, 2, 0).astype(np.int32),
    }


def values(rng: np.random.Generator) -> np.ndarray:
    return np.where(ASIDE, np.nan, rng.lognormal(0.0, 1.0, ROWS)).astype(np.float32)


def with_scores(store: SpectraStore, **scores: np.ndarray) -> Scores:
    """Put chi2 and mse into the layer of a model and each other score into one of a detector."""
    model = {name: scores[name] for name in ("chi2", "mse") if name in scores}
    layers = [make_layer(store, "score-x", model, scores=list(model))] if model else []
    for name, column in scores.items():
        if name not in model:
            fields = {name: column, f"{name}_mixture": -column}
            layers.append(make_layer(store, f"detect-{name}", fields, scores=list(fields), detector="abc"))
    return Scores(layers)


@pytest.mark.slow
def test_identical_lists_share_all_and_tell_of_no_more(
    experiment: Experiment, tmp_path: Path, columns: dict[str, np.ndarray], rng: np.random.Generator
) -> None:
    store, same = make_survey(tmp_path, columns), values(rng)
    found = compare(experiment, store, with_scores(store, chi2=same, mse=2 * same)).content
    assert found["names"] == ["chi2", "mse"]
    assert (found["spectra"], found["scored"]) == (ROWS, len(KNOWN))
    (pair,) = found["pairs"]
    assert (pair["shared"], pair["n"]) == (300, 300)
    assert (found["joint"]["distinct"], found["joint"]["pairs"]["n"]) == (300, 300)
    assert [point["g"] for point in found["curve"]] == [50, 100, 300]
    assert all(point["overlaps"] == [[point["g"]] * 2] * 2 for point in found["curve"])
    assert found["left_out"] == [2_000]  # more than half of the survey


@pytest.mark.slow
def test_independent_scores_tell_of_the_whole_survey(
    experiment: Experiment, tmp_path: Path, columns: dict[str, np.ndarray], rng: np.random.Generator
) -> None:
    store = make_survey(tmp_path, columns)
    scores = with_scores(store, **{name: values(rng) for name in ("mse", "pca", "forest", "isolation", "fisher")})
    found = compare(experiment, store, scores)
    n = found.content["joint"]["pairs"]
    assert n["within95"][0] <= len(KNOWN) <= n["within95"][1]
    assert n["n"] > 0.85 * len(KNOWN)
    assert found.content["groups"]["found"] == []
    assert min(test["corrected"] for test in found.content["bias"]["tests"]) > 0.01
    # Variants of a detector are not compared unless they are named.
    assert found.content["names"] == ["mse", "pca", "forest", "isolation", "fisher"]
    with open(found.folder / "overlaps.csv", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == 10 * 3
    of = {(pair["first"], pair["second"]): pair["shared"] for pair in found.content["pairs"]}
    assert {(line["first"], line["second"]): int(line["shared"]) for line in table if line["g"] == "300"} == of
    tops = {name: set(np.argsort(-np.nan_to_num(scores.read(name, 0, ROWS)))[:300]) for name in found.content["names"]}
    assert of == {pair: len(tops[pair[0]] & tops[pair[1]]) for pair in of}


def test_what_scores_lean_towards_is_told(
    experiment: Experiment, tmp_path: Path, columns: dict[str, np.ndarray], rng: np.random.Generator
) -> None:
    store = make_survey(tmp_path, columns)
    glow = values(rng)
    there = KNOWN[columns["plate"][KNOWN] == 270]
    glow[there] += 20
    faint = np.where(ASIDE, np.nan, -columns["snr"])
    found = compare(experiment, store, with_scores(store, mse=values(rng), faint=faint, glow=glow))
    tests = found.content["bias"]["tests"]
    leaning = {(test["score"], test["property"]): test for test in tests if test["corrected"] < 1e-3}
    assert set(leaning) == {("faint", "snr"), ("glow", "plate"), ("glow", "mjd")}
    assert leaning["faint", "snr"]["mean"] < 0.03
    (group,) = found.content["groups"]["found"]
    assert group["label"] == "plate 270, mjd 51602"
    assert [one["score"] for one in group["lists"]] == ["glow"]
    assert group["members"] == group["spectra"] == len(there)
    with open(found.folder / "groups.csv", newline="") as stream:
        table = list(csv.DictReader(stream))
    # Ids have more digits than a float keeps.
    assert [line["id"] for line in table] == [str(2**60 + 1 + row) for row in there]
    assert {line["scores"] for line in table} == {"glow"}
    assert '"1152921504606' in (found.folder / "groups.csv").read_text()


def test_ensembles_are_ranks_joined(
    experiment: Experiment, tmp_path: Path, columns: dict[str, np.ndarray], rng: np.random.Generator
) -> None:
    store = make_survey(tmp_path, columns)
    made = {"mse": values(rng), "pca": np.round(values(rng), 1), "forest": -values(rng)}  # ties, and negative ones
    found = compare(experiment, store, with_scores(store, **made))
    assert found.ensembles is not None
    assert found.ensembles.name == found.content["ensembles"]
    assert found.ensembles.attributes["scores"] == ["rank_mean", "rank_union"]
    assert found.ensembles.attributes["of"] == found.content["names"]
    shares = np.array([stats.rankdata(-column[KNOWN]) / len(KNOWN) for column in made.values()])
    for name, expected in (("rank_mean", shares.mean(axis=0)), ("rank_union", shares.min(axis=0))):
        told = found.ensembles.read(name)
        assert np.isnan(told[ASIDE]).all()
        np.testing.assert_allclose(told[KNOWN], -np.log10(expected), rtol=1e-5, atol=1e-6)
    # They stand beside the other scores.
    assert Scores([*with_scores(store, **made).layers, found.ensembles]).names[-2:] == ["rank_mean", "rank_union"]


@pytest.mark.slow
def test_ensembles_of_large_surveys_rank_by_a_sample_and_all_of_the_top(
    experiment: Experiment,
    tmp_path: Path,
    columns: dict[str, np.ndarray],
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = {name: values(rng) for name in ("mse", "pca", "forest")}
    monkeypatch.setattr(stage, "_EXACT", 1_000)
    monkeypatch.setattr(stage, "_SAMPLE", 400)
    monkeypatch.setattr(stage, "_TOP", 200)
    told = []
    for number, shard_rows in enumerate((ROWS, 1_000)):
        store = make_survey(tmp_path / str(number), columns, shard_rows)
        other = experiment.model_copy(update={"output": str(tmp_path / f"out-{number}")})
        layer = compare(other, store, with_scores(store, **made)).ensembles
        assert layer is not None
        told.append(layer.read("rank_union"))
    np.testing.assert_array_equal(told[0], told[1])  # shards change no bit
    shares = np.array([stats.rankdata(-column[KNOWN]) / len(KNOWN) for column in made.values()]).min(axis=0)
    near = shares <= 200 / len(KNOWN)
    assert near.sum() > 300
    np.testing.assert_allclose(told[0][KNOWN][near], -np.log10(shares[near]), rtol=1e-5)
    np.testing.assert_allclose(10 ** -told[0][KNOWN], shares, atol=8 / len(KNOWN))  # every eighth is in the sample


@pytest.mark.slow
def test_shards_and_workers_change_nothing_at_all(
    experiment: Experiment,
    tmp_path: Path,
    columns: dict[str, np.ndarray],
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = {name: values(rng) for name in ("mse", "pca", "forest")}
    errors = {"mse": made["mse"], "rmse": np.sqrt(made["mse"]), "difference": made["mse"] - 1}
    found = []
    for number, shard_rows in enumerate((1_500, 1_000)):
        store = make_survey(tmp_path / str(number), columns, shard_rows)
        make_layer(store, "score-x", errors, scores=["mse"])
        detectors = with_scores(store, pca=made["pca"], forest=made["forest"]).layers
        scores = Scores([store.layer("score-x"), *detectors])
        other = experiment.model_copy(update={"output": str(tmp_path / f"out-{number}")})
        found.append(compare(other, store, scores))
        # The second time in workers.
        monkeypatch.setattr("distspec.stages.compare.stage._HERE", 0)
    first, second = found
    assert first.content["errors"]["spectra"] == len(KNOWN)
    for name in ("comparison.json", "overlaps.csv", "errors.csv", "groups.csv"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes(), name
    assert first.ensembles is not None and second.ensembles is not None
    np.testing.assert_array_equal(first.ensembles.read("rank_mean"), second.ensembles.read("rank_mean"))


def _state(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_done_twice_and_what_is_left_is_finished(
    experiment: Experiment,
    tmp_path: Path,
    columns: dict[str, np.ndarray],
    rng: np.random.Generator,
    tracked: str,
) -> None:
    store = make_survey(tmp_path, columns)
    scores = with_scores(store, mse=values(rng), pca=values(rng))
    assert compared_of(experiment, store, scores) is None
    first = compare(experiment, store, scores)
    before, runs = _state(tmp_path), Path(tracked.removeprefix("sqlite:///")).stat().st_mtime_ns
    again = compare(experiment, store, scores)
    opened = compared_of(experiment, store, scores)
    assert _state(tmp_path) == before
    assert Path(tracked.removeprefix("sqlite:///")).stat().st_mtime_ns == runs
    assert again.content == first.content
    assert opened is not None and opened.ensembles is not None and opened.content == first.content
    # A killed run may leave either without the other.
    assert first.ensembles is not None
    told = first.ensembles.read("rank_mean")
    first.ensembles.reopen(0)
    left = compared_of(experiment, store, scores)
    assert left is not None and left.ensembles is None
    layer = compare(experiment, store, scores).ensembles
    assert layer is not None
    np.testing.assert_array_equal(layer.read("rank_mean"), told)
    content = (first.folder / "comparison.json").read_text()
    shutil.rmtree(first.folder)
    compare(experiment, store, scores)
    assert (first.folder / "comparison.json").read_text() == content


@pytest.mark.slow
def test_a_grown_store_is_compared_anew(
    experiment: Experiment,
    tmp_path: Path,
    columns: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> None:
    store = make_survey(tmp_path, columns)
    made = {name: values(rng) for name in ("mse", "pca")}
    before = compare(experiment, store, with_scores(store, **made))
    store.extend(500, Inventory.empty())
    own = {"id": np.arange(ROWS, dtype=np.int64) + 2**60 + 1} | columns
    grown = {name: np.concatenate([column, column[:500]]) for name, column in own.items()}
    write_rows(store, grown)
    more = {name: np.concatenate([column, column[:500]]) for name, column in made.items()}
    scores = with_scores(store, **more)
    assert compared_of(experiment, store, scores) is None
    after = compare(experiment, store, scores)
    assert after.folder != before.folder and before.folder.is_dir()
    assert after.content["spectra"] == ROWS + 500
    assert after.ensembles is not None and before.ensembles is not None
    assert after.ensembles.name != before.ensembles.name
    # The ranks of the old rows are those among all.
    shares = [stats.rankdata(-column[~np.isnan(column)]) / (~np.isnan(column)).sum() for column in more.values()]
    told = after.ensembles.read("rank_union")
    np.testing.assert_allclose(told[~np.isnan(told)], -np.log10(np.min(shares, axis=0)), rtol=1e-5, atol=1e-6)


def test_other_settings_make_another_comparison_of_the_same_ensembles(
    experiment: Experiment, tmp_path: Path, columns: dict[str, np.ndarray], rng: np.random.Generator
) -> None:
    store = make_survey(tmp_path, columns)
    scores = with_scores(store, mse=values(rng), pca=values(rng), forest=values(rng))
    first = compare(experiment, store, scores)
    other = _with(experiment, top=200, properties=["z"])
    second = compare(other, store, scores)
    assert first.folder != second.folder
    assert (first.content["top"], second.content["top"]) == (300, 200)
    assert {test["property"] for test in second.content["bias"]["tests"]} == {"z"}
    assert first.content["ensembles"] == second.content["ensembles"]
    named = compare(_with(experiment, scores=["forest", "mse"]), store, scores)
    assert named.content["names"] == ["forest", "mse"]
    assert named.content["ensembles"] != first.content["ensembles"]


def _with(experiment: Experiment, **settings: Any) -> Experiment:
    """Give other compare settings; which scores there are is not checked again."""
    changed = experiment.compare.model_validate_json(json.dumps(experiment.compare.model_dump(mode="json") | settings))
    return experiment.model_copy(update={"compare": changed})


def test_what_cannot_be_compared_is_refused(
    experiment: Experiment, tmp_path: Path, columns: dict[str, np.ndarray], rng: np.random.Generator
) -> None:
    store = make_survey(tmp_path, columns)
    mse = values(rng)
    one = with_scores(store, mse=mse)
    with pytest.raises(ConfigError, match="scores to compare: mse; expected two or more"):
        compare(experiment, store, one)
    with pytest.raises(ConfigError, match="scores to compare: none; expected two or more"):
        compare(experiment, store, Scores([]))
    assert compared_of(experiment, store, one) is None and compared_of(experiment, store, Scores([])) is None
    with pytest.raises(ConfigError, match="compare.scores names 'pca'; there are mse: run the stage that makes it"):
        compare(_with(experiment, scores=["mse", "pca"]), store, one)
    two = with_scores(store, mse=mse, forest=values(rng))
    with pytest.raises(ConfigError, match="compare.properties names 'seeing'"):
        compare(_with(experiment, properties=["seeing"]), store, two)
    holes = values(rng)
    holes[1_234] = np.nan
    with pytest.raises(ShardError, match="row 1234 has only one of the scores mse and isolation"):
        compare(experiment, store, with_scores(store, mse=mse, isolation=holes))
    nothing = np.full(ROWS, np.nan)
    nothing[5] = 1.0
    with pytest.raises(ConfigError, match="1 spectra are scored; expected two or more"):
        compare(experiment, store, with_scores(store, pca=nothing, fisher=nothing))


def test_a_survey_of_two_spectra_is_compared(experiment: Experiment, tmp_path: Path) -> None:
    store = make_survey(tmp_path, {"snr": np.ones(2, np.float32)})
    found = compare(experiment, store, with_scores(store, mse=np.array([1.0, 2.0]), pca=np.array([2.0, 1.0]))).content
    assert found["top"] == 1
    (pair,) = found["pairs"]
    assert (pair["shared"], pair["n"]) == (0, None)
    assert found["joint"]["pairs"]["n"] is None
    assert found["bias"]["tests"] == []


def test_the_scores_of_a_whole_run_are_compared(done: tuple[Experiment, Products], tmp_path: Path) -> None:
    experiment, made = done
    assert made.scores is not None
    output = tmp_path / "out"
    shutil.copytree(experiment.output, output)
    experiment = experiment.model_copy(update={"output": str(output)})
    store = SpectraStore.open(output / "store.zarr", write=True)
    scores = Scores([store.layer(made.scores.name)])
    found = compare(experiment, store, scores)
    assert found.content["names"] == ["chi2", "mse"]
    rmse, difference, snr = (
        column.astype(np.float64)
        for column in (*(scores.layers[0].read(name) for name in ("rmse", "difference")), store.column("snr"))
    )
    known = ~np.isnan(rmse)
    told = found.content["errors"]
    assert told["statistics"]["mean"]["rmse"] == pytest.approx(rmse[known].mean())
    assert told["statistics"]["50 %"]["difference"] == pytest.approx(np.median(difference[known]), abs=1e-9)
    assert sum(part["spectra"] for part in told["snr_bins"]) == known.sum()
    with open(found.folder / "errors.csv", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == told["listed"] == told["beyond"]["either"] > 0
    rows = np.array([int(line["row"]) for line in table])
    assert [line["id"] for line in table] == [str(value) for value in store.column("id", rows)]
    np.testing.assert_allclose([float(line["rmse"]) for line in table], rmse[rows], rtol=1e-6)
    np.testing.assert_allclose([float(line["snr"]) for line in table], snr[rows], rtol=1e-6)
    assert [one["columns"] for one in found.content["groups"]["kinds"]] == [["file"]]
