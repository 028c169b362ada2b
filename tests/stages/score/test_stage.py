import csv
import threading
from pathlib import Path

import numpy as np
import pytest

from distspec.config import Experiment
from distspec.detectors.neural.reconstruction import SCORES
from distspec.detectors.neural.scores import ModelScores
from distspec.errors import CheckpointError, ShardError, StoreError
from distspec.models.checkpoint import Checkpoint
from distspec.pipeline import Products
from distspec.runtime.tracking import tracking_uri
from distspec.spectra import Spectra
from distspec.stages.score.stage import score
from distspec.stages.score.workers import Scorer, summarize
from distspec.store import SpectraStore
from tests.conftest import make_store
from tests.support.small import contents, small

pytestmark = pytest.mark.numeric


def test_scores_are_those_of_one_plain_pass(done: tuple[Experiment, Products]) -> None:
    experiment, made = done
    usable = np.flatnonzero(made.store.column("status") == 0)
    scores = ModelScores(made.checkpoint, experiment.score)
    values, latents, *_ = scores(made.store.take(usable))
    for index, name in enumerate(SCORES):
        np.testing.assert_allclose(made.scores.read(name)[usable], values[:, index], rtol=1e-4)
    np.testing.assert_allclose(made.scores.read("latents")[usable], latents, rtol=1e-3, atol=1e-4)


def test_what_is_set_aside_has_no_score_and_the_rest_has(done: tuple[Experiment, Products]) -> None:
    _, made = done
    aside = made.store.column("status") != 0
    for name in SCORES:
        assert (np.isnan(made.scores.read(name)) == aside).all()


@pytest.mark.parametrize(
    "workers", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_any_number_of_workers_gives_the_same_bytes(
    done: tuple[Experiment, Products], tmp_path: Path, workers: int
) -> None:
    experiment, made = done
    layer = Path(made.store.path) / "layers" / made.scores.name
    before = contents(layer)
    for shard in range(made.scores.shards):
        (layer / f"commits/c/{shard}").unlink()
    again = small(Path(experiment.output), runtime={"workers": workers})
    score(again, SpectraStore.open(made.store.path, write=True), made.checkpoint)
    assert contents(layer) == before


def test_only_unfinished_shards_are_scored_again_and_the_summary_is_whole(done: tuple[Experiment, Products]) -> None:
    experiment, made = done
    layer = Path(made.store.path) / "layers" / made.scores.name
    before = contents(layer)
    stamp = (layer / "mse/c/0").stat().st_mtime_ns
    (layer / "commits/c/1").unlink()
    (layer / "mse/c/1").write_bytes(b"half")
    score(experiment, SpectraStore.open(made.store.path, write=True), made.checkpoint)
    assert contents(layer) == before
    assert (layer / "mse/c/0").stat().st_mtime_ns == stamp
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(experiment), tracking_uri(experiment))
    found = client.get_experiment_by_name("small")
    run = client.search_runs([found.experiment_id], "tags.`distspec.stage` = 'score'", max_results=1)[0]
    assert run.data.metrics["scored"] + run.data.metrics["set_aside"] == made.store.rows


def scores_of(values: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(SCORES, values.T, strict=True))


def test_summaries_add_up_to_one_pass(rng: np.random.Generator) -> None:
    rows = np.arange(100)
    values = rng.random((100, len(SCORES))).astype(np.float32)
    usable = rng.random(100) > 0.2
    whole = summarize(rows, scores_of(values), usable, 7)
    cuts = [slice(0, 13), slice(13, 60), slice(60, 100)]
    parts = [summarize(rows[cut], scores_of(values[cut]), usable[cut], 7) for cut in cuts]
    merged = parts[2] + (parts[0] + parts[1])
    assert (merged.scored, merged.set_aside) == (int(usable.sum()), int((~usable).sum()))
    for name in SCORES:
        np.testing.assert_array_equal(merged.tops[name].rows, whole.tops[name].rows)
        np.testing.assert_array_equal(merged.histograms[name].counts, whole.histograms[name].counts)


def test_a_model_of_another_grid_or_recipe_is_refused(
    done: tuple[Experiment, Products], checkpoint: Checkpoint
) -> None:
    experiment, made = done
    with pytest.raises(CheckpointError, match=r"300 pixels.*240 pixels"):
        score(experiment, made.store, checkpoint)
    wrong = Checkpoint(made.checkpoint.model, made.checkpoint.settings, made.store.grid, "0123456789ab")
    with pytest.raises(CheckpointError, match="0123456789ab"):
        score(experiment, made.store, wrong)


def test_a_score_that_is_not_finite_is_an_error_that_names_the_row(
    tmp_path: Path, spectra: Spectra, checkpoint: Checkpoint, experiment: Experiment
) -> None:
    flux = spectra.flux.copy()
    flux[17, 5], spectra.ivar[17, 5] = np.inf, 1.0
    store = make_store(
        tmp_path / "s.zarr", Spectra(spectra.rows, flux, spectra.ivar, spectra.grid), shard_rows=16, chunk_rows=8
    )
    fields = {"latents": ("f4", (4,))} | dict.fromkeys(SCORES, ("f4", ()))
    layer = store.create_layer("score-x", fields)
    scorer = Scorer(store.path, checkpoint.folder, "score-x", experiment.score, "cpu")
    scorer(0)
    with pytest.raises(ShardError, match="row 17 ") as caught:
        scorer(1)
    assert caught.value.rows == (16, 32)
    assert layer.pending() == [1, 2]


def scorer_of(store: SpectraStore, checkpoint: Checkpoint, experiment: Experiment, batch: int) -> Scorer:
    store.create_layer("score-x", {"latents": ("f4", (4,))} | dict.fromkeys(SCORES, ("f4", ())))
    settings = experiment.score.model_copy(update={"batch": batch})
    return Scorer(store.path, checkpoint.folder, "score-x", settings, "cpu")


@pytest.mark.parametrize(("batch", "reads"), [(1, 2), (3, 2), (8, 1), (64, 1)])
def test_a_shard_read_in_two_parts_has_the_bits_of_one_read_whole(
    store: SpectraStore,
    checkpoint: Checkpoint,
    experiment: Experiment,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    reads: int,
) -> None:
    scorer, read = scorer_of(store, checkpoint, experiment, batch), []
    between = scorer._store.between
    monkeypatch.setattr(
        scorer._store, "between", lambda start, stop: read.append((start, stop)) or between(start, stop)
    )
    assert scorer(0).set_aside == 1
    assert len(read) == reads and read[0][0] == 0 and read[-1][1] == 16
    usable = np.flatnonzero(store.status(0, 16) == 0)
    whole = ModelScores(checkpoint, scorer._scores.settings)(store.read(0)[usable])
    layer = store.layer("score-x")
    for index, name in enumerate(SCORES):
        found = layer.read(name, 0, 16)
        assert found[usable].tobytes() == np.ascontiguousarray(whole.scores[:, index]).tobytes()
        assert np.isnan(found[3])
    assert layer.read("latents", 0, 16)[usable].tobytes() == whole.latents.tobytes()


def test_damage_that_a_reader_meets_is_told_and_leaves_no_thread(
    store: SpectraStore, checkpoint: Checkpoint, experiment: Experiment
) -> None:
    scorer = scorer_of(store, checkpoint, experiment, 1)
    chunk = Path(store.path) / "base" / "flux" / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(StoreError, match="is damaged"):
        scorer(0)
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith(("distspec-ahead", "distspec-reader"))
    ]


def test_the_table_is_ranked_and_keeps_ids_exact(done: tuple[Experiment, Products]) -> None:
    experiment, made = done
    with open(Path(experiment.output) / "anomalies.csv", newline="", encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))
    ids = made.store.column("id")
    for line in table:
        assert int(line["id"]) == ids[int(line["row"])]
    ranked = [float(line["mse"]) for line in table]
    assert ranked == sorted(ranked, reverse=True)
