"""Autoencoders: what we believe an ordinary spectrum looks like, in few numbers.

A model takes flux and ivar as they stand in the store and gives the reconstruction in the same unit. What it learned of
the training sample besides its weights (the mean spectrum) are buffers, so they travel with the weights. A masked pixel
(ivar = 0) has no influence on anything.
"""

import itertools
from typing import Final, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distspec.config import Dense
from distspec.spectra import WaveGrid

__all__ = [
    "START",
    "Autoencoder",
    "Batch",
    "DenseAutoencoder",
    "Loss",
    "Progress",
    "TwoStage",
    "masked_chi2",
    "masked_mse",
]

Loss = Literal["chi2", "mse"]


class Batch(NamedTuple):
    """n spectra on their way through a network."""

    flux: Float[Tensor, "n pixels"]
    ivar: Float[Tensor, "n pixels"]
    redshift: Float[Tensor, "n"] | None = None
    """Of lines on the grid; 0 or none at rest."""


class Progress(NamedTuple):
    """How far a fit has come: the epoch, from 0, and how many there are to be."""

    epoch: int
    epochs: int


START: Final = Progress(0, 1)


class Autoencoder(Protocol):
    """What every autoencoder can do; n spectra at a time, redshifts are those of lines on the grid."""

    latents: int
    """Length of one spectrum's latent vector."""

    def settle(self, mean: Float[Tensor, "pixels"]) -> None:
        """Take the mean spectrum of the training sample, before training."""
        ...

    def encode(
        self,
        flux: Float[Tensor, "n pixels"],
        ivar: Float[Tensor, "n pixels"],
        redshift: Float[Tensor, "n"] | None = None,
    ) -> Float[Tensor, "n latents"]:
        """Map spectra to latents, deterministically."""
        ...

    def decode(
        self, latents: Float[Tensor, "n latents"], redshift: Float[Tensor, "n"] | None = None
    ) -> Float[Tensor, "n pixels"]:
        """Map latents to flux."""
        ...

    def __call__(
        self,
        flux: Float[Tensor, "n pixels"],
        ivar: Float[Tensor, "n pixels"],
        redshift: Float[Tensor, "n"] | None = None,
    ) -> tuple[Float[Tensor, "n pixels"], Float[Tensor, "n latents"]]:
        """Give reconstruction, in the store's unit, and latents."""
        ...

    def loss(self, batch: Batch, *, kind: Loss = "chi2", progress: Progress = START) -> tuple[Tensor, Tensor]:
        """Give the objective as (total, count), sums that add up over batches and workers."""
        ...


class DenseAutoencoder(nn.Module):
    """Dense encoder with a mirrored decoder.

    A masked pixel enters as the mean spectrum of the training sample, that is as zero after centering: its flux has no
    influence.

    References:
        Böhm, Kim & Juneau (PAE), Table 2 and §3.3: 1000-800-590-10 and mirror, no activation on latents and output.

    Arguments:
        settings: layer widths, activation, dropout.
        grid: wavelengths of a spectrum.
    """

    def __init__(self, settings: Dense, grid: WaveGrid) -> None:
        super().__init__()
        self.latents = settings.latents
        self._by_mean = settings.scale == "mean"
        widths = [grid.pixels, *settings.hidden, settings.latents]
        self.encoder = _stack(widths, settings)
        self.decoder = _stack(widths[::-1], settings)
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(grid.pixels))
        self.register_buffer("scale", torch.ones(grid.pixels))

    def settle(self, mean: Float[Tensor, "pixels"]) -> None:
        """Centre on the mean spectrum, and divide by it where the settings say so."""
        self.mean.copy_(mean)
        if self._by_mean:
            # A mean near zero (no signal there) must not blow up noise; a thousandth of the typical level is the floor.
            self.scale.copy_(mean.abs().clamp_min(1e-3 * float(mean.abs().median()) or 1.0))

    def encode(
        self,
        flux: Float[Tensor, "n pixels"],
        ivar: Float[Tensor, "n pixels"],
        redshift: Float[Tensor, "n"] | None = None,
    ) -> Float[Tensor, "n latents"]:
        """Map spectra to latents."""
        centered = (flux - self.mean) / self.scale
        latents: Tensor = self.encoder(torch.where(ivar > 0, centered, 0.0))
        return latents

    def decode(
        self, latents: Float[Tensor, "n latents"], redshift: Float[Tensor, "n"] | None = None
    ) -> Float[Tensor, "n pixels"]:
        """Map latents to flux in the store's unit."""
        flux: Tensor = self.decoder(latents) * self.scale + self.mean
        return flux

    def forward(
        self,
        flux: Float[Tensor, "n pixels"],
        ivar: Float[Tensor, "n pixels"],
        redshift: Float[Tensor, "n"] | None = None,
    ) -> tuple[Float[Tensor, "n pixels"], Float[Tensor, "n latents"]]:
        """Give reconstruction and latents."""
        latents = self.encode(flux, ivar)
        return self.decode(latents), latents

    def loss(self, batch: Batch, *, kind: Loss = "chi2", progress: Progress = START) -> tuple[Tensor, Tensor]:
        """Sum the squared residuals, in units of σ or of the store, and count the good pixels."""
        of = masked_chi2 if kind == "chi2" else masked_mse
        flux, ivar, _ = batch
        return of(flux, ivar, self(flux, ivar)[0])


class TwoStage(nn.Module):
    """A second autoencoder behind a first: x' = g1(f1(x)), then z = f2(x') and x'' = g2(z).

    What the first makes of a spectrum is denoised and inpainted; the whole of it replaces the data. The second sees
    every pixel of it alike, so its latents owe nothing to noise and gaps.

    References:
        Böhm, Kim & Juneau (PAE), §3.3: stage 2 starts from the weights of stage 1 and minimizes
        the squared error on x'.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.latents: int = second.latents  # type: ignore[assignment]

    def clean(
        self,
        flux: Float[Tensor, "n pixels"],
        ivar: Float[Tensor, "n pixels"],
        redshift: Float[Tensor, "n"] | None = None,
    ) -> tuple[Float[Tensor, "n pixels"], Float[Tensor, "n pixels"]]:
        """Give x' and its weights, all alike."""
        flux = self.first(flux, ivar, redshift)[0]
        return flux, torch.ones_like(flux)

    def encode(
        self,
        flux: Float[Tensor, "n pixels"],
        ivar: Float[Tensor, "n pixels"],
        redshift: Float[Tensor, "n"] | None = None,
    ) -> Float[Tensor, "n latents"]:
        """Map spectra to the latents of the second stage."""
        latents: Tensor = self.second.encode(*self.clean(flux, ivar, redshift), redshift)  # type: ignore[operator]
        return latents

    def decode(
        self, latents: Float[Tensor, "n latents"], redshift: Float[Tensor, "n"] | None = None
    ) -> Float[Tensor, "n pixels"]:
        """Map latents of the second stage to flux."""
        flux: Tensor = self.second.decode(latents, redshift)  # type: ignore[operator]
        return flux

    def forward(
        self,
        flux: Float[Tensor, "n pixels"],
        ivar: Float[Tensor, "n pixels"],
        redshift: Float[Tensor, "n"] | None = None,
    ) -> tuple[Float[Tensor, "n pixels"], Float[Tensor, "n latents"]]:
        """Give the reconstruction of the whole chain and the latents of its second stage."""
        reconstruction, latents = self.second(*self.clean(flux, ivar, redshift), redshift)
        return reconstruction, latents


def _stack(widths: list[int], settings: Dense) -> nn.Sequential:
    """Chain linear layers; an activation (and dropout) follows each but the last."""
    activation = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}[settings.activation]
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Linear(inputs, outputs))
        if index < len(widths) - 2:
            layers.append(activation())
            if settings.dropout > 0:
                layers.append(nn.Dropout(settings.dropout))
    return nn.Sequential(*layers)


def masked_chi2(
    flux: Float[Tensor, "n pixels"], ivar: Float[Tensor, "n pixels"], reconstruction: Float[Tensor, "n pixels"]
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Sum (x - x̂)²/σ² over the unmasked pixels of the batch, and count them.

    Their ratio is the loss of the released PAE code (methods: mean over all unmasked pixels of the batch); sum and
    count are given apart because sums add up across batches and workers.
    """
    good = ivar > 0
    residual = torch.where(good, flux - reconstruction, 0.0)
    return (residual.square() * ivar).sum(), good.sum()


def masked_mse(
    flux: Float[Tensor, "n pixels"], ivar: Float[Tensor, "n pixels"], reconstruction: Float[Tensor, "n pixels"]
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Sum (x - x̂)² over the unmasked pixels of the batch, and count them."""
    good = ivar > 0
    return torch.where(good, flux - reconstruction, 0.0).square().sum(), good.sum()
