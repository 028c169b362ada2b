"""Versions of spectra that differ from them in segments: what perturbing explainers ask a score about.

Told as a base, what stands in its place, and where, such versions can be scored without writing each of them out: a
model whose first layer is linear needs only what each segment adds to that layer.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64

from distspec.spectra.batch import Spectra

__all__ = ["PerturbedSpectra"]


@dataclass(frozen=True, eq=False)
class PerturbedSpectra:
    """S versions of each of m spectra that share one mask: in each, some segments hold another flux.

    Arguments:
        base: m spectra with equal inverse variances.
        other: flux of the segments that are switched.
        segment_of: segment of each pixel, once for each of k ways to cut a spectrum; numbers go on from one way to the
            next, and -1 is in none. A version that switches segments of several ways must switch no pixel twice.
        switched: versions by segments; None switches each segment alone, one after the other.

    Raises:
        ValueError: the shapes do not agree.
    """

    base: Spectra
    other: Float32[np.ndarray, "pixels"]
    segment_of: Int64[np.ndarray, "k pixels"]
    switched: Bool[np.ndarray, "versions segments"] | None = None

    def __post_init__(self) -> None:
        pixels = self.base.grid.pixels
        if self.other.shape != (pixels,) or self.segment_of.ndim != 2 or self.segment_of.shape[1] != pixels:
            raise ValueError(f"other {self.other.shape} and segments {self.segment_of.shape} for {pixels} pixels")
        if self.switched is not None and self.switched.shape[1] < self.segments:
            raise ValueError(f"{self.switched.shape[1]} columns for {self.segments} segments")

    @property
    def segments(self) -> int:
        """How many there are."""
        return int(self.segment_of.max()) + 1

    @property
    def versions(self) -> int:
        """How many of each spectrum."""
        return self.segments if self.switched is None else len(self.switched)

    def covers(self, start: int, stop: int) -> Bool[np.ndarray, "part pixels"]:
        """Tell which pixels hold the other flux in versions `start` to `stop`."""
        found = np.zeros((stop - start, self.base.grid.pixels), bool)
        for cut in self.segment_of:
            if self.switched is None:
                found |= cut == np.arange(start, stop)[:, None]
            else:
                found |= np.take(self.switched[start:stop], cut, axis=1) & (cut >= 0)
        return found

    def spectra(self, which: int, start: int, stop: int) -> Spectra:
        """Write versions `start` to `stop` of one of the spectra out."""
        repeated = np.full(stop - start, which)
        flux = np.where(self.covers(start, stop), self.other, self.base.flux[which])
        ivar = np.broadcast_to(self.base.ivar[which], flux.shape)
        redshift = None if self.base.redshift is None else self.base.redshift[repeated]
        return Spectra(self.base.rows[repeated], flux, ivar, self.base.grid, redshift)
