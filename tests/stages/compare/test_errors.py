"""Errors of a survey read in blocks equal those of numpy on the whole of it."""

from pathlib import Path

import numpy as np
import pytest

from distspec.config import Errors
from distspec.stages.compare import errors as residuals
from distspec.stages.compare.errors import MEASURES, Residuals, measure_residuals
from distspec.stages.train.accuracy import Accuracy
from tests.support.surveys import make_layer, make_survey

ROWS = 1_000
ASIDE = np.arange(ROWS) % 40 == 7


@pytest.fixture
def errors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    rmse = rng.lognormal(-3.8, 0.35, ROWS).astype(np.float32)
    rmse[[5, 900]] = 0.9, 1.4
    difference = (0.002 * rng.standard_t(3, ROWS) - 0.001).astype(np.float32)
    rmse[ASIDE] = difference[ASIDE] = np.nan
    return {"rmse": rmse, "difference": difference}


@pytest.fixture
def snr(rng: np.random.Generator) -> np.ndarray:
    """Signal-to-noise ratios with many ties, some of them where the thirds meet; some are unknown."""
    snr = np.round(rng.lognormal(1.0, 0.7, ROWS)).astype(np.float32)
    snr[::90] = np.nan
    return snr


def measure(
    folder: Path,
    errors: dict[str, np.ndarray],
    columns: dict[str, np.ndarray],
    shard_rows: int = 300,
    **settings: float,
) -> Residuals:
    store = make_survey(folder, columns, shard_rows)
    found = measure_residuals(store, make_layer(store, "score-x", errors), Errors(**settings))
    assert found is not None
    return found


def test_statistics_are_those_of_numpy(
    tmp_path: Path, errors: dict[str, np.ndarray], snr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residuals, "_BLOCK", 64)
    found = measure(tmp_path, errors, {"snr": snr}).facts
    rmse, difference = (errors[name][~ASIDE].astype(np.float64) for name in ("rmse", "difference"))
    # The table of a training on the same spectra is made by sorting them all.
    whole = Accuracy(
        rows=np.flatnonzero(~ASIDE),
        mse=rmse**2,
        difference=difference,
        snr=snr[~ASIDE].astype(np.float64),
        left=0.0,
        flux=np.ones(1),
        flux2=np.ones(1),
        count=np.ones(1),
        unit="",
    ).table()
    assert found["spectra"] == len(rmse) == whole["spectra"]
    for row, expected in whole["statistics"].items():
        assert found["statistics"][row] == pytest.approx(expected, rel=1e-9), row
    assert [part["spectra"] for part in found["snr_bins"]] == [part["spectra"] for part in whole["snr_bins"]]
    for part, expected in zip(found["snr_bins"], whole["snr_bins"], strict=True):
        assert part == pytest.approx(expected, rel=1e-9)


def test_histograms_count_every_spectrum_once(
    tmp_path: Path, errors: dict[str, np.ndarray], snr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residuals, "_BLOCK", 100)
    found = measure(tmp_path, errors, {"snr": snr}, sigma=3.0).facts
    rmse = errors["rmse"][~ASIDE].astype(np.float64)
    values = {"mse": rmse**2, "rmse": rmse, "difference": errors["difference"][~ASIDE].astype(np.float64)}
    for name in MEASURES:
        told = found["histograms"][name]
        np.testing.assert_array_equal(told["counts"], np.histogram(values[name], told["edges"])[0])
        assert told["below"] == (values[name] < told["edges"][0]).sum()
        assert told["above"] == (values[name] > told["edges"][-1]).sum()
        assert sum(told["counts"]) + told["below"] + told["above"] == len(rmse)
    # Every cut can be drawn.
    low, high = found["cuts"]["difference"]
    edges = found["histograms"]["difference"]["edges"]
    assert edges[0] < low < high < edges[-1]
    assert found["histograms"]["rmse"]["edges"][-1] > found["cuts"]["rmse"]


@pytest.mark.parametrize(("rmse_limit", "sigma"), [(None, 3.0), (0.05, 2.0), (10.0, 1.0)])
def test_lists_hold_what_is_beyond_the_cuts_largest_first(
    tmp_path: Path, errors: dict[str, np.ndarray], rmse_limit: float | None, sigma: float
) -> None:
    settings = {"sigma": sigma} if rmse_limit is None else {"sigma": sigma, "rmse": rmse_limit}
    found = measure(tmp_path, errors, {"z": np.zeros(ROWS)}, **settings)
    rmse, difference = (errors[name].astype(np.float64) for name in ("rmse", "difference"))
    mean, std = np.nanmean(difference), np.nanstd(difference)
    limit = np.nanmean(rmse) + sigma * np.nanstd(rmse) if rmse_limit is None else rmse_limit
    odd = np.flatnonzero(np.abs(difference - mean) > sigma * std)
    bad = np.flatnonzero(rmse > limit)
    assert found.facts["cuts"]["rmse"] == pytest.approx(limit)
    assert found.facts["cuts"]["rmse_is_set"] == (rmse_limit is not None)
    assert found.facts["beyond"] == {"difference": len(odd), "rmse": len(bad), "either": len(set(odd) | set(bad))}
    first = odd[np.argsort(-np.abs(difference[odd] - mean), kind="stable")]
    then = [row for row in bad[np.argsort(-rmse[bad], kind="stable")] if row not in first]
    np.testing.assert_array_equal(found.rows, [*first, *then])
    np.testing.assert_array_equal(found.rmse, errors["rmse"][found.rows])
    np.testing.assert_allclose(found.sigmas, (difference[found.rows] - mean) / std)
    assert np.isnan(found.snr).all() and found.facts["snr_bins"] == []  # the store has none


def test_long_lists_keep_the_largest_errors_and_count_all(
    tmp_path: Path, errors: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residuals, "LISTED", 5)
    found = measure(tmp_path, errors, {"z": np.zeros(ROWS)}, sigma=0.5)
    rmse = np.where(ASIDE, -1, errors["rmse"])
    assert found.facts["beyond"]["either"] > 100
    assert found.facts["listed"] == len(found.rows) <= 10
    assert set(np.argsort(-rmse)[:5]) <= set(found.rows)


def test_the_cut_of_the_store_changes_no_bit(
    tmp_path: Path, errors: dict[str, np.ndarray], snr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residuals, "_BLOCK", 128)
    first, *others = (measure(tmp_path / str(rows), errors, {"snr": snr}, rows) for rows in (1_000, 334, 70))
    for other in others:
        assert other.facts == first.facts
        np.testing.assert_array_equal(other.rows, first.rows)


def test_a_survey_of_one_value_has_no_spread(tmp_path: Path) -> None:
    same = {"rmse": np.full(3, 0.5), "difference": np.zeros(3)}
    found = measure(tmp_path, same, {"snr": np.full(3, 9.0, np.float32)})
    assert found.facts["statistics"]["std"] == {"mse": 0.0, "rmse": 0.0, "difference": 0.0}
    assert found.facts["beyond"]["either"] == 0
    assert all(sum(told["counts"]) == 3 for told in found.facts["histograms"].values())
    assert [part["spectra"] for part in found.facts["snr_bins"]] == [1, 1, 1]


def test_nothing_scored_has_no_errors(tmp_path: Path) -> None:
    store = make_survey(tmp_path, {"snr": np.ones(4, np.float32)})
    empty = np.full(4, np.nan)
    assert (
        measure_residuals(store, make_layer(store, "score-x", {"rmse": empty, "difference": empty}), Errors()) is None
    )
