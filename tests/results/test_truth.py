"""Recall and pointing against answers known by hand."""

from pathlib import Path

import numpy as np
import pytest

from distspec.errors import LayoutError
from distspec.results.scores import Scores
from distspec.results.truth import has_truth, pointing, recovery, truth_windows
from distspec.spectra import Spectra, Status, WaveGrid
from distspec.spectra.segments import uniform_segments
from distspec.store import Layer, SpectraStore, StoreSpec, field_of

ROWS = 100
GRID = WaveGrid("linear", 5000.0, 10.0, 100)  # 5000-5990 Å; ten segments of 100 Å, the first 4995-5095 Å
KINDS = {0: "spike", 1: "spike", 2: "spike", 3: "spike", 10: "bump", 11: "bump", 12: "bump", 50: "dent"}
ASIDE = (3, 99)


def _store(folder: Path, frame: str = "rest", truth: bool = True) -> SpectraStore:
    anomaly = np.array([KINDS.get(row, "") for row in range(ROWS)])
    windows = np.full((ROWS, 4, 2), np.nan, np.float32)
    windows[anomaly == "spike", 0] = (5200.0, 5210.0)  # inside segment 2
    windows[anomaly == "bump", 3] = (5290.0, 5300.0)  # across segments 2 and 3
    windows[anomaly == "dent", 0] = (9000.0, 9100.0)  # off the grid
    status = np.zeros(ROWS, np.int32)
    status[list(ASIDE)] = Status.LOW_SNR
    columns = {"z": np.full(ROWS, 0.25), "status": status}
    if truth:
        stretch = np.float32(1.25 if frame == "observed" else 1.0)
        columns |= {"anomaly": anomaly, "anomaly_wave": windows / stretch}
    store = SpectraStore.create(
        folder / "store.zarr",
        StoreSpec(
            grid=GRID,
            frame=frame,
            rows=ROWS,
            shard_rows=40,
            chunk_rows=40,
            columns={name: field_of(values) for name, values in columns.items()},
            digest="",
            recipe="",
            settings={},
        ),
    )
    flux = np.ones((ROWS, GRID.pixels), np.float32)
    spectra = Spectra(np.arange(ROWS, dtype=np.int64), flux, flux, GRID)
    for shard in range(store.shards):
        part = slice(*store.base.bounds(shard))
        store.write(shard, spectra[part], {name: values[part] for name, values in columns.items()})
    return store


def _scores(store: SpectraStore, **ranked: list[int]) -> Scores:
    """Make a layer whose scores put the given rows on top, in order."""
    layer = store.create_layer("score-x", {"latents": ("f4", (1,))} | dict.fromkeys(ranked, ("f4", ())))
    values = {}
    for name, rows in ranked.items():
        values[name] = np.linspace(0.5, 0.6, ROWS).astype(np.float32)
        values[name][rows] = np.arange(len(rows), 0, -1)
        values[name][list(ASIDE)] = np.nan
    for shard in range(layer.shards):
        part = slice(*layer.bounds(shard))
        latents = np.zeros((part.stop - part.start, 1), np.float32)
        layer.write(shard, {"latents": latents} | {name: column[part] for name, column in values.items()})
    return Scores([layer])


def _explanation(store: SpectraStore, weights: dict[int, dict[int, float]], segments: int = 10) -> Layer:
    """Make a layer of weights: row -> segment -> weight."""
    table = np.zeros((len(weights), 1, segments), np.float32)
    for line, heavy in enumerate(weights.values()):
        for segment, weight in heavy.items():
            table[line, 0, segment] = weight
    segment_of = uniform_segments(GRID.pixels, segments).tolist()
    attributes = {"segment_of": segment_of, "names": ["mse"], "method": "lime"}
    fields = {"row": ("i8", ()), "rank": ("i8", (1,)), "weights": ("f4", (1, segments))}
    layer = store.create_layer("explain-lime-x", fields, attributes, rows=len(weights), shard_rows=len(weights))
    rank = np.arange(len(weights))[:, None]
    layer.write(0, {"row": np.array(list(weights), dtype=np.int64), "rank": rank, "weights": table})
    return layer


@pytest.fixture
def store(tmp_path: Path) -> SpectraStore:
    return _store(tmp_path)


def test_recall_counts_what_the_top_lists_hold(store: SpectraStore) -> None:
    scores = _scores(store, mse=[0, 1, 20, 10, 21], chi2=[10, 11, 12, 0, 22, 50])
    found = recovery(store, scores, 0.05)
    assert found.listed == 5  # of 98
    assert found.planted == {"bump": 3, "dent": 1, "spike": 3}
    assert found.set_aside == {"bump": 0, "dent": 0, "spike": 1}
    assert found.found == {
        "mse": {"bump": 1, "dent": 0, "spike": 2},
        "chi2": {"bump": 3, "dent": 0, "spike": 1},
    }
    assert found.counts("mse") == (3, 7)
    assert found.recall("chi2", ["bump"]) == 1.0
    assert np.isnan(found.recall("chi2", ["none of these"]))


def test_the_best_score_finds_most_strong_ones_then_most_of_all(store: SpectraStore) -> None:
    scores = _scores(store, mse=[0, 1, 20, 10, 21], chi2=[10, 11, 12, 0, 22], relative=[10, 0, 1, 11, 12])
    found = recovery(store, scores, 0.05)
    assert found.best(["bump"]) == "relative"  # three, as chi2, but five of all
    assert found.best(["spike"]) == "relative"  # two, as mse
    assert found.best(["dent"]) == "relative"


@pytest.mark.parametrize("frame", ["rest", "observed"])
def test_pointing_compares_the_heaviest_segment_with_the_windows(tmp_path: Path, frame: str) -> None:
    store = _store(tmp_path, frame)
    weights = {
        0: {2: 5.0, 7: 1.0},  # both right
        1: {2: 1.0, 7: -5.0},  # heaviest elsewhere, heaviest positive right
        2: {2: -5.0},  # heaviest right, nothing positive
        10: {3: 2.0},  # the window's second segment
        11: {4: 2.0},  # wrong
        30: {2: 9.0},  # not planted
        50: {2: 9.0},  # planted outside the grid: nothing to point at
    }
    (told,) = pointing(store, _explanation(store, weights))
    assert told.explained == {"bump": 2, "dent": 0, "spike": 3}
    assert told.heaviest == {"bump": 1, "dent": 0, "spike": 2}
    assert told.positive == {"bump": 1, "dent": 0, "spike": 2}
    assert told.chance == pytest.approx({"bump": 0.2, "dent": 0.0, "spike": 0.1})
    assert told.total() == (5, 3, 3, pytest.approx(0.14))


def test_no_planted_spectrum_explained_is_no_error(store: SpectraStore) -> None:
    (told,) = pointing(store, _explanation(store, {30: {2: 1.0}}))
    assert told.explained == {}
    assert told.total()[:3] == (0, 0, 0)


def test_windows_move_with_the_redshift_on_an_observed_grid(tmp_path: Path) -> None:
    windows = truth_windows(_store(tmp_path, "observed"), np.array([0]))
    np.testing.assert_allclose(windows[0, 0], (5200.0, 5210.0), rtol=1e-6)
    assert np.isnan(windows[0, 1:]).all()


def test_a_survey_without_truth_is_refused(tmp_path: Path) -> None:
    store = _store(tmp_path, truth=False)
    assert not has_truth(store)
    with pytest.raises(LayoutError, match="only a simulated survey"):
        recovery(store, _scores(store, mse=[0]))
