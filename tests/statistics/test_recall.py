"""Recall, area under the curve, half strength and their intervals, against plain loops and known answers."""

from typing import Any

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score

from distspec.statistics.recall import (
    TABLE,
    Trials,
    above,
    chosen_level,
    found,
    group_means,
    half_found,
    host_means,
    interval,
    list_length,
    pointed,
    resampled,
    rising,
    strata,
    stratified,
    summarize,
    table_rows,
    tracked,
)

STRENGTHS = (0.1, 1.0, 10.0)
GROUPS = {"all": ["a", "b"], "objects": ["a"]}


def trials_of(scores: Any, background: Any, possible: Any = None, reference: int = 1) -> Trials:
    """Two kinds, three strengths, as many detectors as there are scores."""
    scores, background = np.asarray(scores, np.float32), np.asarray(background, np.float32)
    possible = np.ones(scores.shape[:3], bool) if possible is None else possible
    names = tuple(f"d{index}" for index in range(scores.shape[3]))
    return Trials(("a", "b"), names, STRENGTHS, reference, scores, possible, background)


# --- one spectrum against the background ------------------------------------------------------------------------------


def test_the_mean_share_below_is_the_area_under_the_curve_also_with_ties(rng: np.random.Generator) -> None:
    planted = rng.integers(0, 12, (60, 3)).astype(np.float32)
    background = rng.integers(0, 10, (200, 3)).astype(np.float32)
    mine = above(planted, background).mean(axis=0)
    truth = np.r_[np.ones(60), np.zeros(200)]
    for index in range(3):
        known = roc_auc_score(truth, np.r_[planted[:, index], background[:, index]])
        assert mine[index] == pytest.approx(known, abs=1e-12)


@pytest.mark.parametrize("level", [0.01, 0.05, 0.5])
def test_found_is_what_fewer_than_the_length_of_the_list_reach(rng: np.random.Generator, level: float) -> None:
    planted = rng.integers(0, 30, (7, 5, 2)).astype(np.float32)
    background = rng.integers(0, 30, (130, 2)).astype(np.float32)
    mine = found(planted, background, level)
    size = int(level * 130)
    for host, strength, detector in np.ndindex(7, 5, 2):
        reaching = sum(value >= planted[host, strength, detector] for value in background[:, detector])
        assert mine[host, strength, detector] == (reaching < size)


def test_a_list_shorter_than_one_spectrum_cannot_be_known() -> None:
    assert np.isnan(found(np.ones((4, 1)), np.zeros((99, 1)), 0.01)).all()
    assert (found(np.ones((4, 1)), np.zeros((100, 1)), 0.01) == 1).all()


def test_rounding_errors_of_a_level_cost_no_place() -> None:
    assert [list_length(100, level) for level in (0.07, 0.29, 0.57, 0.58)] == [7, 29, 57, 58]


def test_tables_show_the_middle_level_if_so_many_spectra_allow_else_the_next() -> None:
    levels = (0.05, 0.001, 0.01)
    assert [chosen_level(size, levels) for size in (10_000, 100, 99, 20, 19)] == [0.01, 0.01, 0.05, 0.05, None]
    assert chosen_level(1000, (0.01, 0.02)) == 0.01


def test_nan_is_the_least_odd_and_infinity_the_oddest() -> None:
    planted, background = np.array([[np.nan], [np.inf]]), np.arange(100.0)[:, None]
    np.testing.assert_array_equal(above(planted, background)[:, 0], [0.0, 1.0])
    np.testing.assert_array_equal(found(planted, background, 0.01)[:, 0], [0.0, 1.0])


def test_a_detector_to_which_all_are_alike_finds_nothing_at_even_odds() -> None:
    alike = np.full((30, 1), 7.0)
    assert found(alike, np.full((200, 1), 7.0), 0.05).sum() == 0
    assert (above(alike, np.full((200, 1), 7.0)) == 0.5).all()


# --- means over hosts -------------------------------------------------------------------------------------------------


def test_the_first_replicate_is_the_sample_and_all_have_its_size() -> None:
    counts = resampled(37, 20, 4)
    assert counts.shape == (21, 37)
    assert (counts[0] == 1).all()
    assert (counts.sum(axis=1) == 37).all()
    np.testing.assert_array_equal(counts, resampled(37, 20, 4))
    assert (counts != resampled(37, 20, 5)).any()


def test_means_over_hosts_are_those_of_plain_loops(rng: np.random.Generator) -> None:
    each, counted = rng.random((2, 9, 3, 4)), rng.random((2, 9, 3)) < 0.6
    counted[1, :, 2] = False
    counts = resampled(9, 6, 0)
    mine = host_means(each, counted, counts)
    for replicate, kind, strength, detector in np.ndindex(*mine.shape):
        drawn = np.repeat(np.arange(9), counts[replicate].astype(int))
        values = [each[kind, host, strength, detector] for host in drawn if counted[kind, host, strength]]
        expected = np.mean(values) if values else np.nan
        np.testing.assert_allclose(mine[replicate, kind, strength, detector], expected)


def test_a_host_that_does_not_count_may_hold_anything() -> None:
    each, counted = np.ones((1, 4, 1, 1)), np.ones((1, 4, 1), bool)
    each[0, 2], counted[0, 2] = np.nan, False
    np.testing.assert_allclose(host_means(each, counted, np.ones((1, 4))), 1.0)


def test_groups_give_each_known_kind_the_same_weight() -> None:
    means = np.array([0.2, 0.6, np.nan, np.nan]).reshape(1, 4, 1, 1)
    joined = group_means(means, [[0, 1], [1, 2], [2, 3]])[0, :, 0, 0]
    np.testing.assert_allclose(joined, [0.4, 0.6, np.nan])


def test_intervals_cover_the_truth_as_often_as_they_say(rng: np.random.Generator) -> None:
    """Recall of 0.4, 120 hosts: of 300 surveys about 285 intervals should hold it; 270 is 4 σ away."""
    covered = 0
    for survey in range(300):
        each = (rng.random((1, 120, 1, 1)) < 0.4).astype(float)
        _, low, high = interval(host_means(each, np.ones((1, 120, 1), bool), resampled(120, 300, survey))[:, 0, 0, 0])
        covered += low <= 0.4 <= high
    assert 270 <= covered <= 299


def test_an_interval_may_end_in_infinity_and_leaves_unknown_replicates_out() -> None:
    replicates = np.array([1.0, *[0.5] * 10, *[2.0] * 80, *[np.inf] * 10, *[np.nan] * 50])
    value, low, high = interval(replicates)
    assert (value, low, high) == (1.0, 0.5, np.inf)
    assert np.isnan(interval(np.array([np.nan, 1.0, 1.0]))).all()


# --- strength at which half are found ---------------------------------------------------------------------------------


def test_the_rising_fit_is_isotonic_regression(rng: np.random.Generator) -> None:
    values = rng.random((40, 6))
    fit = IsotonicRegression()
    np.testing.assert_allclose(rising(values), [fit.fit_transform(np.arange(6), row) for row in values], atol=1e-12)


@pytest.mark.parametrize(
    ("recall", "expected"),
    [
        ([0.0, 0.5, 1.0], 1.0),
        ([0.25, 0.75, 1.0], 10**-0.5),
        ([0.0, 0.0, 1.0], 10**0.5),
        ([0.0, 0.1, 0.5], 10.0),
        ([0.5, 0.6, 0.7], 0.0),
        ([0.1, 0.2, 0.49], np.inf),
        ([0.1, np.nan, 0.9], np.nan),
        ([0.6, 0.0, 0.9], 10 ** (0.2 / 0.6)),  # falls before it rises: 0.3, 0.3, 0.9
    ],
)
def test_half_strength_is_read_off_the_logarithm(recall: list[float], expected: float) -> None:
    np.testing.assert_allclose(half_found(np.array(recall), np.array(STRENGTHS)), expected)


def test_one_strength_tells_on_which_side_half_lies() -> None:
    found_ = half_found(np.array([[0.4], [0.6]]), np.array([1.0]))
    np.testing.assert_array_equal(found_, [np.inf, 0.0])


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_detector_that_sees_everything_and_one_that_sees_nothing(rng: np.random.Generator) -> None:
    background = np.tile(rng.random((200, 1)), (1, 2))
    scores = np.zeros((2, 20, 3, 2))
    scores[..., 0], scores[..., 1] = 2.0, -1.0
    told = summarize(trials_of(scores, background), GROUPS, (0.001, 0.01, 0.05), resampled(20, 50, 0))
    assert told["listed"] == {"0.001": None, "0.01": 2, "0.05": 10}
    assert told["level"] == 0.01
    seeing, blind = (told["results"][name]["all"] for name in ("d0", "d1"))
    assert seeing["recall"]["0.01"] == [[1.0, 1.0, 1.0]] * 3
    assert seeing["recall"]["0.001"] == [[None, None, None]] * 3
    assert seeing["auc"] == [[1.0, 1.0, 1.0]] * 3
    assert seeing["half"] == ["below", "below", "below"]
    assert blind["recall"]["0.05"] == blind["auc"] == [[0.0, 0.0, 0.0]] * 3
    assert blind["half"] == ["above", "above", "above"]
    assert told["best"]["all"] == {"detector": "d0", "value": [1.0, 1.0, 1.0], "leads": 1.0}


def test_half_strength_of_a_step_lies_between_its_ends(rng: np.random.Generator) -> None:
    scores = np.zeros((2, 40, 3, 1))
    scores[:, :, 2] = 9.0
    told = summarize(trials_of(scores, rng.random((100, 1))), GROUPS, (0.01,), resampled(40, 50, 0))
    assert told["results"]["d0"]["a"]["half"] == pytest.approx([10**0.5] * 3, rel=1e-5)


def test_of_equal_detectors_the_first_is_best_and_none_is_better(rng: np.random.Generator) -> None:
    scores = np.tile(rng.random((2, 30, 3, 1)), (1, 1, 1, 2))
    told = summarize(trials_of(scores, np.tile(rng.random((50, 1)), (1, 2))), GROUPS, (0.1,), resampled(30, 40, 0))
    assert told["best"]["objects"]["detector"] == "d0"
    assert told["best"]["objects"]["leads"] == 1.0


def test_with_too_small_a_background_detectors_are_judged_by_area(rng: np.random.Generator) -> None:
    scores = rng.random((2, 30, 3, 2)) + np.array([0.0, 0.5])
    told = summarize(trials_of(scores, rng.random((9, 2))), GROUPS, (0.01, 0.05), resampled(30, 40, 0))
    assert told["level"] is None
    assert told["results"]["d0"]["a"]["half"] == [None, None, None]
    assert told["best"]["all"]["detector"] == "d1"
    assert told["best"]["all"]["value"] == told["results"]["d1"]["all"]["auc"][1]


def test_hosts_in_which_a_kind_is_not_possible_do_not_count(rng: np.random.Generator) -> None:
    scores, possible = np.zeros((2, 10, 3, 1)), np.ones((2, 10, 3), bool)
    scores[:, :5] = 5.0
    possible[0, 5:] = False
    trials = trials_of(scores, rng.random((100, 1)), possible)
    results = summarize(trials, GROUPS, (0.05,), resampled(10, 30, 0))["results"]["d0"]
    assert [results[name]["recall"]["0.05"][1][0] for name in ("a", "b", "all")] == [1.0, 0.5, 0.75]


def test_strata_are_parts_of_equal_number_in_order(rng: np.random.Generator) -> None:
    values = rng.permutation(31).astype(float)
    values[4] = np.nan
    parts = strata(values, 3)
    assert [len(part) for part in parts] == [10, 10, 10]
    assert 4 not in np.concatenate(parts)
    assert values[parts[0]].max() < values[parts[1]].min() <= values[parts[1]].max() < values[parts[2]].min()
    assert [len(part) for part in strata(np.array([1.0, 2.0]), 3)] == [1, 1]
    assert strata(np.full(5, np.nan), 3) == []


def test_strata_are_measured_on_their_own_hosts(rng: np.random.Generator) -> None:
    """Found in every host of high S/N and in none of low."""
    snr = np.arange(20.0)
    scores = np.where(snr >= 10, 5.0, -5.0)[None, :, None, None] * np.ones((2, 1, 3, 1))
    trials = trials_of(scores, rng.random((100, 1)))
    low, high = stratified(trials, GROUPS, 0.05, resampled(20, 30, 0), {"snr": snr}, 2)
    assert (low["by"], low["low"], low["high"], low["hosts"]) == ("snr", 0.0, 9.0, 10)
    assert low["results"]["d0"]["all"]["recall"] == [0.0, 0.0, 0.0]
    assert high["results"]["d0"]["all"] == {"recall": [1.0, 1.0, 1.0], "auc": [1.0, 1.0, 1.0]}
    (unknown,) = stratified(trials, GROUPS, None, resampled(20, 30, 0), {"snr": snr}, 1)
    assert unknown["results"]["d0"]["a"]["recall"] == [None, None, None]


def test_pointing_counts_hits_of_what_was_explained() -> None:
    hits = np.array([[True, True, False, True], [False, False, False, False]])
    known = np.array([[True, True, True, False], [True, True, False, False]])
    chance = np.where(known, 0.25, 99.0)
    told = pointed(("a", "b"), GROUPS, hits, chance, known, resampled(4, 40, 0))
    assert (told["a"]["hits"], told["a"]["explained"]) == (2, 3)
    assert told["a"]["share"][0] == pytest.approx(2 / 3, abs=1e-6)
    assert told["all"] | {"share": 0} == {"share": 0, "chance": 0.25, "hits": 2, "explained": 5}
    assert told["all"]["share"][0] == pytest.approx(1 / 3, abs=1e-6)
    assert told["b"]["share"] == [0.0, 0.0, 0.0]


def facts_of(rng: np.random.Generator) -> dict[str, Any]:
    """What a file needs of facts."""
    trials = trials_of(rng.random((2, 12, 3, 2)), rng.random((60, 2)))
    counts = resampled(12, 20, 0)
    known = np.ones((2, 12), bool)
    pointing = pointed(("a", "b"), GROUPS, known, np.full((2, 12), 0.5), known, counts)
    return {
        **summarize(trials, GROUPS, (0.01, 0.05), counts),
        "strengths": list(STRENGTHS),
        "strength": 1.0,
        "strata": stratified(trials, GROUPS, 0.05, counts, {"z": np.arange(12.0)}, 2),
        "pointing": [{"name": "lime_x", "regions": 4, "results": pointing}],
    }


def test_the_table_holds_every_number_once(rng: np.random.Generator) -> None:
    facts = facts_of(rng)
    lines = [dict(zip(TABLE, cells, strict=True)) for cells in table_rows(facts)]
    names = 2 * 4  # detectors x (kinds and groups)
    assert len(lines) == names * (3 * 3 + 1) + names * 2 * 2 + 4 * 2
    keys = [tuple(line[key] for key in ("name", "kind", "measure", "level", "strength", "part")) for line in lines]
    assert len(set(keys)) == len(keys)
    (line,) = [line for line, key in zip(lines, keys, strict=True) if key == ("d1", "all", "recall", "0.05", 1.0, "")]
    told = facts["results"]["d1"]["all"]["recall"]["0.05"][1]
    assert [line[end] for end in ("value", "low", "high")] == told
    assert {line["value"] for line in lines if line["measure"] == "recall" and line["level"] == "0.01"} == {None}


def test_what_is_tracked_is_known(rng: np.random.Generator) -> None:
    told = tracked(facts_of(rng))
    assert set(told) == {"recall_d0", "recall_d1", "auc_d0", "auc_d1", "pointing_lime_x"}
    assert told["pointing_lime_x"] == 1.0
    small = summarize(trials_of(rng.random((2, 9, 3, 1)), rng.random((5, 1))), GROUPS, (0.01,), resampled(9, 20, 0))
    assert set(tracked({**small, "strengths": STRENGTHS, "strength": 1.0, "pointing": []})) == {"auc_d0"}
