"""What lists lean towards, against exact chances, scipy and random lists."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from distspec.statistics.significance import concentration, holm, uniformity


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


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


@pytest.mark.parametrize(
    ("why", "call"),
    [
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
    ],
)
def test_what_cannot_be_is_refused(why: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"expected .*{why}"):
        call()


def test_everything_becomes_plain_json() -> None:
    found = [
        uniformity(np.arange(5), 10),
        concentration(np.array(["a", "a"]), np.array(["a", "b"]), np.array([2, 900])),
    ]
    for one in found:
        plain = one.to_dict()
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert found[1].to_dict()["groups"][0]["label"] == "a"
