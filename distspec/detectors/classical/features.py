"""Features of trees: flux pixel by pixel, or averaged over runs of pixels, with no gap left."""

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from jaxtyping import Bool, Float32, Int64

from distspec.detectors import Arrays
from distspec.detectors.classical.principal_components import take
from distspec.errors import ConfigError
from distspec.spectra import Spectra
from distspec.statistics.summaries import row_median

__all__ = ["LARGEST", "Features", "seen"]

LARGEST: Final = 1e30
"""Fluxes beyond are taken for this: the largest number whose sum over a sample is a float32, as scikit-learn's must be.
Such a flux is the oddest of all anyhow, and trees only ask which of two is larger."""

ROWS: Final = 512
"""Spectra turned into features at once: the temporaries then stay small."""

COLUMNS: Final = 64
"""Features whose medians are taken at once."""


@dataclass(frozen=True, eq=False)
class Features:
    """What trees see of a spectrum, frozen with the sample that it was made from.

    A feature is the flux of a pixel, or the mean over the good pixels of a run of them. Where a spectrum has no good
    pixel in a run, the feature is its median over the sample: the value that tells least. A run that is good nowhere in
    the sample is no feature. Since trees need finite numbers, a good pixel that holds NaN is taken as masked, and
    flux beyond ±1e30, infinite or not, as ±1e30.

    Arguments:
        edges: first pixel of each run, and the number of pixels.
        kept: the runs that are features, ascending.
        fill: median over the sample of each feature.

    Example:
        >>> from distspec.spectra import WaveGrid
        >>> flux = np.array([[1, 3, 5, 7], [3, 5, 9, 9]], np.float32)
        >>> ivar = np.array([[1, 1, 1, 1], [1, 0, 0, 0]], np.float32)
        >>> spectra = Spectra(np.arange(2), flux, ivar, WaveGrid("linear", 4000.0, 1.0, 4))
        >>> Features.of(spectra, bins=2)(spectra).tolist()
        [[2.0, 6.0], [3.0, 6.0]]
    """

    edges: Int64[np.ndarray, "runs+1"]
    kept: Int64[np.ndarray, "features"]
    fill: Float32[np.ndarray, "features"]

    @classmethod
    def of(cls, sample: Spectra, bins: int | None) -> Self:
        """Freeze the features of a sample.

        Arguments:
            sample: spectra whose medians fill gaps.
            bins: number of runs, whose lengths differ by a pixel at most; None takes every pixel.

        Raises:
            ConfigError: there are more runs than pixels, or the sample has no good pixel.
        """
        pixels = sample.grid.pixels
        if bins is not None and bins > pixels:
            raise ConfigError(f"bins = {bins}, on a grid of {pixels} pixels; set at most so many, or leave bins out")
        runs = pixels if bins is None else bins
        edges = np.arange(runs + 1, dtype=np.int64) * pixels // runs
        values, good = np.empty((len(sample), runs), np.float32), np.empty((len(sample), runs), bool)
        for start in range(0, len(sample), ROWS):
            part = slice(start, start + ROWS)
            values[part], good[part] = _averages(sample.flux[part], sample.good[part], edges)
        kept = np.flatnonzero(good.any(axis=0))
        if not len(kept):
            raise ConfigError(f"none of the {len(sample)} spectra of the sample has a good pixel; ingest other spectra")
        fill = np.empty(len(kept), np.float32)
        for start in range(0, len(kept), COLUMNS):
            part, columns = slice(start, start + COLUMNS), kept[start : start + COLUMNS]
            fill[part] = row_median(values[:, columns].T, good[:, columns].T)
        return cls(edges, kept, fill)

    def __len__(self) -> int:
        return len(self.kept)

    def __call__(self, spectra: Spectra) -> Float32[np.ndarray, "n features"]:
        """Give the features of spectra on the sample's grid; finite, and the same whatever else is in the batch."""
        features = np.empty((len(spectra), len(self)), np.float32)
        for start in range(0, len(spectra), ROWS):
            part = slice(start, start + ROWS)
            values, good = _averages(spectra.flux[part], spectra.ivar[part] > 0, self.edges)
            if len(self) < values.shape[1]:
                values, good = values[:, self.kept], good[:, self.kept]
            features[part] = np.where(good, values, self.fill)
        return features

    def to_arrays(self) -> Arrays:
        """Give all that is frozen."""
        return {"edges": self.edges, "kept": self.kept, "fill": self.fill}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Make the features of `to_arrays` again.

        Raises:
            ValueError: the arrays are not those of features.
        """
        edges, kept = (take(arrays, name, np.int64, (None,)) for name in ("edges", "kept"))
        if len(edges) < 2 or edges[0] != 0 or not (np.diff(edges) > 0).all():
            raise ValueError("edges of features do not ascend from 0")
        if not len(kept) or kept[0] < 0 or kept[-1] >= len(edges) - 1 or not (np.diff(kept) > 0).all():
            raise ValueError(f"kept features are not some of {len(edges) - 1} runs in ascending order")
        return cls(edges, kept, take(arrays, "fill", np.float32, (len(kept),)))


def seen(spectra: Spectra) -> Bool[np.ndarray, "n"]:
    """Tell which spectra have a good pixel; the others have no score and teach a detector nothing."""
    return np.asarray(spectra.good.any(axis=1))


def _averages(
    flux: Float32[np.ndarray, "n pixels"], good: Bool[np.ndarray, "n pixels"], edges: Int64[np.ndarray, "runs+1"]
) -> tuple[Float32[np.ndarray, "n runs"], Bool[np.ndarray, "n runs"]]:
    """Average over the good pixels of each run; 0 where there is none."""
    good = good & ~np.isnan(flux)
    values = np.where(good, flux, np.float32(0))
    np.clip(values, -LARGEST, LARGEST, out=values)
    if len(edges) == flux.shape[1] + 1:
        return values, good
    count = np.add.reduceat(good, edges[:-1], axis=1, dtype=np.int64)
    total = np.add.reduceat(values, edges[:-1], axis=1, dtype=np.float64)
    return (total / np.maximum(count, 1)).astype(np.float32), count > 0
