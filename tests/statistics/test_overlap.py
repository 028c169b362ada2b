"""How many anomalies the overlaps of lists tell of, what lists lean towards, and how detectors join to one."""

import json
import math
from collections.abc import Callable
from fractions import Fraction
from functools import reduce
from itertools import combinations, product
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from distspec.statistics.ensembles import Survivors, rank_mean, rank_union
from distspec.statistics.overlap import curve, estimate, joint, log_probability, overlaps, spread_of_overlap
from distspec.statistics.significance import concentration, holm, uniformity
from distspec.statistics.summaries import TopK


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def draws(rng: np.random.Generator, n: int, *lengths: int) -> dict[str, np.ndarray]:
    """Draw lists at random from n rows, whose numbers do not matter."""
    return {f"list {place}": 7 * rng.choice(n, g, replace=False) for place, g in enumerate(lengths)}


def covers(interval: tuple[int, int | None], n: int) -> bool:
    low, high = interval
    return low <= n and (high is None or n <= high)


def test_overlaps_count_shared_rows_of_lists_of_any_length(rng: np.random.Generator) -> None:
    lists = draws(rng, 300, 80, 120, 10, 0)
    expected = [[len(set(a) & set(b)) for b in lists.values()] for a in lists.values()]
    np.testing.assert_array_equal(overlaps(lists), expected)
    huge = 2**60  # beyond what a float tells apart
    lists = {"a": np.array([huge, huge + 1, 5]), "b": np.array([5, huge + 1]), "c": np.array([huge + 2])}
    np.testing.assert_array_equal(overlaps(lists), [[3, 2, 0], [2, 2, 0], [0, 0, 1]])


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5_000), st.data())
def test_log_probability_is_that_of_scipy(g1: int, g2: int, more: int, data: st.DataObject) -> None:
    n = max(g1, g2, 1) + more
    k = data.draw(st.integers(0, min(g1, g2) + 1))
    expected = stats.hypergeom.logpmf(k, n, g1, g2)
    assert log_probability(k, n, g1, g2) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_log_probability_keeps_its_digits_in_a_large_survey() -> None:
    n, g, k = 50_000_000, 2_000, 3
    exact = Fraction(math.comb(g, k) * math.comb(n - g, g - k), math.comb(n, g))
    assert log_probability(k, n, g, g) == pytest.approx(math.log(exact), rel=1e-11)


@pytest.mark.parametrize(("n", "sd"), [(10_000, 4.75), (12_500, 4.29), (1_000, 7.9)])
def test_spread_of_overlap(n: int, sd: float) -> None:
    mean, spread = spread_of_overlap(n, 500, 500)
    assert mean == 500**2 / n
    assert spread == pytest.approx(sd, abs=0.01)
    unequal = spread_of_overlap(n, 500, 30)
    assert unequal == pytest.approx([stats.hypergeom.mean(n, 500, 30), stats.hypergeom.std(n, 500, 30)], rel=1e-9)


@pytest.mark.parametrize(
    ("k", "n", "chapman", "low", "high", "paper"),
    [
        (8, 31_249, 27_888, 22_500, 45_300, 31_716),
        (20, 12_499, 11_951, 10_200, 15_600, 12_500),
        (29, 8_620, 8_366, 7_300, 10_300, 8_525),
    ],
)
def test_overlaps_of_reis_et_al(k: int, n: int, chapman: int, low: int, high: int, paper: int) -> None:
    found = estimate(k, 500, 500)
    assert (found.shared, found.n) == (k, n)
    assert found.chapman == pytest.approx(chapman, abs=0.5)
    assert found.within68 == (pytest.approx(low, abs=50), pytest.approx(high, abs=50))
    assert found.n == pytest.approx(paper, rel=0.02)


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 12))
def test_the_most_likely_number_is_exact(k: int, more1: int, more2: int) -> None:
    g1, g2 = k + more1, k + more2
    # 2 g1 g2 / k lies beyond the maximum, and fractions of integers know no rounding.
    numbers = range(g1 + g2 - k, 2 * g1 * g2 // k + 2)
    chance = [Fraction(math.comb(n - g1, g2 - k), math.comb(n, g2)) for n in numbers]
    found = estimate(k, g1, g2).n
    assert found == numbers[chance.index(max(chance))]
    assert found in (g1 * g2 // k, g1 * g2 // k - 1)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(0, 60), st.integers(0, 60), st.booleans())
def test_intervals_are_those_of_a_grid(k: int, more1: int, more2: int, capped: bool) -> None:
    g1, g2 = k + more1, k + more2
    least = g1 + g2 - k
    most = least + 40 if capped else None
    found = estimate(k, g1, g2, most)
    grid = np.arange(least, (most or 30 * g1 * g2 // k + 30) + 1)
    logs = stats.hypergeom.logpmf(k, grid, g1, g2)
    assert logs[np.flatnonzero(grid == found.n)] == pytest.approx(logs.max(), abs=1e-9)
    for interval, drop in ((found.within68, 0.5), (found.within95, 1.92)):
        inside = grid[logs >= logs.max() - drop]
        assert interval == (inside[0], inside[-1])


def test_lists_that_share_nothing_give_a_lower_bound() -> None:
    found = estimate(0, 500, 500)
    assert (found.n, found.within95[1]) == (None, None)
    assert found.within95[0] == pytest.approx(500**2 / 3, rel=0.01)
    for (low, _), chance in ((found.within68, 0.32), (found.within95, 0.05)):
        assert stats.hypergeom.pmf(0, low, 500, 500) >= chance > stats.hypergeom.pmf(0, low - 1, 500, 500)


def test_there_are_no_more_anomalies_than_spectra() -> None:
    assert estimate(0, 500, 500, 100_000).within95 == (estimate(0, 500, 500).within95[0], 100_000)
    assert estimate(0, 500, 500, 2_000).within95 == (2_000, 2_000)
    capped, free = estimate(8, 500, 500, 40_000), estimate(8, 500, 500)
    assert (capped.n, capped.within68) == (free.n, (free.within68[0], 40_000))
    beyond = estimate(8, 500, 500, 5_000)
    assert (beyond.n, beyond.within68[1]) == (5_000, 5_000)
    assert beyond.within68[0] < 5_000


def test_lists_with_all_in_common_have_all_there_is() -> None:
    assert estimate(500, 500, 500).n == 500
    assert estimate(500, 500, 500).within95 == (500, 500)
    assert estimate(30, 30, 400).n == 400


def test_random_draws_find_the_number_that_they_are_drawn_from(rng: np.random.Generator) -> None:
    n, g1, g2 = 10_000, 500, 600
    counts = [len(np.intersect1d(*draws(rng, n, g1, g2).values())) for _ in range(300)]
    found = [estimate(k, g1, g2) for k in counts]
    assert 0.58 < np.mean([covers(one.within68, n) for one in found]) < 0.78
    assert np.mean([covers(one.within95, n) for one in found]) > 0.9
    # Chapman's estimate has no bias to speak of; the scatter of one is 18 %.
    assert np.mean([one.chapman for one in found]) == pytest.approx(n, rel=3 * 0.18 / math.sqrt(300))


def test_two_lists_are_a_pair(rng: np.random.Generator) -> None:
    lists = draws(rng, 2_000, 200, 150)
    found = joint(lists)
    pair = estimate(int(overlaps(lists)[0, 1]), 200, 150)
    for one in (found.pairs, found.whole):
        assert (one.n, one.within68, one.within95) == (pair.n, pair.within68, pair.within95)
    assert (found.without, found.methods68, found.methods95) == ({}, None, None)


@settings(deadline=None, max_examples=30)
@given(st.integers(12, 200), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_pairs_have_one_maximum_which_is_that_of_a_grid(n: int, lists: int, seed: int) -> None:
    found = joint(draws(np.random.default_rng(seed), n, *[12] * lists))
    grid = np.arange(found.distinct, 20_000)
    above = found.overlaps[np.triu_indices(lists, 1)]
    logs = np.sum([stats.hypergeom.logpmf(k, grid, 12, 12) for k in above], axis=0)
    assert found.pairs.shared == above.sum()
    assert found.mean == pytest.approx(above.mean())
    if found.pairs.n is None:
        assert above.sum() == 0
        return
    assert logs[grid == found.pairs.n] == pytest.approx(logs.max(), abs=1e-9)
    inside = grid[logs >= logs.max() - 0.5]
    assert found.pairs.within68 == (inside[0], inside[-1])
    assert len(inside) == np.ptp(inside) + 1


def test_the_whole_likelihood_is_that_of_all_ways_to_draw() -> None:
    """Three lists of two have four distinct rows: count in how many ways this comes about in pools of each size."""
    chance = {}
    for n in range(4, 11):
        ways = [len(set().union(*three)) for three in product(combinations(range(n), 2), repeat=3)]
        chance[n] = np.mean(np.array(ways) == 4)
    found = joint({"a": np.array([1, 2]), "b": np.array([2, 3]), "c": np.array([3, 4])}).whole
    assert found.n == max(chance, key=lambda n: chance[n])
    inside = [n for n in chance if math.log(chance[n] / chance[found.n]) >= -0.5]
    assert found.within68 == (inside[0], inside[-1])


def test_many_lists_find_the_number_that_they_are_drawn_from(rng: np.random.Generator) -> None:
    n, g = 10_000, 500
    found = [joint(draws(rng, n, g, g, g, g)) for _ in range(300)]
    for one in ("pairs", "whole"):
        assert 0.58 < np.mean([covers(getattr(each, one).within68, n) for each in found]) < 0.78
        inverse = np.array([1 / getattr(each, one).n for each in found])
        assert inverse.mean() == pytest.approx(1 / n, abs=3 * inverse.std() / math.sqrt(300))
    # Too wide where methods do not differ (Efron & Stein), so at least what they promise.
    assert np.mean([covers(each.methods68, n) for each in found]) > 0.68
    assert np.mean([covers(each.methods95, n) for each in found]) > 0.95


def test_each_list_is_left_out_in_turn_and_the_jackknife_is_that_of_the_textbook(rng: np.random.Generator) -> None:
    lists = draws(rng, 900, 100, 120, 90, 100)
    found = joint(lists)
    for name in lists:
        others = {other: rows for other, rows in lists.items() if other != name}
        assert found.without[name] == joint(others).pairs.n
    inverse = 1 / np.array(list(found.without.values()))
    error = math.sqrt(3 / 4 * ((inverse - inverse.mean()) ** 2).sum())
    for interval, level in ((found.methods68, 0.6827), (found.methods95, 0.95)):
        ends = 1 / found.pairs.n + np.array(stats.t.interval(level, 3)) * error
        assert interval is not None
        assert interval[0] == pytest.approx(1 / ends[1], abs=1)
        assert interval[1] == (pytest.approx(1 / ends[0], abs=1) if ends[0] > 0 else None)


def test_a_shared_leaning_lowers_n_and_only_the_jackknife_sees_that_methods_differ(rng: np.random.Generator) -> None:
    n, g = 10_000, 500
    liked = rng.gamma(0.5, size=(2, n))
    lists = {str(one): np.argsort(rng.exponential(size=n) / liked[one % 2])[:g] for one in range(5)}
    found = joint(lists)
    assert found.pairs.within95[1] < n
    assert np.ptp(found.methods68) > 2 * np.ptp(found.pairs.within68)


def test_many_lists_that_share_nothing() -> None:
    found = joint({str(start): np.arange(start, start + 50) for start in (0, 50, 100)}, most=100_000)
    assert (found.pairs.n, found.whole.n, found.methods68) == (None, None, None)
    assert found.without == {"0": None, "50": None, "100": None}
    low, high = found.pairs.within95
    below, there = (stats.hypergeom.pmf(0, n, 50, 50) ** 3 for n in (low - 1, low))
    assert below < 0.05 <= there
    assert high == 100_000
    # Two equal lists and one apart: all depends on which is left out, and nothing bounds n from above.
    one = joint({"a": np.arange(50), "b": np.arange(50), "c": np.arange(50, 100)})
    assert (one.without, one.methods68) == ({"a": None, "b": None, "c": 50}, (100, None))


def test_the_curve_is_the_joint_estimate_at_each_length(rng: np.random.Generator) -> None:
    scores = rng.normal(size=(3, 2_000)).astype(np.float32)
    ranked = {str(one): TopK.of(400, np.arange(2_000), scores[one]).rows for one in range(3)}
    found = curve(ranked, (300, 100, 200, 1_000))
    assert list(found) == [100, 200, 300]
    for size, one in found.items():
        expected = joint({name: rows[:size] for name, rows in ranked.items()})
        assert (one.pairs, one.whole, one.mean) == (expected.pairs, expected.whole, expected.mean)
    assert curve({}, (10,)) == {}


def test_false_positives_at_the_end_of_lists_raise_the_curve(rng: np.random.Generator) -> None:
    real = draws(rng, 2_000, *[400] * 4)
    false = [10**6 + rng.choice(10**6, 400, replace=False) for _ in real]
    ranked = {name: np.concatenate([real[name], rows]) for name, rows in zip(real, false, strict=True)}
    found = curve(ranked, (400, 600, 800))
    assert found[400].pairs.n == pytest.approx(2_000, rel=0.15)
    assert found[400].pairs.within95[1] < found[600].pairs.n < found[800].pairs.n


def test_the_distance_is_that_of_scipy(rng: np.random.Generator) -> None:
    total = 10**6
    ranks = (total * rng.beta(1.0, 1.4, 100)).astype(np.int64)
    found, expected = uniformity(ranks, total), stats.kstest((ranks + 0.5) / total, "uniform")
    assert found.distance == pytest.approx(expected.statistic, abs=1e-6)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-3)
    assert found.critical == pytest.approx(stats.kstwo.isf(0.05, 100), rel=1e-3)
    assert found.critical == pytest.approx(0.136, rel=0.02)  # 1.358/√100 is the limit of large numbers
    assert found.mean == pytest.approx(((ranks + 0.5) / total).mean())
    np.testing.assert_array_equal(found.counts, np.histogram(ranks, np.arange(11) * total // 10)[0])


def test_random_lists_lean_nowhere(rng: np.random.Generator) -> None:
    found = [uniformity(rng.choice(50_000, 100, replace=False), 50_000) for _ in range(400)]
    assert stats.kstest([one.p for one in found], "uniform").pvalue > 0.01
    assert 0.02 < np.mean([one.distance > one.critical for one in found]) < 0.08
    counts = np.array([one.counts for one in found])
    np.testing.assert_allclose(counts.mean(axis=0), found[0].expected, atol=4 * 3 / math.sqrt(400))
    np.testing.assert_allclose(counts.std(axis=0), found[0].sd, rtol=0.15)


def test_a_leaning_list_is_told_with_its_direction() -> None:
    high, low = uniformity(np.arange(900, 1_000), 1_000), uniformity(np.arange(100), 1_000)
    assert high.p < 1e-50
    assert (high.mean, low.mean) == (pytest.approx(0.95), pytest.approx(0.05))
    assert (high.counts[9], low.counts[0]) == (100, 100)
    whole = uniformity(np.arange(13), 13)  # nothing is left to chance in a list of all
    np.testing.assert_allclose([whole.counts, whole.expected], [[1, 1, 1, 2, 1, 1, 2, 1, 1, 2]] * 2)
    np.testing.assert_allclose(whole.sd, 0)


def test_ties_are_no_bias(rng: np.random.Generator) -> None:
    """A property of three values, whose middle ranks alone would be far from uniform."""
    values = np.sort(rng.choice(3, 9_000, p=[0.6, 0.3, 0.1]))
    firsts, counts = np.searchsorted(values, range(3)), np.bincount(values)
    chosen = [rng.choice(values, 100, replace=False) for _ in range(200)]
    found = [uniformity(firsts[those], 9_000, counts[those]) for those in chosen]
    assert np.mean([one.p < 0.05 for one in found]) <= 0.05
    np.testing.assert_allclose([one.counts.sum() for one in found], 100)
    assert uniformity(firsts[np.full(100, 2)], 9_000, counts[np.full(100, 2)]).p < 1e-20
    assert uniformity(np.zeros(9, np.int64), 50, np.full(9, 50)).p == 1


def test_holm() -> None:
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.5, np.nan, 0.9])), [1.0, np.nan, 1.0])
    np.testing.assert_allclose(holm(np.array([0.001, 0.002]), tests=100), [0.1, 0.198])
    assert len(holm(np.zeros(0))) == 0


def test_a_planted_plate_is_found_and_named(rng: np.random.Generator) -> None:
    plates, counts = np.arange(266, 1_266), rng.integers(200, 640, 1_000)
    random = rng.choice(np.repeat(plates, counts), 92, replace=False)
    members = np.concatenate([random, np.full(8, 777)])
    shuffled = rng.permutation(1_000)
    for text in (False, True):
        labels = plates.astype(str) if text else plates
        found = concentration(members.astype(labels.dtype), labels[shuffled], counts[shuffled])
        (group,) = found.groups
        assert group == found.largest
        assert (group.label, group.members) == ("777" if text else 777, np.sum(members == 777))
        assert group.expected == pytest.approx(100 * counts[777 - 266] / counts.sum())
        assert found.p == group.p < 1e-8


def test_chances_of_groups_are_exact() -> None:
    counts = np.array([640, 300, 5, 2, 1_053])
    found = concentration(np.array([0, 0, 0, 0, 2, 2, 4, 4, 4, 1]), np.arange(5), counts, limit=1.1)
    total, chance = int(counts.sum()), {}
    for label, held in ((0, 4), (2, 2), (4, 3)):
        count = int(counts[label])
        ways = sum(math.comb(count, j) * math.comb(total - count, 10 - j) for j in range(held, 11))
        chance[label] = ways / math.comb(total, 10)
        assert chance[label] == pytest.approx(stats.hypergeom.sf(held - 1, total, count, 10), rel=1e-9)
    order = sorted(chance, key=lambda label: chance[label])
    assert [group.label for group in found.groups] == order
    corrected = np.minimum(np.maximum.accumulate([chance[label] * (5 - i) for i, label in enumerate(order)]), 1)
    assert [group.p for group in found.groups] == pytest.approx(corrected.tolist(), rel=1e-9)
    assert found.labels == 5
    apart = concentration(np.arange(3), np.arange(5), counts)
    assert (apart.p, apart.largest, apart.groups) == (1.0, None, ())


def test_random_lists_come_together_nowhere(rng: np.random.Generator) -> None:
    counts = rng.integers(1, 640, 500)
    survey = np.repeat(np.arange(500), counts)
    found = [concentration(rng.choice(survey, 300, replace=False), np.arange(500), counts, 0.05) for _ in range(200)]
    assert np.mean([bool(one.groups) for one in found]) <= 0.05


# --- detectors joined -------------------------------------------------------------------------------------------------

NAN = np.float32(np.nan)


def test_ensembles_of_known_shares() -> None:
    shares = np.array([[0.1, 0.1], [0.001, 0.199], [0.5, 1.0], [NAN, NAN]], np.float32)
    np.testing.assert_allclose(rank_mean(shares), [1, 1, -math.log10(0.75), NAN], rtol=1e-5)
    np.testing.assert_allclose(rank_union(shares), [1, 3, -math.log10(0.5), NAN], rtol=1e-5)
    assert rank_mean(shares).dtype == rank_union(shares).dtype == np.float32


def test_the_union_list_is_the_union_of_lists(rng: np.random.Generator) -> None:
    ranks = np.stack([rng.permutation(1_000) for _ in range(3)], axis=1) + 1
    joined = rank_union((ranks / 1_000).astype(np.float32))
    union = set(np.flatnonzero((ranks <= 50).any(axis=1)))
    assert set(TopK.of(len(union), np.arange(1_000), joined).rows) == union


def test_the_mean_orders_as_one_minus_the_mean_share_and_survives_float32() -> None:
    """The first hundred thousand of fifty million stay apart, which 1 - share in float32 would not keep."""
    share = (np.arange(1, 100_001) / 50_000_000).astype(np.float32)
    for joined in (rank_mean, rank_union):
        assert (np.diff(joined(np.stack([share, share], axis=1))) < 0).all()
    assert len(np.unique(np.float32(1) - share)) < 40_000


def test_one_detector_joins_to_its_own_order(rng: np.random.Generator) -> None:
    scores = rng.normal(size=500).astype(np.float32)
    share = Survivors.count(np.unique(scores), scores).shares(scores)[:, None]
    for joined in (rank_mean, rank_union):
        np.testing.assert_array_equal(np.argsort(joined(share)), np.argsort(scores))


some = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf])
scored = arrays(np.float32, st.integers(1, 40), elements=some)


@given(scored)
def test_shares_are_exact_where_all_values_are_edges(values: np.ndarray) -> None:
    expected = stats.rankdata(-values.astype(np.float64), "average") / len(values)
    found = Survivors.count(np.unique(values), values).shares(values)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@given(scored, st.integers(0, 40))
def test_shares_fall_as_values_rise_and_top_edges_make_the_top_exact(values: np.ndarray, top: int) -> None:
    ordered = np.unique(values)
    edges = np.unique(np.concatenate([ordered[::5], ordered[len(ordered) - min(top, len(ordered)) :]]))
    found = Survivors.count(edges, values).shares(ordered)
    assert (np.diff(found) <= 0).all()
    assert ((found > 0) & (found <= 1)).all()
    expected = Survivors.count(ordered, values).shares(edges)
    np.testing.assert_array_equal(found[np.isin(ordered, edges)], expected)


def test_shares_between_edges_are_linear(rng: np.random.Generator) -> None:
    values = rng.uniform(size=20_000).astype(np.float32)
    edges = np.linspace(0, 1, 21, dtype=np.float32)
    found = Survivors.count(edges, values).shares(values)
    np.testing.assert_allclose(found, stats.rankdata(-values) / 20_000, atol=0.003)


@given(arrays(np.float32, 40, elements=some | st.just(math.nan)), st.lists(st.integers(0, 40), max_size=5).map(sorted))
def test_survivors_do_not_depend_on_the_cut_and_nan_is_not_counted(values: np.ndarray, where: list[int]) -> None:
    edges = np.array([-math.inf, -1, 0, 2, 1e30], np.float32)
    nothing = Survivors.count(edges, np.zeros(0, np.float32))
    whole = Survivors.count(edges, values)
    merged = reduce(add, [Survivors.count(edges, part) for part in np.split(values, where)], nothing)
    np.testing.assert_array_equal(merged.counts, whole.counts)
    assert whole.counts.sum() == np.sum(~np.isnan(values))
    np.testing.assert_array_equal(np.isnan(whole.shares(values)), np.isnan(values))
    assert np.isnan(nothing.shares(values)).all()


def test_values_beyond_the_survey_have_shares_too() -> None:
    survey = Survivors.count(np.array([1, 2], np.float32), np.array([1, 2, 2], np.float32))
    np.testing.assert_allclose(survey.shares(np.array([9, 2, 1.5, 1, -9], np.float32)) * 3, [0.5, 1.5, 2.5, 3, 3])


def survivors(*edges: float) -> Survivors:
    return Survivors.count(np.array(edges, np.float32), np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("why", "call"),
    [
        ("each once", lambda: overlaps({"a": np.array([1, 2, 1])})),
        ("whole row numbers", lambda: overlaps({"a": np.array([1.0, 2.0])})),
        ("whole row numbers", lambda: overlaps({"a": np.array([1, 2], np.uint64)})),  # numpy would join these as floats
        ("0 <= shared", lambda: estimate(-1, 5, 5)),
        ("0 <= shared", lambda: estimate(6, 5, 9)),
        ("no more rows than spectra", lambda: estimate(1, 5, 5, 8)),
        ("none longer", lambda: spread_of_overlap(10, 11, 5)),
        ("two or more", lambda: joint({})),
        ("two or more", lambda: joint({"a": np.arange(3)})),
        ("none empty", lambda: joint({"a": np.arange(3), "b": np.arange(0)})),
        ("no more rows than spectra", lambda: joint({"a": np.arange(3), "b": np.arange(2, 5)}, 4)),
        ("at least one", lambda: uniformity(np.arange(0), 10)),
        ("whole numbers", lambda: uniformity(np.array([0.5]), 10)),
        ("distinct", lambda: uniformity(np.array([-1]), 10)),
        ("distinct", lambda: uniformity(np.array([10]), 10)),
        ("distinct", lambda: uniformity(np.array([3, 3]), 10)),
        ("distinct", lambda: uniformity(np.array([3, 3, 3]), 10, np.array([2, 2, 2]))),
        ("distinct", lambda: uniformity(np.array([8]), 10, np.array([3]))),
        ("0 to 1", lambda: holm(np.array([0.1, 1.1]))),
        ("0 to 1", lambda: holm(np.array([-0.1]))),
        ("a test for each", lambda: holm(np.array([0.1, 0.2]), tests=1)),
        ("integers", lambda: concentration(np.array([1.0]), np.array([1.0, 2.0]), np.array([3, 3]))),
        ("both to be text", lambda: concentration(np.array(["1"]), np.array([1, 2]), np.array([3, 3]))),
        ("each label once", lambda: concentration(np.array([3]), np.array([1, 2]), np.array([3, 3]))),
        ("each label once", lambda: concentration(np.array([1]), np.array([1, 2, 2]), np.array([3, 3, 3]))),
        ("with its count", lambda: concentration(np.array([1, 1]), np.array([1, 2]), np.array([1, 3]))),
        ("0 < share <= 1", lambda: rank_mean(np.array([[0.5, NAN]], np.float32))),
        ("0 < share <= 1", lambda: rank_union(np.array([[0.0, 0.5]], np.float32))),
        ("0 < share <= 1", lambda: rank_union(np.array([[1.5, 0.5]], np.float32))),
        ("0 < share <= 1", lambda: rank_mean(np.zeros((3, 0), np.float32))),
        ("ascending", lambda: survivors(2, 1)),
        ("ascending", lambda: survivors(1, 1)),
        ("ascending", lambda: survivors(1, NAN)),
        ("same ones", lambda: survivors(1) + survivors(2)),
    ],
)
def test_what_cannot_be_is_refused(why: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"expected .*{why}"):
        call()


def test_everything_becomes_plain_json(rng: np.random.Generator) -> None:
    lists = draws(rng, 900, 100, 100, 100)
    shared = overlaps(lists)
    found = [
        estimate(shared[0, 1], shared[0, 0], shared[1, 1]),
        estimate(0, 5, 5),
        joint(lists, most=np.int64(50_000)),
        uniformity(np.arange(5), 10),
        concentration(np.array(["a", "a"]), np.array(["a", "b"]), np.array([2, 900])),
    ]
    for one in found:
        plain = one.to_dict()
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert found[1].to_dict()["n"] is None
    assert found[2].to_dict()["overlaps"] == shared.tolist()
    assert found[4].to_dict()["groups"][0]["label"] == "a"
