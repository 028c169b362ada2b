"""How the cost of the classical detectors grows with the number of spectra, beside scikit-learn and brute force.

Run by hand: `python tests/bench/detector_scaling.py`; README.md here says what is measured.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest, RandomForestClassifier
from threadpoolctl import threadpool_limits

from distspec.config import Fisher, Forest, Isolation, Pca
from distspec.detectors import ClassicalDetector
from distspec.detectors.classical import class_of
from distspec.detectors.classical.features import Features
from distspec.detectors.classical.forest import UnsupervisedForest, synthesize
from distspec.detectors.classical.trees import Trees
from distspec.spectra import Spectra, WaveGrid
from tests.bench.score_throughput import commit, cpu_model

BATCH, SAMPLE, RANK, MASKED = 16_384, 10_000, 12, 0.02
OBJECTS = [500, 1_000, 2_000]
"""Sizes at which every spectrum is compared with every other."""

SMALL = 100_000
"""Up to so many rows a pass is short: it is made three times, and its median taken."""


class Survey:
    """Simulated rows: smooth components, noise of σ = 0.1, 2 % masked pixels that hold NaN. A row never changes."""

    def __init__(self, pixels: int) -> None:
        self.grid = WaveGrid.between("log", 3388.0, 8318.0, pixels)
        generator = np.random.default_rng(1)
        waves = np.outer(np.arange(1, RANK + 1), np.linspace(0, np.pi, pixels)) + generator.uniform(0, 6, (RANK, 1))
        self._shapes = (np.sin(waves) / np.arange(1, RANK + 1)[:, None]).astype(np.float32)

    def batch(self, number: int, rows: int = BATCH) -> Spectra:
        """Give the first rows of a batch. Number -1 is that of the sample, which no pass sees."""
        generator = np.random.default_rng([2, number + 1])
        shape = (BATCH, self.grid.pixels)
        flux = 1 + generator.standard_normal((BATCH, RANK), np.float32) @ self._shapes
        flux += np.float32(0.1) * generator.standard_normal(shape, np.float32)
        masked = generator.random(shape, np.float32) < MASKED
        flux[masked] = np.nan
        ivar = np.where(masked, 0, 100).astype(np.float32)
        return Spectra(np.arange(rows) + number * BATCH, flux[:rows], ivar[:rows], self.grid)

    def batches(self, rows: int) -> Iterator[Spectra]:
        """Give all rows; one batch is in memory."""
        for number, start in enumerate(range(0, rows, BATCH)):
            yield self.batch(number, min(BATCH, rows - start))


def main() -> None:
    """Fit and time all, print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pixels", type=int, default=100)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--full", action="store_true", help="pairwise and scikit-learn at all sizes, not to 100,000")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    with threadpool_limits(1):
        report = measure(options)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Take all figures. Each alternative runs right after the detector that it stands beside."""
    survey = Survey(options.pixels)
    sample = survey.batch(-1, SAMPLE)
    sizes = sorted(options.sizes)
    short = [n for n in sizes if options.full or n <= SMALL] or sizes[:1]
    load, date = os.getloadavg()[0], datetime.now(UTC).isoformat(timespec="seconds")
    report: dict[str, Any] = {"date": date, "commit": commit(), "cpu": cpu_model(), "cores": os.cpu_count()}
    print(f"{date}  commit {report['commit']}  {report['cpu']}, {report['cores']} cores, load {load:.1f}; ", end="")
    print(f"{options.pixels} pixels, sample {SAMPLE:,}; seconds of one thread\n")
    print(f"{'':32}{'rows':>10}{'seconds':>9}{'rows/s':>10}  exponent")
    rows: list[dict[str, Any]] = []
    rows += detector(survey, fitted(Pca(), sample), "pca", sizes)
    pca = PCA(20, random_state=1).fit(filled(sample))
    rows += [scaled("  scikit-learn PCA, chi2", short, lambda n: passed(survey, n, lambda s: plain_chi2(pca, s)))]
    rows += detector(survey, fitted(Fisher(), sample), "fisher", sizes)
    rows += detector(survey, fitted(Isolation(), sample), "isolation", sizes)
    plain = IsolationForest(n_estimators=200, max_samples=256, random_state=1).fit(filled(sample)).score_samples
    rows += [scaled("  IsolationForest.score_samples", short, lambda n: passed(survey, n, lambda s: plain(filled(s))))]
    grown = fitted(Forest(), sample)
    assert isinstance(grown, UnsupervisedForest)
    rows += detector(survey, grown, "forest, all", sizes)
    rows += detector(survey, paired(grown, sample), "forest, pairwise", short)
    rows += brute_force(survey, sample, report)
    report |= {"rows": rows, "peak_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    print(f"\nlargest difference on {OBJECTS[-1]:,} objects: linear forest to brute-force mean similarity", end=" ")
    print(f"{report['all_difference']:.1e}, pairwise to brute force {report['pairwise_difference']:.1e}")
    print(f"peak memory {report['peak_GB']:.2f} GB, load at the end {os.getloadavg()[0]:.1f}")
    return report


def fitted(settings: Any, sample: Spectra) -> ClassicalDetector:
    kind = class_of(settings)
    begun = time.process_time()
    parts = [kind.grow(settings, sample, 1, part) for part in range(kind.parts(settings))]
    found = kind.assemble(settings, sample.grid, parts)
    seconds = time.process_time() - begun
    print(f"{settings.kind + ', fit':32}{len(sample):>10,}{seconds:>9.2f}", flush=True)
    return found


def paired(grown: UnsupervisedForest, sample: Spectra) -> UnsupervisedForest:
    """Take the same trees with the first 2,500 spectra of the sample as reference: no second fit."""
    settings = Forest(similarity="pairwise")
    reference = grown.trees.leaves(grown.features(sample[: settings.reference]))
    return UnsupervisedForest(settings, grown.grid, grown.features, grown.trees, reference=reference)


def detector(survey: Survey, fresh: ClassicalDetector, name: str, sizes: list[int]) -> list[dict[str, Any]]:
    """Time the looks that the detector asks for, and scoring by what they taught, over each size."""
    learned: dict[int, ClassicalDetector] = {}

    def look(rows: int) -> float:
        found, seconds = fresh, 0.0
        while found.looking:
            total = None
            for spectra in survey.batches(rows):
                begun = time.process_time()
                part = found.look(spectra)
                total = part if total is None else total + part
                seconds += time.process_time() - begun
            found = found.learn(total)
        learned[rows] = found
        return seconds

    looks = [scaled(f"{name}, looks", sizes, look)] if fresh.looking else []
    return [*looks, scaled(f"{name}, score", sizes, lambda n: passed(survey, n, learned.get(n, fresh).score))]


def timed(call: Callable[..., Any], *given: Any) -> float:
    begun = time.process_time()
    call(*given)
    return time.process_time() - begun


def passed(survey: Survey, rows: int, work: Callable[[Spectra], Any]) -> float:
    """Give the processor's seconds of one pass; what makes the rows is left out."""
    return sum(timed(work, spectra) for spectra in survey.batches(rows))


def scaled(name: str, sizes: list[int], seconds_of: Callable[[int], float]) -> dict[str, Any]:
    """Time all sizes, print them, and give the exponent of the seconds' growth."""
    seconds_of(sizes[0])  # What is made once and kept, such as scikit-learn's form of trees, is made here.
    seconds = [statistics.median(seconds_of(n) for _ in range(3 if n <= SMALL else 1)) for n in sizes]
    exponent = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0]) if len(sizes) > 1 else float("nan")
    for place, (n, took) in enumerate(zip(sizes, seconds, strict=True)):
        print(f"{'' if place else name:32}{n:>10,}{took:>9.2f}{n / took:>10,.0f}", end="")
        print(f"  {exponent:.3f}" if n == sizes[-1] else "", flush=True)
    return {"name": name, "rows": sizes, "seconds": seconds, "exponent": exponent}


def filled(spectra: Spectra) -> np.ndarray:
    return np.where(spectra.ivar > 0, spectra.flux, np.float32(1))


def plain_chi2(pca: PCA, spectra: Spectra) -> np.ndarray:
    """Chi-squared of the whole spectrum; masked pixels hold the mean flux, and no region is judged."""
    flux = filled(spectra)
    return np.asarray(((flux - pca.inverse_transform(pca.transform(flux))) ** 2 * spectra.ivar).sum(axis=1))


def brute_force(survey: Survey, sample: Spectra, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare every pair of objects by scikit-learn's own forest, and our scores by the same trees with that."""
    settings = Forest()
    features = Features.of(sample, None)
    x = features(sample)
    both = np.concatenate([x, synthesize(settings, x, np.random.default_rng(3))])
    forest = RandomForestClassifier(100, max_features="sqrt", max_samples=settings.subsample, random_state=3)
    forest.fit(both, np.arange(len(both)) < len(x))

    def real(tree: Any) -> np.ndarray:
        return np.asarray(tree.tree_.value[:, 0, 1] / tree.tree_.value[:, 0].sum(axis=1))

    shares = [real(tree) for tree in forest.estimators_]

    def leaves(spectra: Spectra) -> tuple[np.ndarray, np.ndarray]:
        found = forest.apply(features(spectra))
        return found, np.stack([share[column] > 0.5 for share, column in zip(shares, found.T, strict=True)], axis=1)

    objects = survey.batch(0, OBJECTS[-1])
    (found, good), (others, theirs) = leaves(objects), leaves(sample[: settings.reference])

    def to_all(n: int) -> np.ndarray:
        each = zip(found[:n], good[:n], strict=True)
        return np.array([1 - ((found[:n] == a) & g).sum(1).mean() / max(g.sum(), 1) for a, g in each])

    def to_reference(n: int) -> np.ndarray:
        each = ((a, g & theirs) for a, g in zip(found[:n], good[:n], strict=True))
        return np.array([1 - (((others == a) & g).sum(1) / np.maximum(g.sum(1), 1)).mean() for a, g in each])

    ours = UnsupervisedForest(settings, survey.grid, features, Trees.of(forest.estimators_, real))
    report["all_difference"] = float(np.abs(ours.learn(ours.look(objects)).score(objects) - to_all(len(objects))).max())
    report["pairwise_difference"] = float(np.abs(paired(ours, sample).score(objects) - to_reference(OBJECTS[-1])).max())
    return [
        scaled("  forest.apply of scikit-learn", OBJECTS, lambda n: timed(leaves, objects[:n])),
        scaled("  then all pairs, n x n", OBJECTS, lambda n: timed(to_all, n)),
        scaled("  then all pairs, n x 2,500", OBJECTS, lambda n: timed(to_reference, n)),
    ]


if __name__ == "__main__":
    main()
