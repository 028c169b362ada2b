"""Clusters of a small survey whose groups are planted: files, averages, and what is done only once."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from distspec.config import Experiment
from distspec.errors import CheckpointError, ConfigError, StoreError
from distspec.spectra import Spectra, WaveGrid
from distspec.stages.cluster import stage
from distspec.stages.cluster.stage import cluster, clustered_of
from distspec.store import Layer, SpectraStore, StoreSpec, field_of
from tests.conftest import make_spectra, make_store
from tests.support.small import contents

ROWS, SEGMENTS = 40, 15
SCORES = ("mse", "chi2")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database of runs for all tests here: it takes seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('runs') / 'mlflow.db'}"


def settings(folder: Path, tracked: str, **changes: Any) -> Experiment:
    tree = {"name": "test", "output": str(folder / "out"), "tracking": {"uri": tracked}, "cluster": changes}
    tree["explain"] = {"scores": list(SCORES), "methods": [{"kind": "lime"}, {"kind": "occlusion"}]}
    return Experiment.model_validate_json(json.dumps(tree))


def make_weights(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Plant three groups in the weights of the rows of a store: 12, 9 and 6 of them, alternating signs in the last."""
    groups = rng.permutation(np.repeat(np.arange(3), (12, 9, 6)))
    weights = 0.03 * rng.normal(size=(len(groups), SEGMENTS))
    weights[np.arange(len(groups)), 4 * groups + 2] += np.where((groups == 2) & (np.arange(len(groups)) % 2), -1, 1)
    return weights.astype(np.float32), groups


def explained(
    store: SpectraStore, rows: np.ndarray, weights: np.ndarray, *, name: str = "explain-lime", **more: Any
) -> Layer:
    """Write a layer as the explain stage does: in the order of rows, with a place in the list of each score.

    The list of mse is the order given; chi2 lists every other row, in the reverse order, with other weights.
    """
    count = len(rows)
    rank = np.full((count, 2), -1, np.int64)
    rank[:, 0] = np.arange(count)
    rank[::2, 1] = np.arange(count)[::2][::-1] // 2
    both = np.stack([weights, np.roll(weights, 1, axis=1)], axis=1)
    order = np.argsort(rows)
    fields = {"row": rows[order], "rank": rank[order], "weights": both[order]}
    pixels = store.grid.pixels
    segment_of = np.minimum(np.arange(pixels) // (pixels // weights.shape[1]), weights.shape[1] - 1)
    attributes = {"method": "lime", "names": list(SCORES), "segment_of": segment_of.tolist(), "model": "abc"} | more
    layer = store.create_layer(
        name, {key: field_of(values) for key, values in fields.items()}, attributes, rows=count, shard_rows=16
    )
    for shard in layer.pending():
        part = slice(*layer.bounds(shard))
        layer.write(shard, {key: values[part] for key, values in fields.items()})
    return layer


def read_members(folder: Path) -> list[dict[str, str]]:
    with open(folder / "members.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def masked_mean(store: SpectraStore, rows: np.ndarray) -> np.ndarray:
    spectra = store.take(rows)
    good = spectra.ivar > 0
    return np.ma.masked_array(spectra.flux.astype(float), ~good).mean(axis=0).filled(np.nan)


def masked_median(store: SpectraStore, rows: np.ndarray) -> np.ndarray:
    spectra = store.take(rows)
    return np.ma.median(np.ma.masked_array(spectra.flux.astype(float), spectra.ivar == 0), axis=0).filled(np.nan)


@pytest.mark.slow
def test_planted_groups_are_found_and_described(
    tmp_path: Path, tracked: str, store: SpectraStore, rng: np.random.Generator
) -> None:
    weights, groups = make_weights(rng)
    rows = rng.permutation(ROWS)[: len(groups)]
    experiment = settings(tmp_path, tracked, scan=[2, 6], nearest=3)
    found = cluster(experiment, store, explained(store, rows, weights))
    facts = found.content
    assert json.loads((found.folder / "clusters.json").read_text()) == facts
    assert (facts["score"], facts["method"], facts["frame"]) == ("mse", "lime", "rest")
    assert (facts["explained"], facts["unknown"], facts["clustered"], facts["noise"]) == (27, 0, 27, 0)
    assert [one["size"] for one in facts["clusters"]] == [12, 9, 6]
    assert facts["scan"]["k"] == [2, 3, 4, 5, 6] and facts["scan"]["silhouette"][1] == max(facts["scan"]["silhouette"])
    assert WaveGrid(**facts["grid"]) == store.grid
    ids = store.column("id")
    for one in facts["clusters"]:
        members = rows[groups == one["label"]]
        np.testing.assert_allclose(one["spectrum"]["mean"], masked_mean(store, members), rtol=1e-5)
        np.testing.assert_allclose(one["spectrum"]["median"], masked_median(store, members), rtol=1e-5)
        assert max(one["weights"]["mean"]) == 1.0
        assert int(np.argmax(one["weights"]["mean"])) == 4 * one["label"] + 2
        (peak,) = one["peaks"]
        assert peak["low"] <= store.grid.wave[(4 * one["label"] + 2) * 20] < peak["high"]
        # Nearest first, best first, and never by a number that a float could round.
        assert [member["rank"] for member in one["top"]] == np.flatnonzero(groups == one["label"]).tolist()
        distances = [member["distance"] for member in one["nearest"]]
        assert len(distances) == 3 and distances == sorted(distances)
        for member in (*one["nearest"], *one["top"]):
            assert member["id"] == str(ids[member["row"]])
            assert rows[member["rank"]] == member["row"]
        z = store.column("z", members)
        np.testing.assert_allclose(one["properties"]["z"]["quantiles"][2], np.median(z), rtol=1e-5)
        assert sum(one["properties"]["z"]["counts"]) == one["properties"]["z"]["known"] == one["size"]
        np.testing.assert_allclose(one["moved"]["own"], peak["top"], rtol=1e-7)  # that of each member
        np.testing.assert_allclose(one["moved"]["quantiles"][2], np.median(peak["top"] * (1 + z)), rtol=1e-6)
        assert one["moved"]["frame"] == "observed" and one["text"] is None
    # Members agree on the sign but in the last group.
    assert [round(one["peaks"][0]["signed"], 1) for one in facts["clusters"]][:2] == [1.0, 1.0]
    assert abs(facts["clusters"][2]["peaks"][0]["signed"]) < 0.8
    assert facts["truth"] is None and facts["concentrations"]["kinds"] == []
    table = read_members(found.folder)
    assert [int(line["cluster"]) for line in table] == [0] * 12 + [1] * 9 + [2] * 6
    assert [int(line["row"]) for line in table] == [row for label in range(3) for row in rows[groups == label]]
    assert [line["id"] for line in table] == [str(ids[int(line["row"])]) for line in table]
    edges = np.array(facts["edges"])
    regions = 4 * np.repeat(np.arange(3), (12, 9, 6)) + 2
    centres = 0.5 * (edges[regions] + edges[regions + 1])
    np.testing.assert_allclose([float(line["heaviest"]) for line in table], centres, rtol=1e-7)
    np.testing.assert_array_equal(
        [float(line["z"]) for line in table], store.column("z", np.array([int(line["row"]) for line in table]))
    )


@pytest.mark.slow
def test_masked_pixels_change_nothing(tmp_path: Path, tracked: str, rng: np.random.Generator, grid: WaveGrid) -> None:
    weights, _ = make_weights(rng)
    spectra = make_spectra(rng, grid, ROWS)
    spectra.ivar[:, 100] = 0  # good in no spectrum
    found = []
    for number, garbage in enumerate((0.0, 1e30, np.nan)):
        flux = np.where(spectra.ivar > 0, spectra.flux, np.float32(garbage)).astype(np.float32)
        own = tmp_path / str(number)
        store = make_store(
            own / "store.zarr", Spectra(spectra.rows, flux, spectra.ivar, grid), shard_rows=16, chunk_rows=8
        )
        layer = explained(store, np.arange(len(weights)), weights)
        found.append(contents(cluster(settings(own, tracked, k=3), store, layer).folder))
    assert found[0] == found[1] == found[2]
    spectrum = json.loads(found[0]["clusters.json"])["clusters"][0]["spectrum"]
    assert spectrum["mean"][100] is spectrum["median"][100] is None
    assert None not in spectrum["mean"][:100]


def test_what_is_done_is_not_done_again(
    tmp_path: Path, tracked: str, store: SpectraStore, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, _ = make_weights(rng)
    experiment = settings(tmp_path, tracked, k=3)
    layer = explained(store, np.arange(len(weights)), weights)
    assert clustered_of(experiment, store, layer) is None
    first = cluster(experiment, store, layer)
    before = contents(first.folder)
    stamp = (first.folder / "clusters.json").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(stage, "find_clusters", None)  # would fail if it were called
        again = cluster(experiment, store, layer)
    assert again == first and clustered_of(experiment, store, layer) == first
    assert (first.folder / "clusters.json").stat().st_mtime_ns == stamp
    # From the start, the same in every byte.
    (first.folder / "clusters.json").unlink()
    assert clustered_of(experiment, store, layer) is None
    assert contents(cluster(experiment, store, layer).folder) == before
    # Other settings, another folder.
    for changes in ({"k": 2}, {"k": 3, "signed": True}, {"k": 3, "score": "chi2"}):
        assert clustered_of(settings(tmp_path, tracked, **changes), store, layer) is None
    # Naming the score and the method that are taken anyway changes nothing.
    assert clustered_of(settings(tmp_path, tracked, k=3, score="mse", method="lime"), store, layer) == first


def test_a_damaged_file_is_named(tmp_path: Path, tracked: str, store: SpectraStore, rng: np.random.Generator) -> None:
    weights, _ = make_weights(rng)
    experiment = settings(tmp_path, tracked, k=2)
    layer = explained(store, np.arange(len(weights)), weights)
    path = cluster(experiment, store, layer).folder / "clusters.json"
    text = path.read_text()
    path.write_text(text[:-40])
    with pytest.raises(CheckpointError, match=f"not valid JSON: .*; restore it, or remove {path.parent}, to have it"):
        cluster(experiment, store, layer)
    shutil.rmtree(path.parent)
    assert cluster(experiment, store, layer).content == json.loads(text)
    path.write_text(text.replace('"schema": 1', '"schema": 99'))
    with pytest.raises(CheckpointError, match="schema 99"):
        clustered_of(experiment, store, layer)


def test_another_score_has_its_own_list_and_weights(
    tmp_path: Path, tracked: str, store: SpectraStore, rng: np.random.Generator
) -> None:
    weights, groups = make_weights(rng)
    rows = rng.permutation(ROWS)[: len(groups)]
    experiment = settings(tmp_path, tracked, k=3, score="chi2")
    facts = cluster(experiment, store, explained(store, rows, weights)).content
    assert (facts["score"], facts["explained"]) == ("chi2", 14)
    expected = sorted(np.bincount(groups[::2]).tolist(), reverse=True)
    assert [one["size"] for one in facts["clusters"]] == expected
    # Weights of this score are those of the other, one region on.
    tops = {int(np.argmax(one["weights"]["mean"])) for one in facts["clusters"]}
    assert tops == {3, 7, 11}
    ranked = {member["rank"]: member["row"] for one in facts["clusters"] for member in one["top"]}
    assert [ranked[rank] for rank in range(14)] == rows[::2][::-1].tolist()


def test_only_the_best_share_is_clustered_and_only_what_is_explained(
    tmp_path: Path, tracked: str, store: SpectraStore, rng: np.random.Generator
) -> None:
    weights, _ = make_weights(rng)
    weights[[1, 4], 3] = np.nan
    weights[6] = np.inf
    weights[2] = 0
    rows = rng.permutation(ROWS)[: len(weights)]
    experiment = settings(tmp_path, tracked, k=2, fraction=0.5)
    found = cluster(experiment, store, explained(store, rows, weights))
    facts, table = found.content, read_members(found.folder)
    assert (facts["explained"], facts["unknown"], facts["clustered"], facts["noise"]) == (27, 3, 12, 1)
    ranks = [rank for rank in range(27) if rank not in (1, 4, 6)][:12]
    assert sorted(int(line["rank"]) for line in table) == ranks
    assert (table[-1]["cluster"], table[-1]["rank"], table[-1]["distance"]) == ("-1", "2", "")
    assert facts["notes"] == ["spectra without any weight, which are in no cluster: 1"]


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_spectra_are_one_cluster(
    tmp_path: Path, tracked: str, store: SpectraStore, count: int, rng: np.random.Generator
) -> None:
    layer = explained(store, np.arange(count), make_weights(rng)[0][:count])
    facts = cluster(settings(tmp_path, tracked), store, layer).content
    assert [one["size"] for one in facts["clusters"]] == [count]
    assert facts["scan"] is None and facts["silhouette"] is None


def test_weights_of_all_pixels_are_added_up_over_windows(
    tmp_path: Path, tracked: str, store: SpectraStore, rng: np.random.Generator
) -> None:
    pixels = store.grid.pixels
    weights, groups = np.zeros((27, pixels), np.float32), make_weights(rng)[1]
    start = 100 * groups + 10
    weights[np.arange(27), start] = weights[np.arange(27), start + 1] = 1 + np.arange(27)
    layer = explained(store, rng.permutation(ROWS)[:27], weights, segment_of=list(range(pixels)))
    facts = cluster(settings(tmp_path, tracked, k=3), store, layer).content
    assert [one["size"] for one in facts["clusters"]] == [12, 9, 6]
    assert len(facts["edges"]) == 126 + 1  # 125 windows of two pixels, and what remains
    np.testing.assert_allclose(facts["edges"][:3], store.grid.edges[[0, 2, 4]], rtol=1e-8)
    for one in facts["clusters"]:
        (peak,) = one["peaks"]
        assert peak["low"] <= store.grid.wave[100 * one["label"] + 10] < peak["high"]


def test_there_may_be_no_cluster(tmp_path: Path, tracked: str, store: SpectraStore) -> None:
    weights = np.eye(SEGMENTS, dtype=np.float32)
    layer = explained(store, np.arange(SEGMENTS), weights)
    found = cluster(settings(tmp_path, tracked, algorithm="hdbscan"), store, layer)
    assert found.content["clusters"] == [] and found.content["noise"] == SEGMENTS
    assert {line["cluster"] for line in read_members(found.folder)} == {"-1"}


def test_of_many_clusters_and_members_as_much_is_told_as_fits(
    tmp_path: Path, tracked: str, store: SpectraStore, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, groups = make_weights(rng)
    monkeypatch.setattr(stage, "_TOLD", 2)
    monkeypatch.setattr("distspec.stages.cluster.members._MEDIAN", 5)
    monkeypatch.setattr("distspec.stages.cluster.members._CHUNK", 7)
    monkeypatch.setattr(stage, "_LISTED", 4)
    rows = rng.permutation(ROWS)[: len(groups)]
    facts = cluster(settings(tmp_path, tracked, k=3), store, explained(store, rows, weights)).content
    first, second, third = facts["clusters"]
    assert third["spectrum"] is third["weights"] is None and third["peaks"]
    members = rows[groups == 0]
    assert (first["spectrum"]["of"], first["spectrum"]["median_of"], second["spectrum"]["median_of"]) == (12, 5, 5)
    np.testing.assert_allclose(first["spectrum"]["mean"], masked_mean(store, members), rtol=1e-5)
    # Of twelve members five, evenly spaced in their ranks, the first and the last among them.
    np.testing.assert_allclose(first["spectrum"]["median"], masked_median(store, members[[0, 2, 5, 8, 11]]), rtol=1e-5)
    assert [member["row"] for member in first["top"]] == members[:4].tolist()


def test_what_does_not_fit_is_refused(
    tmp_path: Path, tracked: str, store: SpectraStore, rng: np.random.Generator
) -> None:
    weights, _ = make_weights(rng)
    rows = np.arange(len(weights))
    layer = explained(store, rows, weights)
    with pytest.raises(ConfigError, match="cluster.method is 'occlusion'"):
        cluster(settings(tmp_path, tracked, method="occlusion"), store, layer)
    other = explained(store, rows, weights, name="explain-other", names=["pca", "density"])
    with pytest.raises(ConfigError, match="score 'chi2' to cluster; there are pca, density"):
        cluster(settings(tmp_path, tracked, score="chi2"), store, other)
    unknown = explained(store, rows, np.full_like(weights, np.nan), name="explain-unknown")
    with pytest.raises(ConfigError, match="none of 27 spectra"):
        cluster(settings(tmp_path, tracked), store, unknown)
    fields = {"row": ("i8", ()), "rank": ("i8", (2,)), "weights": ("f4", (2, SEGMENTS))}
    pending = store.create_layer("explain-pending", fields, layer.attributes, rows=9, shard_rows=16)
    with pytest.raises(StoreError, match="lacks 1 of 1 shards"):
        cluster(settings(tmp_path, tracked), store, pending)


# --- a survey with exposures and truth -------------------------------------------------------------------------------


def make_planted(folder: Path, rng: np.random.Generator, groups: np.ndarray, frame: str = "rest") -> SpectraStore:
    """Make a survey whose second group comes from one plate and few redshifts, and whose kinds are the groups."""
    grid = WaveGrid("log", 4_000.0, 1e-3, 150)
    count = len(groups)
    spectra = make_spectra(rng, grid, count)
    kinds = np.array(["lines", "dip", ""], dtype=object)
    plate = np.where(groups == 1, 266, rng.integers(270, 290, count)).astype(np.int32)
    plate[0] = -1  # unknown
    z = np.where(groups == 1, 0.116 + 0.001 * rng.random(count), rng.uniform(0.01, 0.3, count))
    columns = {
        "id": np.arange(count, dtype=np.int64) + 2**60 + 1,
        "z": z,
        "snr": rng.lognormal(2, 0.3, count).astype(np.float32),
        "class": np.where(groups == 0, "GALAXY", "").astype(object),
        "plate": plate,
        "mjd": np.where(plate < 0, -1, 51_000 + plate).astype(np.int32),
        "status": np.zeros(count, np.int32),
        "anomaly": kinds[groups],
        "anomaly_wave": np.full((count, 4, 2), np.nan, np.float32),
    }
    columns["snr"][1] = np.nan
    store = SpectraStore.create(
        folder / "store.zarr",
        StoreSpec(
            grid=grid,
            frame=frame,
            rows=count,
            shard_rows=64,
            chunk_rows=64,
            columns={name: field_of(values) for name, values in columns.items()},
            digest="planted",
            recipe="recipe",
            settings={},
        ),
    )
    for shard in store.pending():
        part = slice(*store.base.bounds(shard))
        store.write(shard, spectra[part], {name: values[part] for name, values in columns.items()})
    store.freeze(None)
    store.mark_finished()
    return store


@pytest.mark.parametrize("frame", ["rest", "observed"])
def test_an_artefact_has_one_plate_and_few_redshifts(
    tmp_path: Path, tracked: str, rng: np.random.Generator, frame: str
) -> None:
    groups = rng.permutation(np.repeat(np.arange(3), (60, 40, 30)))
    store = make_planted(tmp_path, rng, groups, frame)
    weights = 0.03 * rng.normal(size=(len(groups), SEGMENTS))
    weights[np.arange(len(groups)), 4 * groups + 2] += 1
    layer = explained(store, np.arange(len(groups)), weights.astype(np.float32))
    found = cluster(settings(tmp_path, tracked, k=3), store, layer)
    first, second, third = found.content["clusters"]
    # A plate has one exposure, so that plates alone are no second test.
    assert found.content["concentrations"]["kinds"] == [
        {"columns": ["plate", "mjd"], "labels": len(np.unique(store.column("plate"))) - 1}
    ]
    (held,) = [held for held in second["exposures"] if held["p"] < 0.01]
    assert held["label"] == "plate 266, mjd 51266"
    assert held["members"] == held["known"] == int(((groups == 1) & (np.arange(130) > 0)).sum())
    # Corrected for all labels and for all three clusters.
    labels = found.content["concentrations"]["kinds"][0]["labels"]
    p = stats.hypergeom.sf(held["members"] - 1, 129, held["members"], held["members"])
    assert held["p"] == pytest.approx(3 * labels * p, rel=1e-9) and found.content["concentrations"]["tests"] == 3
    assert held["share"] == 1.0 and held["expected"] == pytest.approx(held["members"] / 129)
    assert all(held["p"] > 0.01 for one in (first, third) for held in one["exposures"])
    assert second["properties"]["z"]["leaning"]["p"] < 1e-6
    assert second["properties"]["snr"]["leaning"]["p"] > 0.01
    assert sum(one["properties"]["snr"]["known"] for one in found.content["clusters"]) == 129
    assert (first["classes"], second["classes"]) == ({"GALAXY": 60}, {"": 40})
    low, high = second["moved"]["quantiles"][0], second["moved"]["quantiles"][-1]
    assert high / low - 1 < 0.002
    assert second["moved"]["frame"] == ("observed" if frame == "rest" else "rest")
    assert second["moved"]["quantiles"][2] / second["peaks"][0]["top"] == pytest.approx(
        1.1165 if frame == "rest" else 1 / 1.1165, rel=1e-3
    )
    truth = found.content["truth"]
    assert truth["planted"]["rand"] == truth["all"]["rand"] == 1.0
    assert truth["planted"] == {"spectra": 100, "rand": 1.0, "homogeneity": 1.0, "completeness": 1.0}
    assert truth["all"]["kinds"] == ["", "dip", "lines"]
    assert truth["all"]["table"] == [[0, 0, 60], [0, 40, 0], [30, 0, 0]]
    table = read_members(found.folder)
    assert [line["anomaly"] for line in table] == ["lines"] * 60 + ["dip"] * 40 + [""] * 30
    assert {line["snr"] for line in table if line["row"] == "1"} == {""}
