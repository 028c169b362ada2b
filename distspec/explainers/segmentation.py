"""Ways to cut a spectrum into segments that are switched off as a whole."""

from typing import Final

import numpy as np
from jaxtyping import Float64, Int64

from distspec.config import AnySegments, LineSegments, Slic, Uniform
from distspec.errors import extra
from distspec.spectra import LIGHT_SPEED, Spectra, WaveGrid
from distspec.spectra.lines.wavelengths import EMISSION
from distspec.spectra.segments import uniform_segments

__all__ = ["common_segments", "line_segments", "segments_of", "slic_segments"]

Segments = Int64[np.ndarray, "pixels"]

_OPTICAL: Final = tuple(EMISSION.values())


def line_segments(grid: WaveGrid, settings: LineSegments, redshift: float | None = None) -> Segments:
    """Cut a spectrum at the windows of emission lines; the continuum between them is cut into equal pieces.

    Windows that overlap are one segment, such as Hα and [N II]. Where no redshift is known there are no lines.

    Arguments:
        grid: wavelengths.
        settings: half-width of the windows, largest width of a piece.
        redshift: of the lines on this grid; None for a rest-frame grid.
    """
    stretch = 1.0 if redshift is None else 1.0 + redshift
    lines = np.array(_OPTICAL) * stretch if np.isfinite(stretch) else np.zeros(0)
    half = settings.velocity / LIGHT_SPEED
    inside = np.asarray((np.abs(grid.wave[:, None] - lines) <= half * lines).any(axis=1))
    starts = np.flatnonzero(np.diff(inside, prepend=not inside[0]))
    width = settings.width * (stretch if np.isfinite(stretch) else 1.0)
    cuts: list[np.ndarray] = []
    for start, stop in zip(starts, [*starts[1:], grid.pixels], strict=True):
        # The last pixel of a run is the widest.
        most = max(1, int(width / (grid.edges[stop] - grid.edges[stop - 1])))
        pieces = 1 if inside[start] else -(-(stop - start) // most)
        cuts.append(start + np.arange(pieces) * (stop - start) // pieces)
    marks = np.zeros(grid.pixels, np.int64)
    marks[np.concatenate(cuts)] = 1
    return np.cumsum(marks) - 1


def slic_segments(flux: Float64[np.ndarray, "pixels"], settings: Slic) -> Segments:
    """Cut one spectrum into superpixels, numbered from 0 in their order.

    The public code of Ortiz & Boquien hands three equal channels to scikit-image, which takes them for colours; here
    flux is one channel. Newer scikit-image numbers from 1, which there left the last segment unperturbed.

    References:
        Achanta et al. 2012, doi 10.1109/TPAMI.2012.120; vae_scores_lime §4.3.
    """
    # Imported here: it takes a second, and most runs do without.
    with extra("slic"):
        from skimage.segmentation import slic

    spread = float(np.ptp(flux)) or 1.0
    image = ((flux - flux.min()) / spread)[None]
    found = slic(
        image,
        n_segments=min(settings.count, flux.size),
        sigma=settings.sigma,
        compactness=settings.compactness,
        channel_axis=None,
        start_label=0,
    )[0]
    return np.cumsum(np.diff(found, prepend=found[0]) != 0, dtype=np.int64)


def common_segments(settings: AnySegments, grid: WaveGrid, *, rest: bool) -> Segments | None:
    """Give the segments that all spectra share; None where each has its own."""
    match settings:
        case Uniform():
            return uniform_segments(grid.pixels, min(settings.count, grid.pixels))
        case LineSegments() if rest:
            return line_segments(grid, settings)
        case _:
            return None


def segments_of(settings: AnySegments, spectra: Spectra, index: int) -> Segments:
    """Cut one of some spectra."""
    common = common_segments(settings, spectra.grid, rest=spectra.redshift is None)
    if common is not None:
        return common
    if isinstance(settings, LineSegments):
        assert spectra.redshift is not None
        return line_segments(spectra.grid, settings, float(spectra.redshift[index]))
    assert isinstance(settings, Slic)
    good = np.flatnonzero(spectra.good[index])
    # Masked pixels are bridged: what is written there is nothing.
    return slic_segments(np.interp(np.arange(spectra.grid.pixels), good, spectra.flux[index, good]), settings)
