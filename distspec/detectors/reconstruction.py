"""Scores from what an autoencoder fails to reconstruct: eight variants, and chi-squared, from one pass.

The eight are {plain, filtered, trimmed, filtered and trimmed} x {squared error, weighted by inverse flux}. As in the
public code of Ortiz & Boquien, a score is the *root of the sum* of the kept terms, not their mean; ranks are the same
for one variant, magnitudes are not comparable between variants or between spectra of very different coverage.
"""

from typing import Final, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from distspec.config import Score, ScoreName
from distspec.lines import near_lines
from distspec.models.checkpoint import Checkpoint
from distspec.spectra import Spectra

__all__ = ["SCORES", "ReconstructionDetector", "ReconstructionScores", "reconstruction_scores"]

SCORES: Final[tuple[str, ...]] = get_args(ScoreName)
"""Names of the scores, in the order of `reconstruction_scores`. `chi2` is the masked chi-squared per good pixel."""


def reconstruction_scores(
    flux: Float[Tensor, "n pixels"],
    ivar: Float[Tensor, "n pixels"],
    reconstruction: Float[Tensor, "n pixels"],
    away: Bool[Tensor, "#n pixels"],
    settings: Score,
) -> Float[Tensor, "n 9"]:
    """Compute all scores of a batch.

    With r = |x̂ - x|, the order is: leave out masked and (filtered) line pixels; of the N' that remain keep the
    K = int(0.01 · percentage · N') smallest r (trimmed); sum r², or r²/(max(x, 0) + ε) (relative), over the kept;
    take the root. The observed flux is clipped at zero in the weight, since surveys without the cut σ < x hold
    negative fluxes.

    References:
        Ortiz & Boquien 2025, arXiv 2510.05235, and its public code; Böhm, Kim & Juneau for chi-squared.

    Arguments:
        flux: observed, normalised flux x.
        ivar: its inverse variance, 0 = masked.
        reconstruction: x̂.
        away: True for pixels away from the filtered lines; one row serves all spectra.
        settings: trimming percentage and ε.

    Returns:
        Scores in the order of `SCORES`; NaN for a spectrum without a good pixel.
    """
    good = ivar > 0
    residual = torch.where(good, (reconstruction - flux).abs(), 0.0)
    # In double precision a spike of 1e30 does not overflow when squared, nor drown what is left when it is dropped.
    square = residual.double().square()
    weighted = square / (torch.where(good, flux, 0.0).clamp_min(0.0) + settings.epsilon)
    columns = []
    for terms in (square, weighted):
        for kept in (good, good & away):
            columns.append(torch.where(kept, terms, 0.0).sum(dim=1))
    trims = [_largest(residual, kept, settings.trim_percentage) for kept in (good, good & away)]
    for terms in (square, weighted):
        for kept, dropped in zip((good, good & away), trims, strict=True):
            columns.append(torch.where(kept & ~dropped, terms, 0.0).sum(dim=1))
    # Computed as plain(square), plain(weighted), trimmed(square), trimmed(weighted), two each; `SCORES` sorts by term.
    ordered = [columns[i] for i in (0, 1, 4, 5, 2, 3, 6, 7)]
    roots = torch.stack(ordered, dim=1).sqrt()
    count = good.sum(dim=1)
    chi2 = (torch.where(good, flux - reconstruction, 0.0).double().square() * ivar).sum(dim=1) / count
    scores = torch.cat([roots, chi2.unsqueeze(1)], dim=1)
    # A score beyond the range of the output stays the largest number there is.
    scores = scores.clamp_max(torch.finfo(flux.dtype).max).to(flux.dtype)
    return torch.where((count > 0).unsqueeze(1), scores, torch.nan)


def _largest(
    residual: Float[Tensor, "n pixels"], kept: Bool[Tensor, "n pixels"], percentage: float
) -> Bool[Tensor, "n pixels"]:
    """Mark the pixels that trimming drops: each row's largest residuals among the kept pixels.

    A partial selection of the few largest costs a fraction of a sort.
    """
    count = kept.sum(dim=1)
    drops = count - (count.double() * (0.01 * percentage)).to(count.dtype)
    most = int(drops.max()) if len(drops) else 0
    if most == 0:
        return torch.zeros_like(kept)
    largest = torch.where(kept, residual, -1.0).topk(most, dim=1).values
    level = largest.gather(1, (drops - 1).clamp_min(0)[:, None])
    dropped = kept & (residual >= level)
    # Of equal residuals the first pixels are dropped: which ones `topk` gives depends on the rest of the batch.
    rows = (dropped.sum(dim=1) > drops).nonzero()[:, 0]
    above = dropped[rows] & (residual[rows] > level[rows])
    order = (dropped[rows] & ~above).cumsum(dim=1)
    dropped[rows] = above | (dropped[rows] & (order <= (drops[rows] - above.sum(dim=1))[:, None]))
    return dropped


class ReconstructionScores:
    """A checkpoint and the score settings, ready to score batches in one pass.

    Arguments:
        checkpoint: the trained model.
        settings: filter, trimming and ε.
        device: torch device of the model.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Score, device: str = "cpu") -> None:
        self._model = checkpoint.model.to(device).eval()
        self._settings = settings
        self._device = device
        self._rest_away = torch.from_numpy(~near_lines(checkpoint.grid, settings.filter_velocity)).to(device)

    @torch.inference_mode()
    def __call__(self, spectra: Spectra) -> tuple[Float32[np.ndarray, "n 9"], Float32[np.ndarray, "n latents"]]:
        """Give all scores and the latents of the spectra."""
        scores, latents = [], []
        for start in range(0, len(spectra), self._settings.batch):
            batch = slice(start, start + self._settings.batch)
            flux = _tensor(spectra.flux[batch]).to(self._device)
            ivar = _tensor(spectra.ivar[batch]).to(self._device)
            # NaN times zero is NaN: a masked pixel may hold anything, so its flux is removed before any arithmetic.
            flux = torch.where(ivar > 0, flux, 0.0)
            reconstruction, latent = self._model(flux, ivar)
            away = self._rest_away
            if spectra.redshift is not None:
                near = near_lines(spectra.grid, self._settings.filter_velocity, spectra.redshift[batch])
                away = torch.from_numpy(~near).to(self._device)
            scores.append(reconstruction_scores(flux, ivar, reconstruction, away, self._settings).cpu())
            latents.append(latent.cpu())
        if not scores:
            return np.zeros((0, len(SCORES)), np.float32), np.zeros((0, 0), np.float32)
        return torch.cat(scores).numpy(), torch.cat(latents).numpy()

    @torch.inference_mode()
    def reconstruct(self, spectra: Spectra) -> Float32[np.ndarray, "n pixels"]:
        """Give the model's reconstruction, in the unit of the store."""
        ivar = _tensor(spectra.ivar).to(self._device)
        flux = torch.where(ivar > 0, _tensor(spectra.flux).to(self._device), 0.0)
        reconstruction: Float32[np.ndarray, "n pixels"] = self._model(flux, ivar)[0].cpu().numpy()
        return reconstruction


def _tensor(values: Float32[np.ndarray, "n pixels"]) -> Float32[Tensor, "n pixels"]:
    """Share an array with torch; one that must not be written to, such as a repeated row, is copied as torch asks."""
    return torch.from_numpy(np.require(values, requirements="W"))


class ReconstructionDetector:
    """One of the reconstruction scores as a `Detector`.

    Arguments:
        scores: the scores to pick from.
        name: one of `SCORES`.
    """

    def __init__(self, scores: ReconstructionScores, name: str) -> None:
        self._scores = scores
        self._index = SCORES.index(name)

    def score(self, spectra: Spectra) -> Float32[np.ndarray, "n"]:
        """Score spectra; higher = odder."""
        return np.ascontiguousarray(self._scores(spectra)[0][:, self._index])
