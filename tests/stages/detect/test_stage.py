"""Classical detectors are fitted on what networks are trained on, and score every usable spectrum alike."""

import json
import shutil
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distspec.config import Experiment, Fisher, Forest, Isolation, Pca
from distspec.detectors.classical.pca import PcaDetector
from distspec.detectors.classical.saved import (
    load_detector,
    read_summary,
    require_detector,
    save_detector,
    write_summary,
)
from distspec.errors import CheckpointError, ConfigError, ShardError
from distspec.pipeline import Products
from distspec.results.layout import detector_folder
from distspec.runtime import workers as runtime_workers
from distspec.runtime.threads import one_thread
from distspec.runtime.tracking import tracking_uri
from distspec.spectra import Spectra, WaveGrid
from distspec.stages.detect import stage as module
from distspec.stages.detect import workers
from distspec.stages.detect.stage import detect, detections_of
from distspec.statistics.holdout import held_out
from distspec.store import SpectraStore
from tests.conftest import make_spectra, make_store
from tests.support.small import contents, small

FEW: list[dict[str, Any]] = [
    {"kind": "pca", "components": 5},
    {"kind": "forest", "trees": 20, "trees_per_draw": 5},
    {"kind": "isolation", "trees": 20},
    {"kind": "fisher", "components": 4, "gaussians": 3},
]


def settings(output: Path, **changes: Any) -> Experiment:
    return small(output, detect={"detectors": FEW, "sample": 300} | changes)


@pytest.fixture(scope="module")
def survey(done: tuple[Experiment, Products], tmp_path_factory: pytest.TempPathFactory) -> SpectraStore:
    """A copy of the small survey's store, since layers are added to it."""
    path = tmp_path_factory.mktemp("survey") / "store.zarr"
    shutil.copytree(done[1].store.path, path)
    return SpectraStore.open(path, write=True)


@pytest.fixture(scope="module")
def fitted(survey: SpectraStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Any]:
    """The few detectors, fitted on the small survey and kept in a folder of their own."""
    experiment = settings(tmp_path_factory.mktemp("detect") / "out")
    return experiment, detect(experiment, survey)


def copied(store: SpectraStore, path: Path, shard_rows: int) -> SpectraStore:
    """Write the same spectra again in shards of another length."""
    rows = np.arange(store.rows)
    return make_store(path, store.take(rows), shard_rows=shard_rows, chunk_rows=64, status=store.status())


def test_every_usable_spectrum_has_every_score_and_no_other_has(
    fitted: tuple[Experiment, Any], survey: SpectraStore
) -> None:
    _, layers = fitted
    usable = survey.column("status") == 0
    assert list(layers) == ["pca", "forest", "isolation", "fisher"]
    for name, layer in layers.items():
        assert (np.isfinite(layer.read(name)) == usable).all()
        assert layer.attributes["scores"][0] == name
    assert layers["fisher"].attributes["scores"] == ["fisher", "fisher_mixture"]
    regions = layers["pca"].attributes["regions"]
    assert set(layers["pca"].read("region")[usable]) <= set(range(-1, len(regions)))
    assert (layers["pca"].read("region")[~usable] == -1).all()


def test_scores_are_those_of_the_detectors_that_were_kept(fitted: tuple[Experiment, Any], survey: SpectraStore) -> None:
    experiment, layers = fitted
    store = survey
    rows = np.flatnonzero(store.column("status") == 0)[::7]
    spectra = store.take(rows)
    for one in experiment.detect.detectors:
        detector, _ = load_detector(detector_folder(experiment, one, store.digest))
        assert detector.settings == one
        np.testing.assert_allclose(detector.score(spectra), layers[one.name].take(one.name, rows), rtol=1e-4)


def test_nothing_is_fitted_on_the_validation_set(fitted: tuple[Experiment, Any], survey: SpectraStore) -> None:
    experiment, layers = fitted
    store = survey
    usable = store.column("status") == 0
    training = usable & ~held_out(usable, experiment.train.validation, experiment.seed)
    spectra = store.take(np.flatnonzero(training))
    mean = np.where(spectra.good, spectra.flux, 0).sum(axis=0, dtype=float) / spectra.good.sum(axis=0).clip(1)
    detector, _ = load_detector(detector_folder(experiment, experiment.detect.detectors[0], store.digest))
    known = spectra.good.sum(axis=0) > 100
    # Not quite everywhere: a flux of hundreds of standard deviations is clipped in the sums.
    assert np.isclose(detector.to_arrays()["mean"][known], mean[known], rtol=1e-4).mean() > 0.95
    assert training.sum() < usable.sum()


@pytest.mark.slow
@pytest.mark.parametrize(("shard_rows", "workers"), [(352, 3), (704, 1)])
def test_neither_shards_nor_workers_change_a_score(
    fitted: tuple[Experiment, Any], survey: SpectraStore, tmp_path: Path, shard_rows: int, workers: int
) -> None:
    experiment, layers = fitted
    store = copied(survey, tmp_path / "store.zarr", shard_rows)
    other = small(tmp_path / "out", detect=experiment.detect.model_dump(mode="json"), runtime={"workers": workers})
    for name, layer in detect(other, store).items():
        np.testing.assert_allclose(layer.read(name), layers[name].read(name), rtol=2e-4, atol=1e-5)


@pytest.mark.slow
def test_an_interrupted_fit_goes_on_and_ends_with_the_same_bytes(
    fitted: tuple[Experiment, Any], survey: SpectraStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = fitted
    shutil.copytree(survey.path, tmp_path / "store.zarr", ignore=shutil.ignore_patterns("detect-*"))
    store = SpectraStore.open(tmp_path / "store.zarr", write=True)
    experiment = settings(tmp_path / "out")
    saved: list[Path] = []

    def killed(detector: Any, folder: Path, recipe: str) -> str:
        if len(saved) == 5:  # in the first look's end: two of three have learned
            raise KeyboardInterrupt
        saved.append(folder)
        return save_detector(detector, folder, recipe)

    for place in (module, workers):
        monkeypatch.setattr(place, "save_detector", killed)
    with pytest.raises(KeyboardInterrupt):
        detect(experiment, store)
    assert all(folder.name.endswith(".unfinished") for folder in (tmp_path / "out/detectors").iterdir())
    assert detections_of(experiment, store) == {}
    monkeypatch.undo()
    detect(experiment, store)
    assert contents(tmp_path / "out/detectors") == contents(Path(first.output) / "detectors")


def test_what_is_done_is_not_done_again(
    fitted: tuple[Experiment, Any], survey: SpectraStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, layers = fitted
    monkeypatch.setattr(module, "stage_run", None)
    again = detect(experiment, survey)
    assert {name: layer.name for name, layer in again.items()} == {name: layer.name for name, layer in layers.items()}


def test_the_run_tells_what_was_fitted(fitted: tuple[Experiment, Any]) -> None:
    from mlflow import MlflowClient

    experiment, layers = fitted
    uri = tracking_uri(experiment)
    client = MlflowClient(uri, uri)
    (run,) = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert run.info.status == "FINISHED"
    assert set(run.data.metrics) >= {f"{name}_mean" for name in layers}
    told = json.loads(Path(client.download_artifacts(run.info.run_id, "detectors.json")).read_text())
    assert told["fisher"]["gaussians"] == 3


@pytest.mark.slow
def test_too_few_spectra_are_refused(spectra: Spectra, tmp_path: Path) -> None:
    status = np.full(40, 2, np.int32)
    status[:2] = 0
    store = make_store(tmp_path / "store.zarr", spectra, shard_rows=16, chunk_rows=8, status=status)
    with pytest.raises(ConfigError, match="only 2 of 40 spectra can be used; detectors need two to fit on"):
        detect(settings(tmp_path / "out"), store)


@pytest.mark.slow
def test_a_detector_that_cannot_be_fitted_is_named(grid: WaveGrid, tmp_path: Path) -> None:
    flat = np.ones((40, grid.pixels), np.float32)
    store = make_store(tmp_path / "store.zarr", Spectra(np.arange(40), flat, flat, grid), shard_rows=64, chunk_rows=8)
    with pytest.raises(ConfigError, match="detector 'fisher' cannot be fitted"):
        detect(settings(tmp_path / "out", detectors=FEW[3:]), store)


def test_a_score_that_is_not_finite_names_its_row() -> None:
    workers._require_finite(np.ones(3, np.float32), np.arange(3), "pca")
    with pytest.raises(ShardError, match=r"row 7 \(and 1 more of rows 5-9\) has no finite score pca"):
        workers._require_finite(np.array([1, 2, np.nan, np.inf]), np.array([5, 6, 7, 8]), "pca")


@pytest.mark.parametrize("one", [Pca(), Forest(), Isolation(), Fisher()], ids=lambda one: one.kind)
def test_the_name_of_a_score_is_its_kind_unless_it_is_given_another(one: Any) -> None:
    assert one.name == one.kind
    assert type(one).model_validate({"name": "other"}).name == "other"


# --- on disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(fitted: tuple[Experiment, Any], survey: SpectraStore, tmp_path: Path) -> Path:
    experiment, _ = fitted
    one = experiment.detect.detectors[2]
    detector, _ = load_detector(detector_folder(experiment, one, survey.digest))
    save_detector(detector, tmp_path / "kept", "recipe")
    return tmp_path / "kept"


def test_a_detector_of_another_recipe_or_grid_is_refused(kept: Path, survey: SpectraStore) -> None:
    grid = survey.grid
    require_detector(kept, grid, "recipe")
    with pytest.raises(CheckpointError, match="was fitted on recipe recipe, the store has other"):
        require_detector(kept, grid, "other")
    with pytest.raises(CheckpointError, match="was fitted on grid"):
        require_detector(kept, type(grid)(grid.scale, grid.first, grid.step, grid.pixels - 1), "recipe")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("schema", 99, "has schema 99; expected 1"),
        ("settings", {"kind": "lof"}, "does not describe a detector"),
        ("settings", {"kind": "pca"}, "holds no pca detector"),
        ("sha256", "0" * 64, "damaged or was changed"),
    ],
)
def test_what_is_not_such_a_detector_is_refused_in_one_line(kept: Path, key: str, value: Any, told: str) -> None:
    text = json.loads((kept / "detector.json").read_text())
    (kept / "detector.json").write_text(json.dumps(text | {key: value}))
    with pytest.raises(CheckpointError, match=told) as caught:
        load_detector(kept)
    assert "\n" not in str(caught.value)


def test_a_missing_detector_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="run `distspec detect` first"):
        load_detector(tmp_path / "none")


def test_what_a_look_gave_is_kept_to_the_last_bit(spectra: Spectra, tmp_path: Path) -> None:
    detector = PcaDetector.assemble(Pca(components=3), spectra.grid, [PcaDetector.grow(Pca(), spectra, 0, 0)])
    for _ in range(2):
        found = detector.look(spectra)
        write_summary(tmp_path / "look.npz", found)
        again = read_summary(tmp_path / "look.npz", detector)
        assert type(again) is type(found)
        learned, same = detector.learn(found), detector.learn(again)
        for name, values in learned.to_arrays().items():
            np.testing.assert_array_equal(same.to_arrays()[name], values)
        detector = learned
    (tmp_path / "look.npz").write_bytes(b"PK no more")
    with pytest.raises(CheckpointError, match="remove it, and detect again"):
        read_summary(tmp_path / "look.npz", detector)


@pytest.mark.slow
def test_no_matrix_of_pairs_passes_through_the_driver_and_an_interrupted_look_goes_on(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = WaveGrid.between("log", 3600.0, 7400.0, 2_400)
    rng = np.random.default_rng(0)
    survey = make_store(tmp_path / "s.zarr", make_spectra(rng, grid, 96), shard_rows=8, chunk_rows=8)
    experiment = small(tmp_path / "out", detect={"detectors": [{"kind": "pca", "components": 3}]})
    passed: list[int] = []
    unpack = runtime_workers.unpack

    def counted(packed: bytes) -> Any:
        passed.append(len(packed))
        if len(passed) == 6:
            raise KeyboardInterrupt
        return unpack(packed)

    monkeypatch.setattr(runtime_workers, "unpack", counted)
    with pytest.raises(KeyboardInterrupt):
        detect(experiment, survey)
    left = list((tmp_path / "out/detectors").rglob("look-*.npz"))
    assert left
    detect(experiment, survey)
    assert not list((tmp_path / "out/detectors").rglob("look-*.npz"))
    # Two looks, the learning of each, and the scores of twelve shards; a matrix of pairs has 46 MB.
    assert sum(passed) < 1_000 * survey.shards
    # The plain sum, one shard after the other in this process.
    kept, _ = load_detector(detector_folder(experiment, experiment.detect.detectors[0], survey.digest))
    status, training = survey.status(), vars(module)["_training"](experiment, survey)
    assert training.sum() < (status == 0).sum()
    start = Pca.model_validate(experiment.detect.detectors[0].model_dump())
    sample = survey.take(np.flatnonzero(training))
    plain = PcaDetector.assemble(start, grid, [PcaDetector.grow(start, sample, experiment.seed, 0)])
    with one_thread():
        while plain.looking:
            looks = [plain.look(survey.read(shard)[training[8 * shard : 8 * shard + 8]]) for shard in range(12)]
            plain = plain.learn(reduce(add, looks))
    for name, values in plain.to_arrays().items():
        np.testing.assert_array_equal(kept.to_arrays()[name], values)
