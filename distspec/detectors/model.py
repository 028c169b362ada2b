"""All scores of a trained model from one pass: what it fails to reconstruct, and how rare the latents are."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from distspec.config import Score
from distspec.detectors.reconstruction import SCORES, reconstruction_scores
from distspec.errors import ConfigError
from distspec.lines import near_lines
from distspec.models.autoencoder import TwoStage
from distspec.models.build import within_reach
from distspec.models.checkpoint import Checkpoint
from distspec.models.convolutional import ConvolutionalAutoencoder
from distspec.models.redshifted import RedshiftedAutoencoder
from distspec.spectra import Spectra

__all__ = ["DENSITY", "ModelDetector", "ModelScores", "Scored", "names_of"]

DENSITY = "density"
"""Name of the score -log p(z) of the latents z, p summed over classes (Böhm, Kim & Juneau, §2.3)."""


class Scored(NamedTuple):
    """What a model says of n spectra.

    Arguments:
        scores: in the order of `names_of`; higher = odder.
        latents: of the autoencoder.
        posterior: probability of each class of the density; no columns where the model has none.
    """

    scores: Float32[np.ndarray, "n k"]
    latents: Float32[np.ndarray, "n latents"]
    posterior: Float32[np.ndarray, "n classes"]


def names_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Name the scores of a model."""
    return (*SCORES, DENSITY) if checkpoint.density is not None else SCORES


class ModelScores:
    """A checkpoint and the score settings, ready to score batches in one pass.

    Arguments:
        checkpoint: the trained model.
        settings: filter, trimming and ε.
        device: torch device of the model.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Score, device: str = "cpu") -> None:
        self.names = names_of(checkpoint)
        self._model = checkpoint.model.to(device).eval()
        self._density = None if checkpoint.density is None else checkpoint.density.to(device).eval()
        self._latents = checkpoint.latents
        self._settings = settings
        self._device = device
        self._rest_away = torch.from_numpy(~near_lines(checkpoint.grid, settings.filter_velocity)).to(device)

    @torch.inference_mode()
    def __call__(self, spectra: Spectra) -> Scored:
        """Give all scores, the latents and the classes of the spectra."""
        classes = 0 if self._density is None else len(self._density.names)
        if not len(spectra):
            widths = (len(self.names), self._latents, classes)
            return Scored(*(np.zeros((0, width), np.float32) for width in widths))
        parts = [self._batch(spectra[start]) for start in self._slices(spectra)]
        return Scored(*(torch.cat(columns).numpy() for columns in zip(*parts, strict=True)))

    def _batch(self, spectra: Spectra) -> tuple[Tensor, Tensor, Tensor]:
        flux, ivar, redshift = self._bring(spectra)
        reconstruction, latents = self._model(flux, ivar, redshift)
        judged = within_reach(self._model, ivar, redshift)
        scores = reconstruction_scores(flux, judged, reconstruction, self._away(spectra), self._settings)
        posterior = latents.new_zeros(len(latents), 0)
        if self._density is not None:
            density, posterior = self._density.score_and_posterior(latents)
            scores = torch.cat([scores, density[:, None]], dim=1)
        return scores.cpu(), latents.float().cpu(), posterior.cpu()

    @torch.inference_mode()
    def one(self, spectra: Spectra, name: str) -> Float32[np.ndarray, "n"]:
        """Give one of the scores, with no more work than it needs."""
        scores = [torch.zeros(0)]
        for start in self._slices(spectra):
            part = spectra[start]
            flux, ivar, redshift = self._bring(part)
            if name == DENSITY and self._density is not None:
                scores.append(self._density.score(self._model.encode(flux, ivar, redshift)).cpu())  # type: ignore[operator]
            else:
                reconstruction = self._model(flux, ivar, redshift)[0]
                judged = within_reach(self._model, ivar, redshift)
                found = reconstruction_scores(flux, judged, reconstruction, self._away(part), self._settings)
                scores.append(found[:, SCORES.index(name)].cpu())
        values: Float32[np.ndarray, "n"] = torch.cat(scores).numpy()
        return values

    @torch.inference_mode()
    def reconstruct(self, spectra: Spectra) -> Float32[np.ndarray, "n pixels"]:
        """Give the model's reconstruction, in the unit of the store."""
        reconstruction: Float32[np.ndarray, "n pixels"] = self._model(*self._bring(spectra))[0].cpu().numpy()
        return reconstruction

    @torch.no_grad()
    def decoder(self, spectra: Spectra) -> Callable[[Float[Tensor, "n D"]], Float32[Tensor, "n pixels"]]:
        """Give what decodes other latents of these spectra, in the unit of the store.

        What latents do not tell is that of each spectrum's own reconstruction: redshift and brightness.
        """
        flux, ivar, redshift = self._bring(spectra)
        factor, offset = _brightness(self._model, flux, ivar, redshift)

        @torch.no_grad()
        def decode(latents: Tensor) -> Tensor:
            flux: Tensor = self._model.decode(latents.float(), redshift)  # type: ignore[operator]
            return flux * factor[:, None] + offset[:, None]

        return decode

    def _slices(self, spectra: Spectra) -> list[slice]:
        size = self._settings.batch
        return [slice(start, start + size) for start in range(0, len(spectra), size)]

    def _bring(self, spectra: Spectra) -> tuple[Tensor, Tensor, Tensor | None]:
        flux, ivar = (_tensor(values).to(self._device) for values in (spectra.flux, spectra.ivar))
        redshift = None
        if spectra.redshift is not None:
            redshift = torch.from_numpy(spectra.redshift).float().to(self._device)
        # NaN times zero is NaN: a masked pixel may hold anything, so its flux is removed before any arithmetic.
        return torch.where(ivar > 0, flux, 0.0), ivar, redshift

    def _away(self, spectra: Spectra) -> Tensor:
        if spectra.redshift is None:
            return self._rest_away
        near = near_lines(spectra.grid, self._settings.filter_velocity, spectra.redshift)
        return torch.from_numpy(~near).to(self._device)


def _tensor(values: Float32[np.ndarray, "n pixels"]) -> Float32[Tensor, "n pixels"]:
    """Share an array with torch; one that must not be written to, such as a repeated row, is copied as torch asks."""
    return torch.from_numpy(np.require(values, requirements="W"))


def _brightness(
    model: nn.Module, flux: Tensor, ivar: Tensor, redshift: Tensor | None
) -> tuple[Float32[Tensor, "n"], Float32[Tensor, "n"]]:
    """Give factor and offset between what a model decodes and its reconstruction in the store's unit."""
    seen, last = (flux, ivar), model
    if isinstance(model, TwoStage):
        seen, last = model.clean(flux, ivar, redshift), model.second
    factor, offset = torch.ones_like(flux[:, 0]), torch.zeros_like(flux[:, 0])
    if isinstance(last, ConvolutionalAutoencoder):
        _, factor, offset = last.scaled(*seen)
    elif isinstance(last, RedshiftedAutoencoder) and last.settings.fit_amplitude:
        brought, latents = last(*seen, redshift)
        decoded = last.decode(latents, redshift)
        square = decoded.square().sum(dim=1)
        factor = torch.where(square > 0, (decoded * brought).sum(dim=1) / square, factor)
    return factor, offset


class ModelDetector:
    """One of the scores of a model as a `Detector`.

    Arguments:
        scores: the scores to pick from.
        name: one of `names_of` the model.

    Raises:
        ConfigError: the model has no such score.
    """

    def __init__(self, scores: ModelScores, name: str) -> None:
        if name not in scores.names:
            known = ", ".join(scores.names)
            raise ConfigError(f"the model has no score {name!r}, only {known}; {DENSITY!r} needs train.density")
        self._scores = scores
        self._name = name

    def score(self, spectra: Spectra) -> Float32[np.ndarray, "n"]:
        """Score spectra; higher = odder."""
        return self._scores.one(spectra, self._name)
