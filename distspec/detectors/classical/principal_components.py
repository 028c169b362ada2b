"""Principal components from sums that add up, and the projection of spectra of which some pixels are masked."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64, Shaped
from scipy.linalg import eigh
from scipy.linalg.blas import dsyrk, ssyrk

from distspec.spectra import Spectra
from distspec.statistics.summaries import row_median

__all__ = ["CoMoments", "Components", "Origin", "blocks", "single", "take"]

_REACH: Final = 100.0
"""Standard deviations at which a flux is clipped in sums: one in ten thousand so far off doubles a pixel's variance."""

_FEWEST: Final = 0.01
"""Share of the spectra that two pixels must have in common to have a covariance."""

_LEAST: Final = 1e-12
"""Eigenvalues below this share of the largest are rounding of a spectrum's float32."""

_NOISE: Final = 1e-6
"""Share of the variance that is left at least: data of low rank leave none."""

_ENTRIES: Final = 2**20
"""Numbers in a temporary array, about."""

_PRODUCTS: Final = 256
"""Products of two components that are made at once."""


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Cut rows into runs of about a million numbers, so that temporaries stay small."""
    step = max(_ENTRIES // max(width, 1), 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True, eq=False)
class Origin:
    """What sums over the survey start from, so that they neither cancel nor hang on one wild pixel.

    Arguments:
        shift: mean flux of the sample in each pixel, subtracted before anything is summed.
        reach: what is left is clipped at ± this much, 100 robust standard deviations. A spectrum that was divided by a
            median near zero is off by far more; its square would leave no digit for the others.
    """

    shift: Float64[np.ndarray, "pixels"]
    reach: Float64[np.ndarray, "pixels"]

    @classmethod
    def of(cls, sample: Spectra) -> Self:
        """Take the origin from a sample. A pixel that is good in none of its spectra takes after its neighbours."""
        pixels = sample.grid.pixels
        middle, spread, shift = (np.full(pixels, np.nan) for _ in range(3))
        for part in blocks(pixels, len(sample)):
            good = np.ascontiguousarray(sample.ivar[:, part].T > 0)
            flux = np.where(good, sample.flux[:, part].T, 0.0).astype(np.float64)
            middle[part] = row_median(flux, good)
            spread[part] = row_median(np.abs(flux - middle[part, None]), good)
        middle, spread = _filled(middle), 1.4826 * _filled(spread)
        # Where fluxes are normalised all are equal; what is usual elsewhere is then the measure.
        spread = np.maximum(spread, np.median(spread))
        reach = np.where(spread > 0, _REACH * spread, float(np.finfo(np.float32).max))
        total, count = np.zeros(pixels), np.zeros(pixels)
        for rows in blocks(len(sample), pixels):
            good = sample.ivar[rows] > 0
            total += np.where(good, np.clip(sample.flux[rows] - middle, -reach, reach), 0.0).sum(axis=0)
            count += good.sum(axis=0)
        return cls(_filled(np.where(count > 0, middle + total / np.maximum(count, 1), np.nan)), reach)

    def to_arrays(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Give the arrays `shift` and `reach`."""
        return {"shift": self.shift, "reach": self.reach}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Shaped[np.ndarray, "..."]], pixels: int) -> Self:
        """Make the origin of `to_arrays` again.

        Raises:
            ValueError: an array is absent, of another shape or not finite, or a reach is not positive.
        """
        origin = cls(*(take(arrays, name, np.float64, (pixels,)) for name in ("shift", "reach")))
        if not (origin.reach > 0).all():
            raise ValueError("reach is not positive in every pixel")
        return origin


def _filled(values: Float64[np.ndarray, "pixels"]) -> Float64[np.ndarray, "pixels"]:
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return np.zeros_like(values)
    return np.asarray(np.interp(np.arange(len(values)), known, values[known]))


@dataclass(frozen=True, eq=False)
class CoMoments:
    """Sums and counts of pixels and of pairs of pixels over good pixels, which add up over any cut of the survey.

    With x = flux - shift, clipped, and 0 where masked: Σx, Σxxᵀ, and how often one and two pixels were good. Another
    order of adding changes rounding only. A worker holds 16 bytes for each pair of pixels: 300 MB at 4,301 pixels, half
    of that as long as no pixel is masked.

    Arguments:
        rows: spectra with a good pixel.
        whole: those of them without a masked pixel, whose pairs need no counting.
        pairs: of the others, spectra in which both pixels are good; lower triangle. None if there are no others.
        count: spectra in which a pixel is good.
        total: Σx, in units of flux.
        product: Σxxᵀ; lower triangle.
    """

    rows: int
    whole: int
    pairs: Float64[np.ndarray, "pixels pixels"] | None
    count: Int64[np.ndarray, "pixels"]
    total: Float64[np.ndarray, "pixels"]
    product: Float64[np.ndarray, "pixels pixels"]

    @classmethod
    def of(cls, spectra: Spectra, origin: Origin) -> Self:
        """Summarize spectra. What a masked pixel holds does not count."""
        pixels = spectra.grid.pixels
        rows = whole = 0
        pairs = None
        count, total = np.zeros(pixels, np.int64), np.zeros(pixels)
        product = np.zeros((pixels, pixels), order="F")
        for part in blocks(len(spectra), pixels):
            good = spectra.ivar[part] > 0
            x = np.where(good, np.clip(spectra.flux[part] - origin.shift, -origin.reach, origin.reach), 0.0)
            product = dsyrk(1.0, x.T, beta=1.0, c=product, lower=1, overwrite_c=1)
            total += x.sum(axis=0)
            count += good.sum(axis=0)
            full, any_good = good.all(axis=1), good.any(axis=1)
            rows, whole = rows + int(any_good.sum()), whole + int(full.sum())
            if (any_good & ~full).any():
                # Counts below 2^24 are exact in single precision, which is twice as fast.
                both = ssyrk(1.0, good[any_good & ~full].astype(np.float32).T, lower=1)
                pairs = both.astype(np.float64) if pairs is None else np.add(pairs, both, out=pairs)
        return cls(rows, whole, pairs, count, total, product)

    def __add__(self, other: "CoMoments") -> "CoMoments":
        pairs = self.pairs if other.pairs is None else other.pairs
        if self.pairs is not None and other.pairs is not None:
            pairs = self.pairs + other.pairs
        return CoMoments(
            self.rows + other.rows,
            self.whole + other.whole,
            pairs,
            self.count + other.count,
            self.total + other.total,
            self.product + other.product,
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Give all numbers by name; of a matrix its lower triangle, row by row."""
        arrays = {"rows": np.array(self.rows), "whole": np.array(self.whole), "count": self.count, "total": self.total}
        arrays["product"] = _packed(self.product)
        return arrays if self.pairs is None else arrays | {"pairs": _packed(self.pairs)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Take what `to_arrays` gave."""
        pixels = len(arrays["total"])
        pairs = _unpacked(arrays["pairs"], pixels) if "pairs" in arrays else None
        rows, whole = int(arrays["rows"]), int(arrays["whole"])
        return cls(rows, whole, pairs, arrays["count"], arrays["total"], _unpacked(arrays["product"], pixels))

    def mean(self, origin: Origin) -> Float64[np.ndarray, "pixels"]:
        """Give the mean flux over good pixels; that of the sample where no pixel was good."""
        return np.asarray(origin.shift + self.total / np.maximum(self.count, 1))

    @property
    def covariance(self) -> Float64[np.ndarray, "pixels pixels"]:
        """Covariance over the spectra in which both pixels are good, with n - 1; 0 where these are below 1 % of all.

        Each pixel's mean is that over all its good spectra. Where nothing is masked this is exact. Else it differs from
        the mean over those of a pair by some δ, and a covariance is off by δ times the distance of mean and shift: two
        factors of the order of an error of a mean.
        """
        mean = self.total / np.maximum(self.count, 1)
        lower = np.empty_like(self.product, order="C")
        for part in blocks(len(mean), len(mean)):
            pairs = np.float64(self.whole) if self.pairs is None else self.pairs[part] + self.whole
            deviation = self.product[part] - pairs * np.outer(mean[part], mean)
            known = pairs >= max(2.0, _FEWEST * self.rows)
            lower[part] = np.where(known, deviation / np.maximum(pairs - 1, 1), 0.0)
        lower = np.tril(lower)
        lower += np.tril(lower, -1).T
        return lower


def _packed(matrix: Float64[np.ndarray, "pixels pixels"]) -> Float64[np.ndarray, "pairs"]:
    return np.concatenate([matrix[row, : row + 1] for row in range(len(matrix))])


def _unpacked(triangle: Float64[np.ndarray, "pairs"], pixels: int) -> Float64[np.ndarray, "pixels pixels"]:
    # Column by column in memory, as BLAS leaves it; what stands above the diagonal is not looked at.
    matrix = np.zeros((pixels, pixels), order="F")
    start = 0
    for row in range(pixels):
        matrix[row, : row + 1] = triangle[start : start + row + 1]
        start += row + 1
    return matrix


@dataclass(frozen=True, eq=False)
class Components:
    """Mean, principal components and eigenvalues.

    Arguments:
        mean: of the flux in each pixel.
        axes: orthonormal components, by falling eigenvalue; the entry of largest size of each is positive.
        values: eigenvalues of the covariance (n - 1), all positive, in units of flux².
        variance: of the flux, mean over pixels.
        left: what the components leave of it; never below a millionth.
    """

    mean: Float64[np.ndarray, "pixels"]
    axes: Float64[np.ndarray, "p pixels"]
    values: Float64[np.ndarray, "p"]
    variance: float
    left: float

    @classmethod
    def of(
        cls, mean: Float64[np.ndarray, "pixels"], covariance: Float64[np.ndarray, "pixels pixels"], wanted: int
    ) -> Self:
        """Find the components of largest variance: as many as are wanted, or as the covariance's rank allows.

        Where pixels are masked, each covariance is that of other spectra, and the matrix may have negative eigenvalues,
        while those kept are too large. So what is left is not the sum of the other eigenvalues but the mean over pixels
        of |variance - Σ λ v²|: the same where nothing is masked, and else too large by the errors of the covariances.
        """
        pixels = len(mean)
        wanted = min(wanted, pixels)
        diagonal = np.maximum(covariance.diagonal(), 0.0)
        variance = float(diagonal.sum() / max(pixels, 1))
        values, axes = np.zeros(0), np.zeros((0, pixels))
        if wanted and variance > 0:
            values, vectors = eigh(covariance, subset_by_index=[pixels - wanted, pixels - 1])
            kept = np.flatnonzero(values > max(_LEAST, pixels * np.finfo(float).eps) * values[-1])[::-1]
            values, axes = values[kept], np.ascontiguousarray(vectors[:, kept].T)
        largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
        left = float(np.abs(diagonal - values @ axes**2).sum() / max(pixels, 1))
        return cls(mean, np.where(largest < 0, -axes, axes), values, variance, max(left, _NOISE * variance))

    @property
    def explained(self) -> float:
        """Share of the variance that the components hold; 0 where there is no variance."""
        return max(1.0 - self.left / self.variance, 0.0) if self.variance > 0 else 0.0

    def project(
        self, flux: Float[np.ndarray, "n pixels"], good: Bool[np.ndarray, "n pixels"]
    ) -> tuple[Float64[np.ndarray, "n p"], Float64[np.ndarray, "n pixels"]]:
        """Project spectra on the components, by good pixels alone.

        c = (f - μ) Vᵀ for a whole spectrum. With M the good pixels and m their share,
        c = (V M Vᵀ + (1 - m) s² Λ⁻¹)⁻¹ V M (f - μ): least squares that lean towards the mean by as much as pixels are
        missing, as the posterior mean does for noise of variance s² = `left`. At m = 1 both agree.

        Arguments:
            flux: a few hundred spectra; see `blocks`.
            good: which pixels count; the flux of others does not matter.

        Returns:
            Coefficients, NaN for a spectrum without a good pixel; and what they leave of the flux, 0 where masked.
        """
        x = np.where(good, flux - self.mean, 0.0)
        c = x @ self.axes.T
        holes = ~good.all(axis=1)
        if holes.any() and len(self.values):
            c[holes] = np.linalg.solve(self._normal(good[holes]), c[holes, :, None])[:, :, 0]
        rest = np.where(good, x - c @ self.axes, 0.0)
        c[~good.any(axis=1)] = np.nan
        return c, rest

    def _normal(self, good: Bool[np.ndarray, "n pixels"]) -> Float64[np.ndarray, "n p p"]:
        """Make the matrices of the normal equations: all products of two components in a few matrix products."""
        p = len(self.values)
        normal, seen = np.empty((len(good), p, p)), good.astype(np.float64)
        first, second = np.tril_indices(p)
        for start in range(0, len(first), _PRODUCTS):
            i, j = first[start : start + _PRODUCTS], second[start : start + _PRODUCTS]
            normal[:, i, j] = seen @ (self.axes[i] * self.axes[j]).T
            normal[:, j, i] = normal[:, i, j]
        missing = 1.0 - seen.mean(axis=1)
        normal[:, np.arange(p), np.arange(p)] += missing[:, None] * self.left / self.values
        return normal

    def to_arrays(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Give the arrays `mean`, `axes`, `values` and `variance`: of the flux, and what is left of it."""
        variance = np.array([self.variance, self.left])
        return {"mean": self.mean, "axes": self.axes, "values": self.values, "variance": variance}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Shaped[np.ndarray, "..."]], pixels: int) -> Self:
        """Make the components of `to_arrays` again.

        Raises:
            ValueError: an array is absent, of another kind or shape or not finite; components are not orthonormal;
                eigenvalues are not positive and falling, or the variances not positive.
        """
        values = take(arrays, "values", np.float64, (None,))
        mean = take(arrays, "mean", np.float64, (pixels,))
        axes = take(arrays, "axes", np.float64, (len(values), pixels))
        variance, left = take(arrays, "variance", np.float64, (2,)).tolist()
        if len(values) > pixels or np.abs(axes @ axes.T - np.eye(len(values))).max(initial=0.0) > 1e-6:
            raise ValueError("axes are not orthonormal")
        if (values <= 0).any() or (np.diff(values) > 0).any():
            raise ValueError("eigenvalues are not positive and falling")
        if min(variance, left) < 0 or (len(values) and min(variance, left) == 0):
            raise ValueError("variances are not positive")
        return cls(mean, axes, values, variance, left)


def take(
    arrays: dict[str, Shaped[np.ndarray, "..."]], name: str, dtype: Any, shape: tuple[int | None, ...]
) -> Shaped[np.ndarray, "..."]:
    """Take an array that must be of this kind and shape and finite; None stands for any length.

    Raises:
        ValueError: it is absent or differs.
    """
    if name not in arrays:
        raise ValueError(f"array {name!r} is absent")
    array = arrays[name]
    fits = array.ndim == len(shape) and all(a in (None, b) for a, b in zip(shape, array.shape, strict=True))
    if array.dtype != dtype or not fits:
        raise ValueError(f"array {name!r} is {array.dtype} {array.shape}; expected {np.dtype(dtype)} {shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"array {name!r} is not finite")
    return array


def single(values: Float64[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Round to float32; what is beyond becomes the largest there is, of either sign. NaN stays NaN."""
    largest = float(np.finfo(np.float32).max)
    return np.asarray(np.clip(values, -largest, largest), np.float32)
