"""Segments: runs of pixels that are told about as one."""

from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from distspec.spectra.grid import WaveGrid

__all__ = ["WINDOWS", "edges_of", "fold", "run_around", "uniform_segments"]

WINDOWS: Final = 125
"""Windows that the weights of pixels are added up in: one pixel's is noise, and what is odd is wider than one."""


def uniform_segments(pixels: int, segments: int) -> Int64[np.ndarray, "pixels"]:
    """Cut a spectrum into segments of equal width in pixels; what remains forms one more segment.

    Example:
        >>> uniform_segments(7, 3)
        array([0, 0, 1, 1, 2, 2, 3])

    Raises:
        ValueError: there are more segments than pixels.
    """
    if not 1 <= segments <= pixels:
        raise ValueError(f"{segments} segments of {pixels} pixels; expected between 1 and {pixels}")
    return np.minimum(np.arange(pixels, dtype=np.int64) // (pixels // segments), segments)


def fold(
    weights: Float[np.ndarray, "... regions"], segment_of: Int64[np.ndarray, "pixels"]
) -> tuple[Float[np.ndarray, "... segments"], Int64[np.ndarray, "pixels"]]:
    """Add the weights of pixels up over windows; weights of segments stay as they are.

    Arguments:
        weights: of regions.
        segment_of: region of each pixel.

    Returns:
        Weights of segments, and the segment of each pixel.
    """
    pixels = len(segment_of)
    if weights.shape[-1] < pixels:
        return weights, segment_of
    segments = uniform_segments(pixels, min(WINDOWS, pixels))
    starts = np.flatnonzero(np.diff(segments, prepend=-1))
    return np.add.reduceat(weights, starts, axis=-1), segments


def edges_of(grid: WaveGrid, segment_of: Int64[np.ndarray, "pixels"]) -> Float64[np.ndarray, "segments+1"]:
    """Give the wavelengths between which segments lie, Å vacuum."""
    starts = np.flatnonzero(np.diff(segment_of, prepend=-1))
    return np.asarray(grid.edges[np.append(starts, grid.pixels)])


def run_around(inside: Bool[np.ndarray, "n"], place: int) -> tuple[int, int]:
    """Give first and one-past-last of the run of True around a place.

    Example:
        >>> run_around(np.array([True, False, True, True, False]), 3)
        (2, 4)
    """
    outside = np.flatnonzero(~inside)
    before, after = outside[outside < place], outside[outside > place]
    return (int(before[-1]) + 1 if len(before) else 0), (int(after[0]) if len(after) else len(inside))
