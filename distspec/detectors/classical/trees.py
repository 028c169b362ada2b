"""Decision trees as flat arrays of numbers, which can be checked before they are followed, and kept without pickle."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Self

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64, Shaped
from sklearn.tree._tree import NODE_DTYPE, Tree

from distspec.detectors import Arrays
from distspec.detectors.classical.principal_components import take

__all__ = ["Trees", "float32_below"]

ROWS: Final = 1024
"""Rows led through all trees at once: they stay in a core's cache while one tree after the other reads them."""

MOST_NODES: Final = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Trees:
    """Many binary trees: at a node a row goes left where its feature is at most the threshold.

    Nodes of all trees are numbered through. The children of a node come after it, and a leaf is its own child.

    Arguments:
        feature: that a node looks at; 0 at a leaf.
        threshold: the largest float32 that goes left; 0 at a leaf.
        left, right: the children.
        value: whatever the trees' maker keeps for each node; read it as `value[leaves]`.
        roots: first node of each tree, and the number of nodes.
        features: number of features.

    Example:
        >>> from sklearn.tree import DecisionTreeClassifier
        >>> x = np.array([[1.0], [2.0], [3.0]], np.float32)
        >>> stump = DecisionTreeClassifier(max_depth=1, random_state=0).fit(x, [0, 0, 1])
        >>> trees = Trees.of([stump], lambda fitted: fitted.tree_.n_node_samples)
        >>> trees, trees.leaves(x).tolist(), trees.value.tolist()
        (Trees(1 trees, 3 nodes, 1 features), [[1], [1], [2]], [3.0, 2.0, 1.0])
    """

    feature: Int32[np.ndarray, "nodes"]
    threshold: Float32[np.ndarray, "nodes"]
    left: Int32[np.ndarray, "nodes"]
    right: Int32[np.ndarray, "nodes"]
    value: Float32[np.ndarray, "nodes"]
    roots: Int64[np.ndarray, "trees+1"]
    features: int

    @classmethod
    def of(cls, estimators: Sequence[Any], value: Callable[[Any], Any]) -> Self:
        """Take fitted trees of scikit-learn; every float32 row comes to the same leaf as with `apply`.

        Arguments:
            estimators: such as `estimators_` of a forest.
            value: gives one number for each node of an estimator.
        """
        return cls.join([cls._of(estimator.tree_, value(estimator)) for estimator in estimators])

    @classmethod
    def _of(cls, tree: Any, value: Any) -> Self:
        nodes = np.arange(tree.node_count, dtype=np.int32)
        leaf = tree.children_left < 0
        return cls(
            np.where(leaf, 0, tree.feature).astype(np.int32),
            float32_below(np.where(leaf, 0.0, tree.threshold)),
            np.where(leaf, nodes, tree.children_left).astype(np.int32),
            np.where(leaf, nodes, tree.children_right).astype(np.int32),
            np.asarray(value, np.float32),
            np.array([0, len(nodes)], np.int64),
            int(tree.n_features),
        )

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Put trees of several makers behind each other.

        Raises:
            ValueError: there is none, they look at different numbers of features, or there are 2³¹ nodes.
        """
        features = {part.features for part in parts}
        if len(features) != 1:
            raise ValueError(f"trees over {sorted(features)} features; expected one number")
        starts = np.cumsum([0, *(len(part.left) for part in parts)], dtype=np.int64)
        if starts[-1] > MOST_NODES:
            raise ValueError(f"the trees have {starts[-1]} nodes; at most {MOST_NODES} can be numbered; grow fewer")
        return cls(
            np.concatenate([part.feature for part in parts]),
            np.concatenate([part.threshold for part in parts]),
            np.concatenate([part.left + start.astype(np.int32) for part, start in zip(parts, starts, strict=False)]),
            np.concatenate([part.right + start.astype(np.int32) for part, start in zip(parts, starts, strict=False)]),
            np.concatenate([part.value for part in parts]),
            np.concatenate([np.zeros(1, np.int64), *(p.roots[1:] + s for p, s in zip(parts, starts, strict=False))]),
            features.pop(),
        )

    def __add__(self, other: Self) -> Self:
        return type(self).join([self, other])

    def __len__(self) -> int:
        return len(self.roots) - 1

    def __repr__(self) -> str:
        return f"Trees({len(self)} trees, {len(self.left)} nodes, {self.features} features)"

    @property
    def leaf(self) -> Bool[np.ndarray, "nodes"]:
        """Which nodes are leaves."""
        return np.asarray(self.left == np.arange(len(self.left)))

    def leaves(self, x: Float32[np.ndarray, "n features"]) -> Int32[np.ndarray, "n trees"]:
        """Find the leaf of every row in every tree, by the number of the node.

        Raises:
            ValueError: the rows are not float32, or of another number of features.
        """
        if x.ndim != 2 or x.shape[1] != self.features or x.dtype != np.float32:
            raise ValueError(f"rows are {x.dtype}{x.shape}; expected float32 of {self.features} features")
        found = np.empty((len(x), len(self)), np.int32)
        for start in range(0, len(x), ROWS):
            rows = x[start : start + ROWS]
            for number, tree in enumerate(self._walkers):
                found[start : start + ROWS, number] = tree.apply(rows)
        found += self.roots[:-1].astype(np.int32)
        return found

    @cached_property
    def _walkers(self) -> list[Any]:
        """The trees as scikit-learn's own, whose `apply` is compiled; about twice as fast as gathers with torch."""
        # `apply` follows the nodes without a check. Nothing gets here that `of` or `from_arrays` did not make.
        nodes, leaf = np.zeros(len(self.left), NODE_DTYPE), self.leaf
        root = np.repeat(self.roots[:-1], np.diff(self.roots))
        nodes["left_child"] = np.where(leaf, -1, self.left - root)
        nodes["right_child"] = np.where(leaf, -1, self.right - root)
        nodes["feature"] = np.where(leaf, -2, self.feature)
        nodes["threshold"] = np.where(leaf, -2.0, self.threshold)
        spans = zip(self.roots[:-1], self.roots[1:], strict=True)
        return [_walker(nodes[start:stop], self.features) for start, stop in spans]

    def to_arrays(self) -> Arrays:
        """Give the trees as arrays; `features` is not among them."""
        return {
            "feature": self.feature,
            "threshold": self.threshold,
            "left": self.left,
            "right": self.right,
            "value": self.value,
            "roots": self.roots,
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays, features: int) -> Self:
        """Make the trees of `to_arrays` again.

        Raises:
            ValueError: these are not trees over so many features, with children after their parents and inside their
                own tree, and with finite thresholds and values.
        """
        feature = take(arrays, "feature", np.int32, (None,))
        nodes = len(feature)
        threshold, value = (take(arrays, name, np.float32, (nodes,)) for name in ("threshold", "value"))
        left, right = (take(arrays, name, np.int32, (nodes,)) for name in ("left", "right"))
        roots = take(arrays, "roots", np.int64, (None,))
        if len(roots) < 2 or roots[0] != 0 or roots[-1] != nodes or not (np.diff(roots) > 0).all():
            raise ValueError(f"roots of trees do not ascend from 0 to {nodes} nodes")
        if nodes > MOST_NODES:
            raise ValueError(f"the trees have {nodes} nodes; at most {MOST_NODES} can be numbered")
        if not ((feature >= 0) & (feature < features)).all():
            raise ValueError(f"a tree looks at a feature that is not one of {features}")
        _require_trees(left, right, roots)
        return cls(feature, threshold, left, right, value, roots, features)


def _walker(nodes: Shaped[np.ndarray, "nodes"], features: int) -> Any:
    """Make a tree of scikit-learn that can only `apply`: it has neither depth nor values."""
    tree = Tree(features, np.ones(1, np.intp), 1)
    values = np.zeros((len(nodes), 1, 1))
    tree.__setstate__({"max_depth": 0, "node_count": len(nodes), "nodes": nodes, "values": values})
    return tree


def _require_trees(
    left: Int32[np.ndarray, "nodes"], right: Int32[np.ndarray, "nodes"], roots: Int64[np.ndarray, "trees+1"]
) -> None:
    """Refuse children that lead back, out of their tree, or to where another node leads.

    Raises:
        ValueError: these are not trees.
    """
    index = np.arange(len(left))
    stop = np.repeat(roots[1:], np.diff(roots))
    inner = left != index
    ahead = (left > index) & (left < stop) & (right > index) & (right < stop)
    if not np.where(inner, ahead, right == index).all():
        raise ValueError("children of a tree's node do not come after it in the same tree")
    parents = np.bincount(np.concatenate([left[inner], right[inner]]), minlength=len(left))
    expected = np.ones(len(left), np.int64)
    expected[roots[:-1]] = 0
    if not np.array_equal(parents, expected):
        raise ValueError("a tree's node is not the child of one other")


def float32_below(values: Float64[np.ndarray, "n"]) -> Float32[np.ndarray, "n"]:
    """Give the largest float32 that is not above each value: a float32 compares with both alike.

    Raises:
        ValueError: a value is not finite or beyond the range of float32.
    """
    if not (np.abs(values) <= np.finfo(np.float32).max).all():
        raise ValueError("a threshold is not a finite number in the range of float32")
    nearest = values.astype(np.float32)
    above = nearest > values
    nearest[above] = np.nextafter(nearest[above], np.float32(-np.inf))
    return nearest
