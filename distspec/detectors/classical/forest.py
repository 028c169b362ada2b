"""Unsupervised random forest: trees that tell real spectra from synthetic ones put similar real ones in one leaf.

An odd spectrum shares its leaves with few others.

References:
    Reis, Rotman, Poznanski, Prochaska & Wolf (2019), section 2.1; Baron & Poznanski (2017); Shi & Horvath (2006).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Self

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64, Shaped
from sklearn.ensemble import RandomForestClassifier

from distspec.config import AnyDetector, Forest
from distspec.detectors import Arrays, Fields
from distspec.detectors.classical.features import Features, seen
from distspec.detectors.classical.principal_components import blocks, take
from distspec.detectors.classical.trees import Trees
from distspec.errors import ConfigError, LayoutError
from distspec.spectra import Spectra, WaveGrid

__all__ = ["LeafCounts", "UnsupervisedForest", "synthesize"]

ROWS: Final = 4096
"""Spectra whose leaves are found at once."""

PAIR_ROWS: Final = 64
"""Spectra compared with the reference at once: their counts of shared leaves then stay in a core's cache."""

_REFERENCE, _SYNTHETIC, _TREES = range(3)
"""Streams of random numbers of one seed."""


@dataclass(frozen=True, eq=False)
class LeafCounts:
    """How many spectra of the survey fall in each good leaf, and how many there are; merged with `+`, exactly."""

    leaves: Int64[np.ndarray, "good_leaves"]
    spectra: int

    def __add__(self, other: "LeafCounts") -> "LeafCounts":
        return LeafCounts(self.leaves + other.leaves, self.spectra + other.spectra)

    def to_arrays(self) -> Arrays:
        """Give both by name."""
        return {"leaves": self.leaves, "spectra": np.array(self.spectra)}


class UnsupervisedForest:
    """Dissimilarity of a spectrum to many others, between 0 and 1; NaN for a spectrum without a good pixel.

    A leaf is good if more than half of what fell in it was real. With `similarity = "all"`, the score is
    1 - Σ count(leaf) / (m N), over the m trees in whose good leaves a spectrum is; count is that of the N spectra of
    the survey, itself among them. It is 1 if m = 0. This is the mean over the survey of 1 - (shared good leaves) / m.

    The others need a reference from the sample. The distance of a pair is 1 - s / m: m trees are good for both, in s of
    them they share the leaf; 1 if m = 0. `pairwise` is the mean distance to the reference. `neighbour` is the distance
    at place k of the sorted ones, counted from 0: a spectrum of the reference is its own nearest neighbour, and has k
    others within its score; a spectrum that is not has k + 1.

    Arguments:
        settings: of the detector.
        grid: of the spectra.
        features: made of pixels.
        trees: `value` is the share of real spectra at a node.
        counts: taken from the survey; None where another similarity needs none, or as long as a look is missing.
        reference: leaves of the spectra to compare with; None with `similarity = "all"`.
    """

    def __init__(
        self,
        settings: Forest,
        grid: WaveGrid,
        features: Features,
        trees: Trees,
        counts: LeafCounts | None = None,
        reference: Int32[np.ndarray, "references trees"] | None = None,
    ) -> None:
        self.settings: AnyDetector = settings
        self.grid = grid
        self.features = features
        self.trees = trees
        self.counts = counts
        self.reference = reference
        self._settings = settings

    def __repr__(self) -> str:
        state = "looks for leaf counts" if self.looking else "fitted"
        return f"UnsupervisedForest({self._settings.name!r}, {self.trees!r}, {state})"

    @classmethod
    def parts(cls, settings: Forest) -> int:
        """Give the number of draws of synthetic spectra."""
        return -(-settings.trees // settings.trees_per_draw)

    @classmethod
    def grow(cls, settings: Forest, sample: Spectra, seed: int, part: int) -> Arrays:
        """Grow the trees of one draw.

        Raises:
            ConfigError: less than two spectra of the sample have a good pixel, there are more bins than pixels, or not
                as many neighbours as asked for.
        """
        sample = sample[seen(sample)]
        if len(sample) < 2:
            raise ConfigError(f"{len(sample)} spectra of the sample have a good pixel; a forest needs 2: enlarge it")
        references = min(settings.reference, len(sample))
        if settings.similarity == "neighbour" and references <= settings.neighbour:
            raise ConfigError(
                f"neighbour = {settings.neighbour} of a reference of {references} spectra; set neighbour below that"
            )
        features = Features.of(sample, settings.bins)
        x = features(sample)
        both = np.concatenate([x, synthesize(settings, x, _generator(seed, _SYNTHETIC, part))])
        forest = RandomForestClassifier(
            n_estimators=min(settings.trees_per_draw, settings.trees - part * settings.trees_per_draw),
            max_features="sqrt",
            max_depth=settings.depth,
            bootstrap=True,
            max_samples=None if settings.subsample is None else min(settings.subsample, len(both)),
            n_jobs=1,
            random_state=int(_generator(seed, _TREES, part).integers(2**31)),
        )
        trees = Trees.of(forest.fit(both, np.arange(len(both)) < len(x)).estimators_, _share_of_real)
        reference = None
        if settings.similarity != "all":
            chosen = _generator(seed, _REFERENCE).choice(len(x), references, replace=False)
            reference = trees.leaves(x[np.sort(chosen)])
        return cls(settings, sample.grid, features, trees, reference=reference).to_arrays()

    @classmethod
    def assemble(cls, settings: Forest, grid: WaveGrid, parts: Sequence[Arrays]) -> Self:
        """Join the trees of all draws.

        Raises:
            ValueError: parts are missing, or not of one sample.
        """
        if len(parts) != cls.parts(settings):
            raise ValueError(f"{len(parts)} parts of a forest; expected {cls.parts(settings)}")
        grown = [cls.from_arrays(settings, grid, part) for part in parts]
        first = grown[0].features.to_arrays()
        for one in grown[1:]:
            if any(values.tobytes() != first[name].tobytes() for name, values in one.features.to_arrays().items()):
                raise ValueError("the parts of a forest were grown on different samples")
        trees = Trees.join([one.trees for one in grown])
        leaves = [one.reference for one in grown if one.reference is not None]
        if not leaves:
            return cls(settings, grid, grown[0].features, trees)
        starts = np.cumsum([0, *(len(one.trees.left) for one in grown[:-1])]).astype(np.int32)
        reference = np.concatenate([part + start for part, start in zip(leaves, starts, strict=True)], axis=1)
        return cls(settings, grid, grown[0].features, trees, reference=reference)

    @property
    def looking(self) -> bool:
        """Whether the leaf counts of the survey are still to be taken."""
        return self._settings.similarity == "all" and self.counts is None

    def look(self, spectra: Spectra) -> LeafCounts:
        """Count the spectra in each good leaf; those without a good pixel do not count.

        Raises:
            LayoutError: the spectra are on another grid.
            ValueError: no look is needed.
        """
        self._require(spectra)
        self._require_looking()
        spectra = spectra[seen(spectra)]
        counts = np.zeros(len(self.trees.left), np.int64)
        for start in range(0, len(spectra), ROWS):
            leaves = self.trees.leaves(self.features(spectra[start : start + ROWS]))
            counts += np.bincount(leaves.ravel(), minlength=len(counts))
        return LeafCounts(counts[self._good], len(spectra))

    def summary(self, arrays: Arrays) -> LeafCounts:
        """Give the counts again."""
        return LeafCounts(arrays["leaves"], int(arrays["spectra"]))

    def learn(self, summary: LeafCounts) -> Self:
        """Freeze the counts of the whole survey.

        Raises:
            ValueError: no look is needed, or it was that of another forest.
        """
        self._require_looking()
        if len(summary.leaves) != int(self._good.sum()):
            raise ValueError(f"{self!r} got counts of {len(summary.leaves)} leaves; expected those of its own look")
        return type(self)(self._settings, self.grid, self.features, self.trees, summary)

    def _require_looking(self) -> None:
        if not self.looking:
            raise ValueError(f"{self!r} needs no look; call `score`")

    def _require(self, spectra: Spectra) -> None:
        if spectra.grid != self.grid:
            raise LayoutError(f"spectra on {spectra.grid}; the detector is for {self.grid}; fit it on these spectra")

    @property
    def fields(self) -> Fields:
        """The score, and the number of trees in whose good leaves a spectrum is."""
        return {self._settings.name: ("f4", ()), "good_trees": ("i4", ())}

    @property
    def facts(self) -> dict[str, Any]:
        """Numbers of trees, leaves, features, and of spectra that are compared with."""
        return {
            "trees": len(self.trees),
            "leaves": int(self.trees.leaf.sum()),
            "good_leaves": int(self._good.sum()),
            "features": len(self.features),
            "synthetic": self._settings.synthetic,
            "similarity": self._settings.similarity,
            "spectra": None if self.counts is None else self.counts.spectra,
            "references": None if self.reference is None else len(self.reference),
        }

    def score(self, spectra: Spectra) -> Float32[np.ndarray, "n"]:
        """Score spectra, the same whatever else is in the batch; NaN without a good pixel.

        Raises:
            LayoutError: the spectra are on another grid.
            ValueError: the forest has not yet looked at the survey.
        """
        return np.asarray(self.details(spectra)[self._settings.name])

    def details(self, spectra: Spectra) -> Arrays:
        """Give the score, by the detector's name, and `good_trees`, 0 for a spectrum without a good pixel.

        Raises:
            LayoutError: the spectra are on another grid.
            ValueError: the forest has not yet looked at the survey.
        """
        self._require(spectra)
        if self.looking:
            raise ValueError(f"{self!r} cannot score yet; look at the survey and learn first")
        scores = np.full(len(spectra), np.nan, np.float32)
        good_trees = np.zeros(len(spectra), np.int32)
        for start in range(0, len(spectra), ROWS):
            part = spectra[start : start + ROWS]
            leaves, known = self.trees.leaves(self.features(part)), seen(part)
            good = self._good[leaves].sum(axis=1, dtype=np.int32)
            score = self._distances(leaves) if self.counts is None else self._dissimilarity(leaves, good)
            scores[start : start + ROWS] = np.where(known, score, np.nan)
            good_trees[start : start + ROWS] = np.where(known, good, 0)
        return {self._settings.name: scores, "good_trees": good_trees}

    @cached_property
    def _good(self) -> Bool[np.ndarray, "nodes"]:
        """Which nodes are leaves that more real than synthetic spectra fell in."""
        return np.asarray(self.trees.leaf & (self.trees.value > 0.5))

    @cached_property
    def _occupants(self) -> Int64[np.ndarray, "nodes"]:
        """Spectra of the survey in each good leaf; 0 at other nodes."""
        occupants = np.zeros(len(self.trees.left), np.int64)
        if self.counts is not None:
            occupants[self._good] = self.counts.leaves
        return occupants

    def _dissimilarity(
        self, leaves: Int32[np.ndarray, "n trees"], good: Int32[np.ndarray, "n"]
    ) -> Float64[np.ndarray, "n"]:
        """Give the mean dissimilarity to the survey, from leaf counts."""
        spectra = 0 if self.counts is None else self.counts.spectra
        shared = self._occupants[leaves].sum(axis=1)
        return np.asarray(1.0 - shared / (np.maximum(good, 1) * max(float(spectra), 1.0)))

    @cached_property
    def _codes(self) -> tuple[Shaped[np.ndarray, "nodes"], Shaped[np.ndarray, "trees references"]]:
        """Number the good leaves that hold the reference, tree by tree from 1; 0 is any other leaf.

        Small numbers are compared many at once. A 0 of the reference becomes a number that no leaf has.
        """
        if self.reference is None:
            raise ValueError("this forest has no reference to compare with")
        held = np.zeros(len(self.trees.left), bool)
        held[self.reference.ravel()] = True
        held &= self._good
        upto = np.cumsum(held)
        before = (upto - held)[self.trees.roots[:-1]]
        codes = np.where(held, upto - np.repeat(before, np.diff(self.trees.roots)), 0)
        kind = np.uint16 if codes.max() < np.iinfo(np.uint16).max else np.uint32
        codes = codes.astype(kind)
        reference = codes[self.reference.T]
        return codes, np.ascontiguousarray(np.where(reference > 0, reference, np.iinfo(kind).max))

    @cached_property
    def _reference_good(self) -> Float32[np.ndarray, "trees references"]:
        codes, reference = self._codes
        return np.ascontiguousarray(reference != np.iinfo(reference.dtype).max, np.float32)

    def _distances(self, leaves: Int32[np.ndarray, "n trees"]) -> Float64[np.ndarray, "n"]:
        """Give the mean distance to the reference, or that to the asked neighbour."""
        codes, reference = self._codes
        found = np.empty(len(leaves), np.float64)
        for start in range(0, len(leaves), PAIR_ROWS):
            part = leaves[start : start + PAIR_ROWS]
            shared = _shared(codes[part], reference)
            # Whole numbers below 2²⁴ add up exactly in float32, in any order.
            both = self._good[part].astype(np.float32) @ self._reference_good
            similarity = np.divide(shared, np.maximum(both, 1), dtype=np.float32)
            if self._settings.similarity == "pairwise":
                found[start : start + PAIR_ROWS] = 1.0 - similarity.mean(axis=1, dtype=np.float64)
            else:
                place = similarity.shape[1] - 1 - self._settings.neighbour
                found[start : start + PAIR_ROWS] = 1.0 - np.partition(similarity, place, axis=1)[:, place]
        return found

    def to_arrays(self) -> Arrays:
        """Give the forest as arrays of numbers, with the leaf counts or the reference that it has."""
        arrays = {**self.features.to_arrays(), **self.trees.to_arrays()}
        if self.counts is not None:
            arrays |= {"counts": self.counts.leaves, "spectra": np.array([self.counts.spectra], np.int64)}
        if self.reference is not None:
            arrays["reference"] = self.reference
        return arrays

    @classmethod
    def from_arrays(cls, settings: Forest, grid: WaveGrid, arrays: Arrays) -> Self:
        """Make the forest of `to_arrays` again.

        Raises:
            ValueError: the arrays are not those of a forest with these settings on this grid.
        """
        features = Features.from_arrays(arrays)
        if features.edges[-1] != grid.pixels:
            raise ValueError(f"features of {features.edges[-1]} pixels on a grid of {grid.pixels}")
        trees = Trees.from_arrays(arrays, len(features))
        if ((trees.value < 0) | (trees.value > 1)).any():
            raise ValueError("a share of real spectra in a forest is not between 0 and 1")
        found = cls(settings, grid, features, trees)
        if settings.similarity != "all":
            found.reference = _reference(settings, trees, arrays)
        elif "counts" in arrays:
            leaves = take(arrays, "counts", np.int64, (int(found._good.sum()),))
            spectra = int(take(arrays, "spectra", np.int64, (1,))[0])
            # More than 2^53 spectra there are not, and sums of such counts do not wrap around.
            if not 0 <= spectra <= 2**53 // len(trees) or ((leaves < 0) | (leaves > spectra)).any():
                raise ValueError(f"leaf counts of a forest are not between 0 and {spectra} spectra")
            found.counts = LeafCounts(leaves, spectra)
        known = found.to_arrays().keys()
        if arrays.keys() != known:
            raise ValueError(f"arrays {sorted(arrays)}; expected {sorted(known)}")
        return found


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


def _share_of_real(estimator: Any) -> Float64[np.ndarray, "nodes"]:
    value = estimator.tree_.value[:, 0, :]
    return np.asarray(value[:, 1] / value.sum(axis=1))


def _shared(
    codes: Shaped[np.ndarray, "n trees"], reference: Shaped[np.ndarray, "trees references"]
) -> Shaped[np.ndarray, "n references"]:
    """Count the trees in which two spectra share a good leaf, in bytes as long as they can hold it."""
    total = np.zeros((len(codes), reference.shape[1]), np.uint8 if len(reference) < 256 else np.int32)
    equal = np.empty(total.shape, bool)
    for code, others in zip(codes.T, reference, strict=True):
        np.equal(code[:, None], others, out=equal)
        np.add(total, equal.view(np.uint8), out=total)
    return total


def _reference(settings: Forest, trees: Trees, arrays: Arrays) -> Int32[np.ndarray, "references trees"]:
    """Take the leaves of the reference.

    Raises:
        ValueError: there are too few, or they are not leaves of these trees.
    """
    reference = take(arrays, "reference", np.int32, (None, len(trees)))
    if len(reference) <= (settings.neighbour if settings.similarity == "neighbour" else 0):
        raise ValueError(f"{len(reference)} references of a forest are too few")
    if ((reference < trees.roots[:-1]) | (reference >= trees.roots[1:])).any() or not trees.leaf[reference].all():
        raise ValueError("references of a forest are not leaves of its trees")
    return reference


def synthesize(
    settings: Forest, x: Float32[np.ndarray, "n features"], generator: np.random.Generator
) -> Float32[np.ndarray, "n features"]:
    """Make as many synthetic spectra as there are real ones, by `settings.synthetic`.

    `marginal` draws each feature from its values in the sample, so that only the links between features are lost;
    `chunks` draws runs of features together, so that links inside a run are kept; `uniform` draws between the least and
    the largest value of each feature.
    """
    features = x.shape[1]
    runs = settings.chunks if settings.synthetic == "chunks" else features
    widths = np.diff(np.arange(runs + 1) * features // runs)
    least, largest = x.min(axis=0), x.max(axis=0)
    made = np.empty_like(x)
    for part in blocks(len(x), features):
        rows = len(made[part])
        if settings.synthetic == "uniform":
            made[part] = generator.uniform(least, largest, (rows, features))
        else:
            chosen = np.repeat(generator.integers(len(x), size=(rows, runs)), widths, axis=1)
            made[part] = np.take_along_axis(x, chosen, axis=0)
    return made
