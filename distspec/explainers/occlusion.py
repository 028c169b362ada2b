"""Explanations by windows of one spectrum in another: Inverse Multiscale Occlusion, ablation, occlusion."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int64

from distspec.config import Ablation, Imo, Occlusion
from distspec.explainers import Explanation, Fields, Scores
from distspec.spectra import Spectra, WaveGrid
from distspec.spectra.perturbed import PerturbedSpectra

__all__ = ["AblationExplainer", "ImoExplainer", "chunks", "combine"]

_SMALL = 1e-6
"""Of the largest spread over baselines: a spread below says no more than that they agree."""


def chunks(pixels: int, window: int, offset: int = 0) -> Int64[np.ndarray, "pixels"]:
    """Cut a spectrum into windows without overlap: the first as long as the offset, the last what remains.

    Example:
        >>> chunks(7, 3), chunks(7, 3, 2)
        (array([0, 0, 0, 1, 1, 1, 2]), array([0, 0, 1, 1, 1, 2, 2]))
    """
    before = offset % window
    return (np.arange(pixels, dtype=np.int64) - before) // window + (before > 0)


def combine(
    mean: Float64[np.ndarray, "windows ..."], spread: Float64[np.ndarray, "windows ..."], power: int
) -> Float64[np.ndarray, "..."]:
    """Average window sizes, each weighted by 1 / σ^power of its spread σ over baselines, pixel by pixel.

    A window that changes the score of no baseline, as where a score has steps, has σ = 0 and would outweigh all others
    by its silence; it is left out.

    References:
        Shen & Melchior (IMO), eq. 3 (power 2); its public code has 1.
    """
    largest = spread.max(initial=0.0)
    # Where all baselines agree, σ is 0; a floor far below all other spreads keeps the weight finite.
    weight = 1.0 / (spread + (_SMALL * largest if largest > 0 else 1.0)) ** power
    weight[(mean == 0) & (spread == 0)] = 0.0
    total = weight.sum(axis=0)
    return np.asarray(np.divide((mean * weight).sum(axis=0), total, out=np.zeros_like(total), where=total > 0))


class ImoExplainer:
    """Inverse Multiscale Occlusion: ordinary spectra become odd where they take on what is odd.

    For window W and baseline R_j, T_j = (s(R_j with one chunk of x) - s(R_j)) / pixels of the chunk, s being the score
    (higher = odder, so that -log p gives the paper's sign). IMO_W is the mean over baselines; all of them are kept,
    and combined over W. A masked pixel of x stays the baseline's, counts for no chunk's length, and has weight 0.

    Baselines are real spectra as the model reconstructs them at the redshift of x. They have no gaps, so their pixels
    all count: with the inverse variances of x, and where x is masked with their median.

    References:
        Shen & Melchior, Inverse Multiscale Occlusion, Algorithm 1; pae_sinf_imo_spender §C.

    Arguments:
        settings: windows, offsets, baselines, combination.
        grid: of the spectra.
    """

    def __init__(self, settings: Imo, grid: WaveGrid) -> None:
        self.settings, self.grid = settings, grid
        self.segment_of: Int64[np.ndarray, "pixels"] = np.arange(grid.pixels)
        offsets = settings.offsets or (0,) * len(settings.windows)
        cuts = [chunks(grid.pixels, window, by) for window, by in zip(settings.windows, offsets, strict=True)]
        first = np.cumsum([0, *(cut[-1] + 1 for cut in cuts)])
        self._cuts = np.stack([cut + start for cut, start in zip(cuts, first[:-1], strict=True)])

    def fields(self, scores: int) -> Fields:
        """Name what is kept: `weights`, those combined the `other` way, and IMO_W of all `windows`."""
        pixels, windows = self.grid.pixels, len(self.settings.windows)
        both = dict.fromkeys(("weights", "other"), ("f4", (scores, pixels)))
        return {**both, "windows": ("f4", (scores, windows, pixels))}

    def explain(self, scores: Scores, spectra: Spectra, baselines: Sequence[Spectra] = ()) -> Explanation:
        """Explain why scores are high."""
        k, count = len(scores.names), len(spectra)
        found = {name: np.zeros((count, *shape), dtype) for name, (dtype, shape) in self.fields(k).items()}
        powers = (2, 1) if self.settings.weight == "variance" else (1, 2)
        for index in range(count):
            mean, spread = self._one(scores, spectra[index : index + 1], baselines[index])
            found["windows"][index] = mean.transpose(2, 0, 1)
            for name, power in zip(("weights", "other"), powers, strict=True):
                found[name][index] = np.stack([combine(mean[..., one], spread[..., one], power) for one in range(k)])
        return Explanation(spectra.rows, found.pop("weights"), self.segment_of, found)

    def _one(
        self, scores: Scores, spectrum: Spectra, baselines: Spectra
    ) -> tuple[Float64[np.ndarray, "windows pixels k"], Float64[np.ndarray, "windows pixels k"]]:
        """Give mean and standard deviation over baselines of each window size."""
        mixture = self.mixture(spectrum, scores.ordinary(baselines, spectrum))
        change = scores.versions(mixture)(0, mixture.versions) - scores(mixture.base)[:, None]
        seen = mixture.segment_of >= 0
        length = np.bincount(mixture.segment_of[seen], minlength=mixture.versions)
        per_pixel = change.astype(np.float64) / np.maximum(length, 1)[:, None]
        told = per_pixel.mean(axis=0), per_pixel.std(axis=0)
        place = np.where(seen, mixture.segment_of, 0)
        mean, spread = (values[place] * seen[..., None] for values in told)
        return mean, spread

    def mixture(self, spectrum: Spectra, ordinary: Float32[np.ndarray, "m pixels"]) -> PerturbedSpectra:
        """Put each window of a spectrum into each ordinary one."""
        good, ivar = spectrum.good[0], spectrum.ivar[0]
        filled = np.where(good, ivar, np.median(ivar[good])).astype(np.float32)
        repeated = np.zeros(len(ordinary), np.int64)
        redshift = None if spectrum.redshift is None else spectrum.redshift[repeated]
        base = Spectra(
            spectrum.rows[repeated], ordinary, np.broadcast_to(filled, ordinary.shape), spectrum.grid, redshift
        )
        return PerturbedSpectra(
            base, np.where(good, spectrum.flux[0], 0.0).astype(np.float32), np.where(good, self._cuts, -1)
        )


class AblationExplainer:
    """Feature ablation and occlusion: s(x) - s(x with a window of the baseline), averaged where windows overlap.

    A window is not divided by its length. Agrees with captum's FeatureAblation and Occlusion; here every score can be
    asked, and one with a linear first layer is asked about all windows at the cost of few.

    References:
        pae_sinf_imo_spender §C.4; Zeiler & Fergus 2014, arXiv 1311.2901.

    Arguments:
        settings: window, stride, baseline.
        grid: of the spectra.
    """

    def __init__(self, settings: Ablation | Occlusion, grid: WaveGrid) -> None:
        self.settings, self.grid = settings, grid
        self.segment_of: Int64[np.ndarray, "pixels"] = np.arange(grid.pixels)
        window, stride = (1, 1) if isinstance(settings, Ablation) else (settings.window, settings.stride)
        self._cuts = _sliding(grid.pixels, window, stride)

    def fields(self, scores: int) -> Fields:
        """Name what is kept: `weights`."""
        return {"weights": ("f4", (scores, self.grid.pixels))}

    def explain(self, scores: Scores, spectra: Spectra, baselines: Sequence[Spectra] = ()) -> Explanation:
        """Explain why scores are high."""
        found = np.zeros((len(spectra), len(scores.names), self.grid.pixels), np.float32)
        zero = self.settings.baseline == "zero"
        instead = np.zeros_like(spectra.flux) if zero else scores.reconstruct(spectra)
        before = scores(spectra)
        for index in range(len(spectra)):
            good = spectra.good[index]
            cuts = np.where(good, self._cuts, -1)
            mixture = PerturbedSpectra(spectra[index : index + 1], instead[index], cuts)
            loss = before[index] - scores.versions(mixture)(0, mixture.versions)[0]
            held = cuts >= 0
            total = (loss[np.where(held, cuts, 0)] * held[..., None]).sum(axis=0, dtype=np.float64)
            found[index] = (total / np.maximum(held.sum(axis=0), 1)[:, None]).T
        return Explanation(spectra.rows, found, self.segment_of)


def _sliding(pixels: int, window: int, stride: int) -> Int64[np.ndarray, "k pixels"]:
    """Number the windows that begin every `stride` pixels, in ways without overlap; -1 between those of one way.

    The last windows are shorter, so that every pixel is in as many as there are.
    """
    window = min(window, pixels)
    starts = np.arange(0, pixels - window + stride, stride)
    starts = starts[starts < pixels]
    ways = min(-(-window // stride), len(starts))
    cuts = np.full((ways, pixels), -1, np.int64)
    for way in range(ways):
        own = starts[way::ways]
        pixel = np.arange(pixels)
        number = np.searchsorted(own, pixel, side="right") - 1
        inside = (number >= 0) & (pixel < own[np.maximum(number, 0)] + window)
        cuts[way, inside] = (number * ways + way)[inside]
    return cuts
