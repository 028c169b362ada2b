"""How many anomalies the overlaps of lists tell of, against exact chances and random draws."""

import json
import math
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distspec.statistics.overlap import curve, estimate, joint, overlap_moments, overlaps
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


def test_intervals_keep_their_digits_in_a_large_survey() -> None:
    g, k = 2_000, 3
    found = estimate(k, g, g)

    def log_likelihood(n: int) -> float:
        return math.log(Fraction(math.comb(g, k) * math.comb(n - g, g - k), math.comb(n, g)))

    assert found.n is not None
    best = log_likelihood(found.n)
    assert all(log_likelihood(found.n + step) <= best for step in (-1, 1))
    for (low, high), drop in ((found.within68, 0.5), (found.within95, 1.92)):
        assert high is not None
        inside, outside = [low, high], [low - 1, high + 1]
        assert [log_likelihood(n) >= best - drop for n in inside + outside] == [True, True, False, False]


@pytest.mark.parametrize(("n", "sd"), [(10_000, 4.75), (12_500, 4.29), (1_000, 7.9)])
def test_spread_of_overlap(n: int, sd: float) -> None:
    mean, spread = overlap_moments(n, 500, 500)
    assert mean == 500**2 / n
    assert spread == pytest.approx(sd, abs=0.01)
    unequal = overlap_moments(n, 500, 30)
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("why", "call"),
    [
        ("each once", lambda: overlaps({"a": np.array([1, 2, 1])})),
        ("whole row numbers", lambda: overlaps({"a": np.array([1.0, 2.0])})),
        ("whole row numbers", lambda: overlaps({"a": np.array([1, 2], np.uint64)})),  # numpy would join these as floats
        ("0 <= shared", lambda: estimate(-1, 5, 5)),
        ("0 <= shared", lambda: estimate(6, 5, 9)),
        ("no more rows than spectra", lambda: estimate(1, 5, 5, 8)),
        ("none longer", lambda: overlap_moments(10, 11, 5)),
        ("two or more", lambda: joint({})),
        ("two or more", lambda: joint({"a": np.arange(3)})),
        ("none empty", lambda: joint({"a": np.arange(3), "b": np.arange(0)})),
        ("no more rows than spectra", lambda: joint({"a": np.arange(3), "b": np.arange(2, 5)}, 4)),
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
    ]
    for one in found:
        plain = one.to_dict()
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert found[1].to_dict()["n"] is None
    assert found[2].to_dict()["overlaps"] == shared.tolist()
