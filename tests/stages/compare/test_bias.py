"""What lists lean towards is found where it was put, and nowhere else."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from distspec.config import Compare
from distspec.errors import ConfigError
from distspec.results.columns import exposure_columns, property_columns
from distspec.results.scores import Scores
from distspec.stages.compare.bias import find_groups, measure_bias
from distspec.statistics.significance import holm
from distspec.store import Inventory, SpectraStore
from tests.support.surveys import make_layer, make_survey

ROWS = 1_200
ASIDE = np.arange(ROWS) % 30 == 4


def survey(folder: Path, columns: dict[str, np.ndarray], shard_rows: int = 500) -> tuple[SpectraStore, Scores]:
    """Make a store whose only score says no more than which spectra are set aside."""
    store = make_survey(folder, columns, shard_rows)
    return store, Scores([make_layer(store, "score-x", {"mse": np.where(ASIDE, np.nan, 1.0)})])


# --- properties -------------------------------------------------------------------------------------------------------


def test_a_list_that_follows_a_property_leans_and_a_random_one_does_not(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    snr, z = rng.lognormal(2.0, 0.5, ROWS).astype(np.float32), rng.random(ROWS)
    store, scores = survey(tmp_path, {"snr": snr, "z": z})
    known = np.flatnonzero(~ASIDE)
    brightest = known[np.argsort(-snr[known])[:100]]
    lists = {"bright": brightest, "any": rng.choice(known, 100, replace=False)}
    found = measure_bias(store, scores, lists, ["snr", "z"])
    tests = {(test["score"], test["property"]): test for test in found["tests"]}
    assert found["properties"] == [{"name": "snr", "known": len(known)}, {"name": "z", "known": len(known)}]
    leaning = tests["bright", "snr"]
    assert leaning["corrected"] < 1e-20
    assert leaning["mean"] == pytest.approx(1 - 50 / len(known))
    assert leaning["counts"] == [0.0] * 9 + [100.0]  # 116 or so in the last tenth
    assert min(test["corrected"] for test in found["tests"] if test is not leaning) > 0.05
    # Against an independent implementation, where nothing is tied.
    ranks = stats.rankdata(z[known])[np.searchsorted(known, lists["any"])]
    expected = stats.ks_1samp((ranks - 0.5) / len(known), stats.uniform.cdf)
    assert tests["any", "z"]["distance"] == pytest.approx(expected.statistic, abs=1 / len(known))
    np.testing.assert_allclose(
        [test["corrected"] for test in found["tests"]], holm(np.array([test["p"] for test in found["tests"]]))
    )


def test_whole_numbers_are_ranked_with_all_their_digits(tmp_path: Path) -> None:
    # Beyond 2^53 a float sees eight neighbors as one value.
    tileid = 2**60 + np.arange(ROWS, dtype=np.int64)
    store, scores = survey(tmp_path, {"tileid": tileid})
    known = np.flatnonzero(~ASIDE)
    (test,) = measure_bias(store, scores, {"a": known[:10]}, ["tileid"])["tests"]
    assert test["mean"] == pytest.approx(5 / len(known), rel=1e-12)
    assert test["counts"][0] == 10


def test_what_is_unknown_does_not_count(tmp_path: Path, rng: np.random.Generator) -> None:
    z, plate = rng.random(ROWS), rng.integers(1, 50, ROWS)
    z[::2], plate[1::2] = np.nan, -1
    store, scores = survey(tmp_path, {"z": z, "plate": plate, "ebv": np.full(ROWS, np.nan, np.float32)})
    rows = np.flatnonzero(~ASIDE)[:40]
    found = measure_bias(store, scores, {"a": rows}, ["z", "plate", "ebv"])
    assert {one["name"]: one["known"] for one in found["properties"]} == {
        "z": int((~ASIDE[1::2]).sum()),
        "plate": int((~ASIDE[::2]).sum()),
        "ebv": 0,
    }
    assert [(test["property"], test["members"]) for test in found["tests"]] == [
        ("z", int((rows % 2 == 1).sum())),
        ("plate", int((rows % 2 == 0).sum())),
    ]


@pytest.mark.slow
def test_shards_change_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    columns = {"snr": np.round(rng.random(ROWS), 2), "fiber": rng.integers(1, 20, ROWS)}
    lists = {"a": rng.choice(np.flatnonzero(~ASIDE), 90, replace=False)}
    found = []
    for shard_rows in (ROWS, 500, 77):
        store, scores = survey(tmp_path / str(shard_rows), columns, shard_rows)
        groups = find_groups(store, scores, lists, [("fiber",)], asked=True)
        found.append(json.dumps([measure_bias(store, scores, lists, ["snr", "fiber"]), groups.to_dict()]))
    assert found[0] == found[1] == found[2]


def test_properties_that_the_store_has_are_chosen(tmp_path: Path) -> None:
    number = np.ones(10)
    columns = dict.fromkeys(("z", "psfmag_r", "flux_w1", "flux_ivar_r", "norm", "airmass", "magic"), number)
    columns |= {"plate": np.ones(10, np.int64), "mjd": np.array(["a"] * 10), "snr": np.ones((10, 2))}
    store = make_survey(tmp_path, columns)
    # Text and several values per spectrum are left out; order is that of the documentation.
    assert property_columns(Compare(), store) == ["z", "psfmag_r", "flux_w1", "norm", "plate"]
    assert property_columns(Compare(properties=("airmass", "z")), store) == ["airmass", "z"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"properties": ("seeing",)}, r"compare.properties names 'seeing'; the store has id, status, z, file, wave"),
        ({"properties": ("file",)}, r"names 'file', a column of text; expected one number per spectrum"),
        ({"properties": ("wave",)}, r"names 'wave', a column of f8 \[3\]; expected one number per spectrum"),
        ({"exposures": ("z",)}, r"compare.exposures names 'z', a column of f8; expected one whole number or text"),
    ],
)
def test_columns_that_cannot_be_used_are_refused(
    tmp_path: Path, settings: dict[str, tuple[str, ...]], message: str
) -> None:
    store = make_survey(tmp_path, {"z": np.ones(4), "file": np.array(["a"] * 4), "wave": np.ones((4, 3))})
    with pytest.raises(ConfigError, match=message):
        property_columns(Compare(**settings), store)
        exposure_columns(Compare(**settings), store)


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def observed(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Forty plates, each exposed on one of two nights, with fibers."""
    plate = rng.integers(260, 300, ROWS)
    return {"plate": plate, "mjd": 51_600 + rng.integers(0, 2, ROWS), "fiber": rng.integers(1, 641, ROWS)}


def test_an_exposure_of_many_outliers_is_named(
    tmp_path: Path, observed: dict[str, np.ndarray], rng: np.random.Generator
) -> None:
    store, scores = survey(tmp_path, observed)
    known = np.flatnonzero(~ASIDE)
    there = known[(observed["plate"][known] == 270) & (observed["mjd"][known] == 51_601)]
    lists = {
        "airglow": np.concatenate([there, rng.choice(np.setdiff1d(known, there), 80, replace=False)]),
        "any": rng.choice(np.setdiff1d(known, there), 90, replace=False),
    }
    kinds = exposure_columns(Compare(), store)
    assert kinds == [("plate", "mjd"), ("plate",), ("fiber",)]
    found = find_groups(store, scores, lists, kinds, asked=False)
    assert found.labels == {("plate", "mjd"): 80, ("plate",): 40, ("fiber",): len(set(observed["fiber"][known]))}
    assert found.tests == 6
    first = found.found[0]
    assert (first.columns, first.label) == (("plate", "mjd"), "plate 270, mjd 51601")
    assert [held.score for held in first.holdings] == ["airglow"]
    np.testing.assert_array_equal(first.rows, there)
    assert first.spectra == len(there)
    size = len(lists["airglow"])
    assert first.holdings[0].expected == pytest.approx(len(there) * size / len(known))
    chance = stats.hypergeom.sf(len(there) - 1, len(known), len(there), size)
    assert first.p == pytest.approx(80 * 6 * chance)  # labels, and lists times kinds of labels
    assert {group.label for group in found.found} == {"plate 270, mjd 51601", "plate 270"}


def test_random_lists_share_nothing(tmp_path: Path, observed: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    store, scores = survey(tmp_path, observed)
    lists = {f"{number}": rng.choice(np.flatnonzero(~ASIDE), 150, replace=False) for number in range(10)}
    assert find_groups(store, scores, lists, exposure_columns(Compare(), store), asked=False).found == ()


def test_plates_of_one_exposure_each_are_told_of_once(tmp_path: Path, observed: dict[str, np.ndarray]) -> None:
    store, scores = survey(tmp_path, observed | {"mjd": observed["plate"] + 51_000})
    rows = np.flatnonzero((observed["plate"] == 270) & ~ASIDE)
    found = find_groups(store, scores, {"a": rows}, exposure_columns(Compare(), store), asked=False)
    assert list(found.labels) == [("plate", "mjd"), ("fiber",)]
    assert [group.label for group in found.found] == ["plate 270, mjd 51270"]


def test_what_names_an_exposure_is_what_most_spectra_have(tmp_path: Path, rng: np.random.Generator) -> None:
    columns = {
        "tile": np.full(ROWS, -1),  # as coadds by healpix have it
        "survey": np.array(["main", "sv3"])[rng.integers(0, 2, ROWS)],
        "program": np.array(["dark"] * ROWS),
        "healpix": rng.integers(0, 9, ROWS),
    }
    store, scores = survey(tmp_path, columns)
    kinds = exposure_columns(Compare(), store)
    assert kinds == [("tile",), ("survey", "program", "healpix")]
    rows = np.flatnonzero(~ASIDE & (columns["survey"] == "sv3") & (columns["healpix"] == 4))
    found = find_groups(store, scores, {"a": rows}, kinds, asked=False)
    assert list(found.labels) == [("survey", "program", "healpix")]
    assert found.found[0].label == "survey sv3, program dark, healpix 4"


def test_fibers_are_numbered_anew_in_each_spectrograph(tmp_path: Path) -> None:
    columns = {name: np.ones(10, np.int64) for name in ("lmjd", "spid", "fiber")} | {"planid": np.array(["p"] * 10)}
    kinds = exposure_columns(Compare(), make_survey(tmp_path, columns))
    assert kinds == [("lmjd", "planid", "spid"), ("spid",), ("spid", "fiber")]


@pytest.mark.parametrize(("files", "expected"), [(2, [("file",)]), (3, [])])
def test_files_count_as_exposures_where_they_hold_many_spectra(
    tmp_path: Path, files: int, expected: list[tuple[str, ...]]
) -> None:
    counts = np.full(files, 20 // files, np.int64)
    counts[0] += 20 - counts.sum()
    inventory = Inventory([f"file-{number}" for number in range(files)], counts, counts, counts)
    store = make_survey(tmp_path, {"file": np.array(["x"] * 20)}, inventory=inventory)
    assert exposure_columns(Compare(), store) == expected


def test_named_columns_make_the_labels(tmp_path: Path, observed: dict[str, np.ndarray]) -> None:
    store, scores = survey(tmp_path, observed | {"camera": np.where(observed["fiber"] > 320, "b2", "")})
    kinds = exposure_columns(Compare(exposures=("mjd", "camera")), store)
    assert kinds[0] == ("mjd", "camera")
    known = np.flatnonzero(~ASIDE)
    found = find_groups(store, scores, {"a": known[:50]}, kinds, asked=True)
    assert found.labels["mjd", "camera"] == 2  # where the camera is not told there is no label
