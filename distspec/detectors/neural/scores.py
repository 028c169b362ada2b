"""All scores of a trained model from one pass: what it fails to reconstruct, and how rare the latents are."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from distspec.config import Score
from distspec.detectors.neural.reconstruction import reconstruction_scores, scores_of
from distspec.errors import ConfigError
from distspec.models.autoencoders.convolutional import ConvolutionalAutoencoder
from distspec.models.autoencoders.dense import TwoStage
from distspec.models.autoencoders.redshifted import RedshiftedAutoencoder, within_reach
from distspec.models.checkpoint import Checkpoint
from distspec.models.transfer import Sent, Transfer
from distspec.spectra import Spectra
from distspec.spectra.lines.wavelengths import near_lines
from distspec.store import read_ahead

__all__ = ["DENSITY", "ERRORS", "ModelDetector", "ModelScores", "Scored", "names_of"]

DENSITY = "density"
"""Name of the score -log p(z) of the latents z, p summed over classes (Böhm, Kim & Juneau, §2.3)."""

ERRORS = ("rmse", "difference")
"""Fields of `Scored` that tell of a spectrum's errors as Sharma et al. tabulate them; a difference may be negative."""


class Scored(NamedTuple):
    """What a model says of n spectra.

    Arguments:
        scores: in the order of `names_of`; higher = odder.
        latents: of the autoencoder.
        posterior: probability of each class of the density; no columns where the model has none.
        rmse: root of the mean squared residual over good pixels, in the unit of the store.
        difference: mean over good pixels of observed minus reconstructed flux.
    """

    scores: Float32[np.ndarray, "n k"]
    latents: Float32[np.ndarray, "n latents"]
    posterior: Float32[np.ndarray, "n classes"]
    rmse: Float32[np.ndarray, "n"]
    difference: Float32[np.ndarray, "n"]


def names_of(checkpoint: Checkpoint, settings: Score) -> tuple[str, ...]:
    """Name the scores of a model."""
    names = scores_of(settings)
    return (*names, DENSITY) if checkpoint.density is not None else names


class ModelScores:
    """A checkpoint and the score settings, ready to score batches in one pass.

    Arguments:
        checkpoint: the trained model.
        settings: filter, trimming and ε.
        device: torch device of the model.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Score, device: str = "cpu") -> None:
        self.names = names_of(checkpoint, settings)
        self.settings = settings
        self.model = checkpoint.model.to(device).eval()
        self.density = None if checkpoint.density is None else checkpoint.density.to(device).eval()
        self._latents = checkpoint.latents
        self._transfer = Transfer(device)
        self._rest_away = torch.from_numpy(~near_lines(checkpoint.grid, settings.filter_velocity)).to(device)

    @torch.no_grad()
    def __call__(self, spectra: Spectra) -> Scored:
        """Give all scores, the latents and the classes of the spectra."""
        classes = 0 if self.density is None else len(self.density.names)
        if not len(spectra):
            shapes = ((0, len(self.names)), (0, self._latents), (0, classes), (0,), (0,))
            return Scored(*(np.zeros(shape, np.float32) for shape in shapes))
        parts = [self._batch(*batch) for batch in self._batches(spectra)]
        # From the device at once: it would be waited for after every batch.
        return Scored(*(torch.cat(columns).cpu().numpy() for columns in zip(*parts, strict=True)))

    def _batch(self, spectra: Spectra, sent: Sent) -> tuple[Tensor, ...]:
        flux, ivar, redshift = self._arrived(sent)
        reconstruction, latents = self.model(flux, ivar, redshift)
        judged = within_reach(self.model, ivar, redshift)
        scores = reconstruction_scores(flux, judged, reconstruction, self.away(spectra), self.settings)
        posterior = latents.new_zeros(len(latents), 0)
        if self.density is not None:
            density, posterior = self.density.score_and_posterior(latents)
            scores = torch.cat([scores, density[:, None]], dim=1)
        return scores, latents.float(), posterior, *_errors(flux, judged, reconstruction)

    @torch.no_grad()
    def some(self, spectra: Spectra, names: Sequence[str]) -> Float32[np.ndarray, "n k"]:
        """Give some of the scores, with no more work than they need."""
        scores = [torch.zeros(0, len(names), device=self._transfer.device)]
        scores += [self._some(*batch, names) for batch in self._batches(spectra)]
        values: Float32[np.ndarray, "n k"] = torch.cat(scores).cpu().numpy()
        return values

    def _some(self, spectra: Spectra, sent: Sent, names: Sequence[str]) -> Float32[Tensor, "n k"]:
        flux, ivar, redshift = self._arrived(sent)
        reconstruction, found = None, flux.new_zeros(len(flux), 0)
        if set(names) == {DENSITY}:
            latents = self.model.encode(flux, ivar, redshift)  # type: ignore[operator]
        else:
            reconstruction, latents = self.model(flux, ivar, redshift)
            judged = within_reach(self.model, ivar, redshift)
            found = reconstruction_scores(flux, judged, reconstruction, self.away(spectra), self.settings)
        if DENSITY in names and self.density is not None:
            density = self.density.score(latents)[:, None]
            found = (
                torch.cat([found, density], dim=1)
                if reconstruction is not None
                else density.expand(-1, len(self.names))
            )
        return found[:, [self.names.index(name) for name in names]]

    @torch.no_grad()
    def reconstruct(self, spectra: Spectra) -> Float32[np.ndarray, "n pixels"]:
        """Give the model's reconstruction, in the unit of the store."""
        reconstruction: Float32[np.ndarray, "n pixels"] = self.model(*self.bring(spectra))[0].cpu().numpy()
        return reconstruction

    @torch.no_grad()
    def latents_of(self, spectra: Spectra) -> Float32[Tensor, "n latents"]:
        """Give the latents."""
        latents: Tensor = self.model.encode(*self.bring(spectra))  # type: ignore[operator]
        return latents.float()

    @torch.no_grad()
    def decoder(self, spectra: Spectra) -> Callable[[Float[Tensor, "n D"]], Float32[Tensor, "n pixels"]]:
        """Give what decodes other latents of these spectra, in the unit of the store.

        What latents do not tell is that of each spectrum's own reconstruction: redshift and brightness.
        """
        flux, ivar, redshift = self.bring(spectra)
        factor, offset = _brightness(self.model, flux, ivar, redshift)

        @torch.no_grad()
        def decode(latents: Tensor) -> Tensor:
            flux: Tensor = self.model.decode(latents.float(), redshift)  # type: ignore[operator]
            return flux * factor[:, None] + offset[:, None]

        return decode

    def _batches(self, spectra: Spectra) -> Iterator[tuple[Spectra, Sent]]:
        """Give the spectra by batches, on their way to the device; to a GPU one batch ahead of its computation."""
        size = self.settings.batch
        batches = [spectra[start : start + size] for start in range(0, len(spectra), size)]
        sent = read_ahead(self._send, batches) if self._transfer.pinned else map(self._send, batches)
        return zip(batches, sent, strict=True)

    def bring(self, spectra: Spectra) -> tuple[Tensor, Tensor, Tensor | None]:
        """Give flux (0 where masked), ivar and redshift as the model takes them."""
        return self._arrived(self._send(spectra))

    def _send(self, spectra: Spectra) -> Sent:
        redshift = () if spectra.redshift is None else (torch.from_numpy(spectra.redshift).float(),)
        return self._transfer.send((_tensor(spectra.flux), _tensor(spectra.ivar), *redshift))

    def _arrived(self, sent: Sent) -> tuple[Tensor, Tensor, Tensor | None]:
        flux, ivar, *redshift = self._transfer.receive(sent)
        # NaN times zero is NaN: a masked pixel may hold anything, so its flux is removed before any arithmetic.
        return torch.where(ivar > 0, flux, 0.0), ivar, redshift[0] if redshift else None

    def away(self, spectra: Spectra) -> Tensor:
        """Mark the pixels away from the filtered lines; one row where they are the same for all."""
        if spectra.redshift is None:
            return self._rest_away
        near = near_lines(spectra.grid, self.settings.filter_velocity, spectra.redshift)
        return self._transfer.receive(self._transfer.send((torch.from_numpy(~near),)))[0]


def _tensor(values: Float32[np.ndarray, "n pixels"]) -> Float32[Tensor, "n pixels"]:
    """Share an array with torch; one that torch cannot share, such as a repeated row, is copied."""
    shared = values.flags.writeable and min(values.strides) >= 0
    return torch.from_numpy(values if shared else values.copy())


def _errors(flux: Tensor, ivar: Tensor, reconstruction: Tensor) -> tuple[Float32[Tensor, "n"], Float32[Tensor, "n"]]:
    """Give root mean square and mean of what a reconstruction leaves of the good pixels; NaN where there is none."""
    good = ivar > 0
    count = good.sum(dim=1)
    left = torch.where(good, flux - reconstruction, 0.0).double()
    # What no float32 can hold stays the largest number there is, as in the scores.
    most = torch.finfo(torch.float32).max
    rmse, difference = (left.square().sum(dim=1) / count).sqrt(), left.sum(dim=1) / count
    return rmse.clamp_max(most).float(), difference.clamp(-most, most).float()


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
        return self._scores.some(spectra, (self._name,))[:, 0]
