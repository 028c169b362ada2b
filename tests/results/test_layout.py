"""Names on disk: which settings decide them, which do not, and what they were yesterday."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distspec.config import Experiment, Pca
from distspec.results import layout
from distspec.store import Inventory, Layer, SpectraStore
from tests.support.small import small
from tests.support.surveys import make_layer, make_survey, write_rows

STORE = "0123456789ab"
SHA256 = "f" * 64

INVENTORY = Inventory(["a.fits", "b.fits"], np.array([10, 20]), np.array([1, 2]), np.array([300, 400]))


@pytest.fixture
def store(tmp_path: Path) -> SpectraStore:
    return make_survey(tmp_path, {"z": np.linspace(0.0, 0.2, 12)}, shard_rows=8)


@pytest.fixture
def scores(store: SpectraStore) -> Layer:
    return make_layer(store, "score-0123456789ab", {"mse": np.arange(12.0)}, model=SHA256)


def of_settings(experiment: Experiment) -> dict[str, str]:
    """All names that follow from settings and digests alone."""
    method = experiment.explain.methods[0]
    return {
        "recipe": layout.recipe_digest(experiment),
        "store": layout.store_digest(experiment, INVENTORY),
        "model": str(layout.model_folder(experiment, STORE)),
        "tuning": str(layout.tuning_folder(experiment, experiment.train, STORE)),
        "score": layout.score_layer(experiment, SHA256),
        "explain": layout.explain_layer(experiment, method, []),
        "lines": layout.lines_layer(experiment, []),
        "detector": str(layout.detector_folder(experiment, Pca(), STORE)),
        "detect": layout.detect_layer(experiment, Pca(), STORE),
        "comparison": str(layout.compare_folder(experiment, STORE, [], ["mse", "pca"])),
        "ensemble": layout.ensemble_layer(STORE, [], ["mse", "pca"]),
        "evaluation": str(layout.evaluation_folder(experiment, STORE, [])),
    }


YESTERDAY = {
    "recipe": "17fed1aefd4d",
    "store": "beca619b8c15",
    "model": "out/models/80e19b65c6b6",
    "tuning": "out/tuning/1643462a2f77",
    "score": "score-afa7dcb8084d",
    "explain": "explain-lime-5f0a386aa2a5",
    "lines": "lines-ff404da6891f",
    "detector": "out/detectors/pca-2e572ec252be",
    "detect": "detect-pca-2e572ec252be",
    "comparison": "out/comparison/5f2882a0ce81",
    "ensemble": "ensemble-f13aaa13f2fa",
    "evaluation": "out/evaluation/c2f93b870411",
}


def test_names_are_those_of_yesterday() -> None:
    assert of_settings(small(Path("out"))) == YESTERDAY


def test_names_of_layers_are_those_of_yesterday(scores: Layer) -> None:
    experiment = small(Path("out"))
    found = {
        "explain": layout.explain_layer(experiment, experiment.explain.methods[0], [scores, scores], "list"),
        "lines": layout.lines_layer(experiment, [scores], "list"),
        "ascent": layout.ascent_layer(experiment, scores),
        "comparison": str(layout.compare_folder(experiment, STORE, [scores], ["mse"])),
        "ensemble": layout.ensemble_layer(STORE, [scores], ["mse"]),
        "evaluation": str(layout.evaluation_folder(experiment, STORE, [scores])),
        "clusters": str(layout.cluster_folder(experiment, STORE, scores, "mse")),
    }
    assert found == {
        "explain": "explain-lime-d9db2343e0ab",
        "lines": "lines-c8a5f667b5d7",
        "ascent": "ascent-257c4cc6e5f3",
        "comparison": "out/comparison/385698b2921d",
        "ensemble": "ensemble-ac848aed4083",
        "evaluation": "out/evaluation/905c0b3b2e48",
        "clusters": "out/clusters/b352f94b3580",
    }


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        # What only says how, where or how many at a time changes no name.
        ({"runtime": {"workers": 1}}, set()),
        ({"name": "other", "tracking": {"model": "other"}}, set()),
        ({"report": {"spectra": 9}}, set()),
        ({"train": {"cache_gb": 1.0, "readers": 5}}, set()),
        ({"tune": {"trials": 9, "concurrent": 3}}, set()),
        ({"score": {"top": 7}}, set()),
        ({"explain": {"ids": "list.csv"}}, set()),
        # What changes the result does, and no more than the results that rest on it by settings.
        ({"score": {"metrics": ["mad"]}}, {"score"}),
        ({"train": {"epochs": 5}}, {"model"}),
        ({"train": {"workers": 2}}, {"model"}),
        ({"tune": {"epochs": 3}}, {"tuning"}),
        ({"train": {"validation": 0.3}}, {"model", "tuning", "detector", "detect", "evaluation"}),
        ({"detect": {"sample": 77}}, {"detector", "detect"}),
        ({"explain": {"fraction": 0.04}}, {"explain", "lines"}),
        ({"compare": {"top": 9}}, {"comparison"}),
        ({"compare": {"scores": ["mse", "chi2"]}}, {"evaluation"}),
        ({"evaluate": {"hosts": 9}}, {"evaluation"}),
        ({"seed": 6}, {"store", "model", "tuning", "explain", "detector", "detect", "evaluation"}),
    ],
)
def test_a_name_changes_with_what_decides_it(changes: dict[str, Any], changed: set[str]) -> None:
    before, after = of_settings(small(Path("out"))), of_settings(small(Path("out"), **changes))
    assert {key for key in before if before[key] != after[key]} == changed


def test_a_recipe_is_named_by_the_preparation_wherever_its_statistics_come_from() -> None:
    experiment = small(Path("out"))
    prepare = experiment.ingest.prepare

    def named(**changes: Any) -> str:
        ingest = experiment.ingest.model_copy(update={"prepare": prepare.model_copy(update=changes)})
        return layout.recipe_digest(experiment.model_copy(update={"ingest": ingest}))

    assert named(sample=prepare.sample.model_copy(update={"store": "other.zarr"})) == named()
    assert named(sample=prepare.sample.model_copy(update={"impute": True})) != named()
    assert named(max_pixel_snr=3.0) != named()


def test_a_store_is_named_by_its_files_and_the_seed_of_a_simulation_alone() -> None:
    experiment = small(Path("out"))
    first = layout.store_digest(experiment, INVENTORY)
    touched = Inventory(INVENTORY.names, INVENTORY.sizes, INVENTORY.changed + 1, INVENTORY.counts)
    larger = Inventory(INVENTORY.names, INVENTORY.sizes + 1, INVENTORY.changed, INVENTORY.counts)
    assert layout.store_digest(experiment, touched) == first != layout.store_digest(experiment, larger)
    assert "seed" in layout.store_identity(experiment)
    dust = {"prepare": {"dust": {"kind": "none"}}}
    survey = small(Path("out"), ingest={"source": {"kind": "sdss", "path": "here"}, **dust})
    moved = small(Path("out"), ingest={"source": {"kind": "sdss", "path": "there"}, **dust}, seed=9)
    assert layout.store_identity(survey) == layout.store_identity(moved)
    assert "seed" not in layout.store_identity(survey)


def test_lists_change_their_names_as_the_store_grows(store: SpectraStore, scores: Layer) -> None:
    experiment = small(Path("out"))

    def names(layer: Layer) -> dict[str, Any]:
        return {
            "explain": layout.explain_layer(experiment, experiment.explain.methods[0], [layer]),
            "lines": layout.lines_layer(experiment, [layer]),
            "ascent": layout.ascent_layer(experiment, layer),
            "comparison": layout.compare_folder(experiment, STORE, [layer], ["mse"]),
            "ensemble": layout.ensemble_layer(STORE, [layer], ["mse"]),
            "evaluation": layout.evaluation_folder(experiment, STORE, [layer]),
        }

    before = names(scores)
    store.extend(3, Inventory(["c.fits"], np.array([1]), np.array([1]), np.array([3])))
    columns = {"id": np.arange(15), "status": np.zeros(15, np.int32), "z": np.zeros(15)}
    write_rows(store, columns)
    after = names(make_layer(store, scores.name, {"mse": np.arange(15.0)}, model=SHA256))
    assert [key for key in before if before[key] == after[key]] == []


def test_what_is_not_named_by_a_digest_lies_in_the_output() -> None:
    experiment = small(Path("out"))
    assert layout.store_path(experiment) == "out/store.zarr"
    elsewhere = small(Path("out"), ingest={"store": "s3://bucket/store.zarr"})
    assert layout.store_path(elsewhere) == "s3://bucket/store.zarr"
    files = (layout.report_path, layout.table_path, layout.ledger_path, layout.tuned_path)
    assert [str(path(experiment)) for path in files] == [
        "out/report.html",
        "out/anomalies.csv",
        "out/ledger.csv",
        "out/tuned.toml",
    ]
    assert str(layout.ensemble_folder(experiment, "ensemble-1")) == "out/comparison/ensemble-1"
