"""Flat trees lead every row where scikit-learn's own do, and nothing from outside leads out of them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import ExtraTreesRegressor, IsolationForest, RandomForestClassifier

from distspec.detectors import Arrays
from distspec.detectors.classical.trees import Trees, float32_below

pytestmark = pytest.mark.numeric

FEATURES = 6
LARGEST = float(np.finfo(np.float32).max)


def table(rng: np.random.Generator, rows: int = 700) -> np.ndarray:
    """Rows with ties, numbers of very different size, and denormal ones."""
    x = rng.normal(size=(rows, FEATURES))
    x[:, 1] = np.round(x[:, 1])
    x[:, 2] *= 1e-42
    x[:, 3] *= 1e30
    x[:, 4] = rng.choice([0.0, -0.0, 1e-45, 3.0], rows)
    return x.astype(np.float32)


def fitted(kind: str, x: np.ndarray) -> Any:
    y = np.arange(len(x)) % 2
    if kind == "isolation":
        return IsolationForest(n_estimators=15, max_samples=64, random_state=1).fit(x)
    if kind == "extra":
        return ExtraTreesRegressor(n_estimators=15, random_state=1).fit(x, y)
    return RandomForestClassifier(n_estimators=15, random_state=1).fit(x, y)


def count(estimator: Any) -> Any:
    return estimator.tree_.n_node_samples


def node(estimator: Any) -> Any:
    return np.arange(estimator.tree_.node_count)


@pytest.fixture
def trees(rng: np.random.Generator) -> Trees:
    return Trees.of(fitted("forest", table(rng)).estimators_[:3], count)


# --- same leaves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forest", "extra", "isolation"])
def test_leaves_are_those_of_scikit_learn(rng: np.random.Generator, kind: str) -> None:
    estimators = fitted(kind, table(rng)).estimators_
    trees = Trees.of(estimators, node)
    # Rows at each threshold, and at its neighbours on both sides, are the hardest.
    inner = np.flatnonzero(~trees.leaf)
    at = np.concatenate([trees.threshold[inner], np.nextafter(trees.threshold[inner], np.float32(np.inf))])
    hard = table(rng, len(at))
    hard[np.arange(len(at)), np.tile(trees.feature[inner], 2)] = at
    x = np.concatenate([table(rng), hard])
    leaves = trees.leaves(x)
    expected = np.stack([estimator.tree_.apply(x) for estimator in estimators], axis=1)
    np.testing.assert_array_equal(trees.value[leaves], expected)
    np.testing.assert_array_equal(leaves - trees.roots[:-1], expected)
    assert trees.leaf[leaves].all()
    assert leaves.dtype == np.int32


@settings(deadline=None)
@given(st.floats(-LARGEST, LARGEST))
def test_a_threshold_is_the_largest_float32_that_goes_left(threshold: float) -> None:
    found = float32_below(np.array([threshold]))
    assert found.dtype == np.float32
    assert float(found[0]) <= threshold
    assert float(found[0]) == LARGEST or float(np.nextafter(found[0], np.float32(np.inf))) > threshold


def test_thresholds_next_to_float32_and_near_zero() -> None:
    tiny, below_one = float(np.float32(1e-45)), float(np.nextafter(np.float32(1), np.float32(0)))
    values = np.array([1.0, np.nextafter(1.0, 2.0), np.nextafter(1.0, 0.0), tiny, 0.5 * tiny, -0.5 * tiny, -0.0])
    assert float32_below(values).tolist() == [1.0, 1.0, below_one, tiny, 0.0, -tiny, 0.0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_thresholds_that_are_no_float32_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="range of float32"):
        float32_below(np.array([0.0, value]))


def test_leaves_do_not_depend_on_the_batch(rng: np.random.Generator, trees: Trees) -> None:
    x = table(rng, 1100)
    whole = trees.leaves(x)
    for cut in (0, 1, 511, 512, 1000):
        np.testing.assert_array_equal(np.concatenate([trees.leaves(x[:cut]), trees.leaves(x[cut:])]), whole)
    np.testing.assert_array_equal(trees.leaves(np.asfortranarray(x)), whole)


def test_trees_are_joined_behind_each_other(rng: np.random.Generator) -> None:
    x = table(rng)
    estimators = fitted("extra", x).estimators_
    whole = Trees.of(estimators, count)
    parts = Trees.of(estimators[:4], count) + Trees.of(estimators[4:5], count) + Trees.of(estimators[5:], count)
    assert len(parts) == len(whole) == 15
    for name, values in whole.to_arrays().items():
        assert parts.to_arrays()[name].tobytes() == values.tobytes()
    np.testing.assert_array_equal(parts.leaves(x), whole.leaves(x))
    assert repr(parts) == f"Trees(15 trees, {len(whole.left)} nodes, 6 features)"


def test_trees_over_other_features_are_not_joined(rng: np.random.Generator, trees: Trees) -> None:
    other = Trees.of(fitted("extra", table(rng)[:, :4]).estimators_, count)
    with pytest.raises(ValueError, match=r"over \[4, 6\] features"):
        trees + other


def test_a_tree_may_be_a_single_leaf() -> None:
    x = np.ones((5, 2), np.float32)
    trees = Trees.of(IsolationForest(n_estimators=3, random_state=0).fit(x).estimators_, count)
    assert trees.leaves(x).tolist() == [[0, 1, 2]] * 5


def test_rows_of_another_kind_are_refused(trees: Trees) -> None:
    for rows in (np.ones((2, 5), np.float32), np.ones((2, 6)), np.ones(6, np.float32)):
        with pytest.raises(ValueError, match="expected float32 of 6 features"):
            trees.leaves(rows)


def test_a_row_that_is_not_finite_still_comes_to_a_leaf(trees: Trees) -> None:
    rows = np.array([[np.nan] * 6, [np.inf] * 6, [-np.inf] * 6], np.float32)
    leaves = trees.leaves(rows)
    assert trees.leaf[leaves].all()
    assert ((leaves >= trees.roots[:-1]) & (leaves < trees.roots[1:])).all()


# --- as arrays --------------------------------------------------------------------------------------------------------


def test_trees_are_kept_as_arrays(rng: np.random.Generator, trees: Trees) -> None:
    x = table(rng)
    again = Trees.from_arrays(trees.to_arrays(), FEATURES)
    np.testing.assert_array_equal(again.leaves(x), trees.leaves(x))
    np.testing.assert_array_equal(again.value, trees.value)


def small() -> Arrays:
    """Two trees: a root with two leaves, and one whose right child parts once more."""
    return {
        "feature": np.array([1, 0, 0, 2, 0, 1, 0, 0], np.int32),
        "threshold": np.array([0.5, 0, 0, 1.5, 0, 2.5, 0, 0], np.float32),
        "left": np.array([1, 1, 2, 4, 4, 6, 6, 7], np.int32),
        "right": np.array([2, 1, 2, 5, 4, 7, 6, 7], np.int32),
        "value": np.arange(8, dtype=np.float32),
        "roots": np.array([0, 3, 8]),
    }


def test_small_trees_read_as_they_are_drawn() -> None:
    trees = Trees.from_arrays(small(), 3)
    x = np.array([[9, 0.5, 1.5], [9, 0.6, 1.6], [9, 2.6, 1.6]], np.float32)
    assert trees.leaves(x).tolist() == [[1, 4], [2, 6], [2, 7]]


DAMAGE = {
    "a child is its grandparent": {"left": {5: 3}},
    "a child is its own parent on one side": {"left": {0: 0}},
    "a leaf leads away": {"right": {4: 7}},
    "a child is in the next tree": {"right": {0: 4}},
    "a child is in the tree before": {"left": {3: 1}},
    "a child is beyond the last node": {"right": {5: 8}},
    "a child is negative": {"left": {3: -1}},
    "two parents": {"left": {5: 7}},
    "both children are one": {"left": {0: 2}},
    "a feature is too large": {"feature": {3: 3}},
    "a feature is negative": {"feature": {0: -2}},
    "a threshold is NaN": {"threshold": {0: np.nan}},
    "a threshold is infinite": {"threshold": {5: np.inf}},
    "a value is NaN": {"value": {1: np.nan}},
    "roots start late": {"roots": {0: 1}},
    "roots end early": {"roots": {2: 7}},
    "roots end late": {"roots": {2: 9}},
    "a tree is empty": {"roots": {1: 0}},
    "a root is inside a tree": {"roots": {1: 5}},
}


@pytest.mark.parametrize("what", DAMAGE)
def test_arrays_that_are_no_trees_are_refused(what: str) -> None:
    arrays = small()
    for name, changes in DAMAGE[what].items():
        for place, value in changes.items():
            arrays[name][place] = value
    with pytest.raises(ValueError, match=r"tree|finite"):
        Trees.from_arrays(arrays, 3)


@pytest.mark.parametrize(
    ("left", "right"), [([1, 1, 3, 3, 4, 5], [4, 1, 5, 3, 4, 5]), ([4, 1, 3, 3, 4, 5], [1, 1, 5, 3, 4, 5])]
)
def test_a_node_of_another_tree_is_refused_though_it_has_no_other_parent(left: list[int], right: list[int]) -> None:
    arrays: Arrays = {
        "feature": np.zeros(6, np.int32),
        "threshold": np.zeros(6, np.float32),
        "left": np.array(left, np.int32),
        "right": np.array(right, np.int32),
        "value": np.zeros(6, np.float32),
        "roots": np.array([0, 2, 6]),
    }
    with pytest.raises(ValueError, match="in the same tree"):
        Trees.from_arrays(arrays, 1)


@pytest.mark.parametrize("name", ["feature", "threshold", "left", "right", "value", "roots"])
def test_arrays_of_another_kind_are_refused(name: str) -> None:
    arrays = small()
    for values in (arrays[name][:-1], arrays[name].astype(np.float16), arrays[name][None], arrays[name][:0]):
        with pytest.raises(ValueError, match=r"array '|roots of trees"):
            Trees.from_arrays({**arrays, name: values}, 3)
    del arrays[name]
    with pytest.raises(ValueError, match="absent"):
        Trees.from_arrays(arrays, 3)


@settings(deadline=None)
@given(st.sampled_from(["left", "right", "feature", "roots"]), st.integers(0, 7), st.integers(-10, 12))
def test_no_damage_leads_out_of_the_trees(name: str, place: int, value: int) -> None:
    arrays = small()
    arrays[name][place % len(arrays[name])] = value
    try:
        trees = Trees.from_arrays(arrays, 3)
    except ValueError:
        assert arrays[name].tolist() != small()[name].tolist()
    else:
        leaves = trees.leaves(np.array([[-9, -9, -9], [9, 9, 9], [0.6, 0.6, 1.6]], np.float32))
        assert trees.leaf[leaves].all()
        assert ((leaves >= trees.roots[:-1]) & (leaves < trees.roots[1:])).all()
