"""A store as a dataset of Ray Data, and results per row back into it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distspec
from distspec.config import Experiment
from distspec.detectors.neural.scores import ModelScores
from distspec.errors import LayoutError, ShardError
from distspec.models.checkpoint import Checkpoint
from distspec.pipeline import Products
from distspec.spectra import Spectra
from distspec.store import SpectraStore
from tests.support.catalogues import make_catalogue


class OwnModel:
    """As a user would write it: a model of their own, here one of ours, over batches of spectra."""

    def __init__(self, folder: str, experiment: Experiment, grid: Any) -> None:
        self._scores, self._grid = ModelScores(Checkpoint.load(folder), experiment.score, "cpu"), grid

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        usable = batch["status"] == 0
        rows = batch["row"][usable]
        found = self._scores(Spectra(rows, batch["flux"][usable], batch["ivar"][usable], self._grid))
        return {"row": rows, "chi2": found.scores[:, self._scores.names.index("chi2")], "latents": found.latents}


@pytest.mark.slow
def test_a_users_model_gives_the_scores_of_distspec_score(done: tuple[Experiment, Products], tmp_path: Path) -> None:
    experiment, made = done
    assert made.store is not None and made.checkpoint is not None and made.scores is not None
    # What others compare with files stays as it is.
    shutil.copytree(made.store.path, tmp_path / "store.zarr")
    store = SpectraStore.open(tmp_path / "store.zarr", write=True)
    spectra = distspec.dataset(store, ["row", "status"])
    arguments = (made.checkpoint.folder, experiment, store.grid)
    scored = spectra.map_batches(
        OwnModel, fn_constructor_args=arguments, batch_format="numpy", batch_size=None, concurrency=1
    )
    layer = distspec.write_layer(scored, store, "own")
    for field in ("chi2", "latents"):
        np.testing.assert_allclose(layer.read(field), made.scores.read(field), rtol=1e-5, equal_nan=True)


@pytest.mark.slow
def test_columns_arrive_exactly_and_shards_are_blocks(ray_session: None, tmp_path: Path) -> None:
    store = make_catalogue(tmp_path / "s.zarr")
    dataset = distspec.dataset(store, ["row", "id", "note"])
    rows = sorted(dataset.take_all(), key=lambda row: row["row"])
    assert [row["id"] for row in rows] == store.column("id").tolist()
    assert [row["note"] for row in rows] == store.column("note").tolist()
    np.testing.assert_array_equal([row["flux"] for row in rows], store.take(np.arange(store.rows)).flux)
    assert dataset.materialize().num_blocks() == store.shards


@pytest.mark.slow
def test_mixed_rows_are_put_together_again(ray_session: None, tmp_path: Path) -> None:
    store = make_catalogue(tmp_path / "s.zarr")
    mixed = distspec.dataset(store, ["row"], spectra=False).random_shuffle(seed=1)
    doubled = mixed.map_batches(lambda batch: {"row": batch["row"], "twice": 2.0 * batch["row"]}, batch_format="numpy")
    layer = distspec.write_layer(doubled, store, "twice")
    np.testing.assert_array_equal(layer.read("twice"), 2.0 * np.arange(store.rows))
    assert store.layer("twice").attributes["scores"] == ["twice"]


@pytest.mark.slow
def test_a_usable_row_that_is_missing_is_an_error(ray_session: None, tmp_path: Path) -> None:
    store = make_catalogue(tmp_path / "s.zarr")
    usable = int(np.flatnonzero(store.status() == 0)[2])
    most = distspec.dataset(store, ["row"], spectra=False).filter(lambda row: row["row"] != usable)
    found = most.map_batches(lambda batch: {"row": batch["row"], "x": 1.0 * batch["row"]}, batch_format="numpy")
    with pytest.raises(ShardError, match=r"lack usable rows of 1 of \d shards, such as of rows 0 to 16"):
        distspec.write_layer(found, store, "x")
    with pytest.raises(LayoutError, match="expected `row` and what is found"):
        distspec.write_layer(
            most.map_batches(lambda batch: {"y": 1.0 * batch["row"]}, batch_format="numpy"), store, "y"
        )


def test_what_is_no_column_is_refused_before_anything_is_read(ray_session: None, store: SpectraStore) -> None:
    with pytest.raises(LayoutError, match="'zz'"):
        distspec.dataset(store, ["zz"])


@pytest.mark.slow
def test_what_a_layer_cannot_hold_is_refused(ray_session: None, tmp_path: Path) -> None:
    store = make_catalogue(tmp_path / "s.zarr")
    rows = distspec.dataset(store, ["row"], spectra=False)

    def results(**fields: Any) -> Any:
        return rows.map_batches(
            lambda batch: {"row": batch["row"], **{key: make(batch["row"]) for key, make in fields.items()}},
            batch_format="numpy",
        )

    for make in (lambda row: row > 3, lambda row: row.astype(str)):
        with pytest.raises(LayoutError, match="results x hold no numbers"):
            distspec.write_layer(results(x=make), store, "x")
    with pytest.raises(LayoutError, match="results have a column 'shard', a name that is taken"):
        distspec.write_layer(results(shard=lambda row: 1.0 * row), store, "x")
    assert "x" not in store.layers()
    # Rows of another store.
    for shift in (-1, store.rows):
        with pytest.raises(ShardError, match="or hold others than the store has"):
            distspec.write_layer(results(row=lambda row, by=shift: row + by, y=lambda row: 1.0 * row), store, "y")
