"""Scores from what an autoencoder fails to reconstruct: eight variants, and chi-squared, from one pass.

The eight are {plain, filtered, trimmed, filtered and trimmed} x {squared error, weighted by inverse flux}. As in the
public code of Ortiz & Boquien, a score is the *root of the sum* of the kept terms, not their mean; ranks are the same
for one variant, magnitudes are not comparable between variants or between spectra of very different coverage.
"""

from typing import Final, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from distspec.config import Score, ScoreName
from distspec.lines import near_lines
from distspec.models.checkpoint import Checkpoint
from distspec.spectra import Spectra

__all__ = ["SCORES", "ReconstructionDetector", "ReconstructionScores", "reconstruction_scores"]

SCORES: Final[tuple[str, ...]] = get_args(ScoreName)
"""Names of the scores, in the order of `reconstruction_scores`. `chi2` is the masked chi-squared per good pixel."""

_BLOCK: Final = 128
"""Spectra scored at once on a processor: the temporaries then stay in a core's cache."""

_GROUP: Final = 4
"""Pixels of a group in the search for the largest residuals."""


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
    rows = _BLOCK if flux.device.type == "cpu" else max(len(flux), 1)
    parts = []
    for start in range(0, max(len(flux), 1), rows):
        part = slice(start, start + rows)
        nearby = away if len(away) == 1 else away[part]
        parts.append(_block_scores(flux[part], ivar[part], reconstruction[part], nearby, settings))
    return torch.cat(parts)


def _block_scores(
    flux: Float[Tensor, "n pixels"],
    ivar: Float[Tensor, "n pixels"],
    reconstruction: Float[Tensor, "n pixels"],
    away: Bool[Tensor, "#n pixels"],
    settings: Score,
) -> Float[Tensor, "n 9"]:
    """Compute all scores of a few spectra.

    Trimming drops a few of the largest residuals. Every sum is therefore made of two: over the pixels that no score can
    drop, once for all trimmings, and over the short list of the others. Nothing is subtracted, so nothing cancels.
    """
    good = ivar > 0
    residual = torch.where(good, reconstruction - flux, 0.0).abs_()
    weight = away.to(residual.dtype).expand_as(residual)
    seen = good.to(residual.dtype)
    count = seen.sum(dim=1, keepdim=True)
    pull = torch.where(good, ivar, 0.0).sqrt_().mul_(residual)
    chi2 = _dot(pull, pull) / count
    # A spike of 1e30 must not overflow when squared: work in units of each spectrum's largest residual.
    unit = residual.amax(dim=1, keepdim=True).clamp_min(torch.finfo(residual.dtype).tiny)
    square = (residual / unit).square_()
    weighted = square / torch.where(good, flux, 0.0).clamp_min_(0.0).add_(settings.epsilon)

    share = 0.01 * settings.trim_percentage
    pixels = flux.shape[1]
    # At most so many pixels can be dropped, and so many pixels near lines can stand before them in the list.
    longest = pixels - int(pixels * share) + int((~away).sum(dim=1).max())
    listed = _largest(residual, min(longest, pixels))
    listed_away = weight.gather(1, listed)
    dropped = count - (count.double() * share).floor()
    kept = (torch.arange(listed.shape[1], device=flux.device) >= dropped).to(residual.dtype)
    count_away = _dot(seen, weight)
    dropped_away = count_away - (count_away.double() * share).floor()
    kept_away = listed_away * (listed_away.cumsum(dim=1) > dropped_away)

    columns = []
    for terms in (square, weighted):
        long = terms.gather(1, listed)
        terms.scatter_(1, listed, 0.0)
        rest, rest_away = terms.sum(dim=1, keepdim=True), _dot(terms, weight)
        columns += [rest + long.sum(dim=1, keepdim=True), rest_away + _dot(long, listed_away)]
        columns += [rest + _dot(long, kept), rest_away + _dot(long, kept_away)]
    scores = torch.cat([torch.cat(columns, dim=1).sqrt_() * unit, chi2], dim=1)
    return torch.where(count > 0, scores, torch.nan)


def _dot(a: Float[Tensor, "n m"], b: Float[Tensor, "n m"]) -> Float[Tensor, "n 1"]:
    return torch.linalg.vecdot(a, b).unsqueeze(1)


def _largest(values: Float[Tensor, "n pixels"], most: int) -> Int64[Tensor, "n most"]:
    """Give each row's columns of the `most` largest values, largest first.

    The m largest of a row lie in the m groups of largest maxima, so most of the row need not be selected from.
    """
    pixels = values.shape[1]
    width = pixels // _GROUP
    if pixels % _GROUP or most >= width:
        return values.topk(most, dim=1).indices
    groups = values.view(len(values), _GROUP, width).amax(dim=1).topk(most, dim=1, sorted=False).indices
    columns = (groups.unsqueeze(1) + torch.arange(0, pixels, width, device=values.device)[:, None]).flatten(1)
    return columns.gather(1, values.gather(1, columns).topk(most, dim=1).indices)


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
