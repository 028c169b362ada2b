"""Autoencoders: what we believe an ordinary spectrum looks like, in few numbers.

A model takes flux and ivar as they stand in the store and gives the reconstruction in the same unit. What it learned of
the training sample besides its weights (mean spectrum, scale) are buffers, so they travel with the weights.
"""

import itertools

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distspec.config import Dense

__all__ = ["DenseAutoencoder", "masked_chi2"]


class DenseAutoencoder(nn.Module):
    """Dense encoder with a mirrored decoder.

    A masked pixel enters as the mean spectrum of the training sample, that is as zero after centering: its flux has no
    influence.

    References:
        Böhm, Kim & Juneau (PAE), Table 2 and §3.3: 1000-800-590-10 and mirror, no activation on latents and output.

    Arguments:
        settings: layer widths, activation, dropout.
        pixels: length of a spectrum.
    """

    def __init__(self, settings: Dense, pixels: int) -> None:
        super().__init__()
        widths = [pixels, *settings.hidden, settings.latents]
        self.encoder = _stack(widths, settings)
        self.decoder = _stack(widths[::-1], settings)
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("scale", torch.ones(pixels))

    def encode(self, flux: Float[Tensor, "n pixels"], ivar: Float[Tensor, "n pixels"]) -> Float[Tensor, "n latents"]:
        """Map spectra to latents."""
        centered = (flux - self.mean) / self.scale
        latents: Tensor = self.encoder(torch.where(ivar > 0, centered, 0.0))
        return latents

    def decode(self, latents: Float[Tensor, "n latents"]) -> Float[Tensor, "n pixels"]:
        """Map latents to flux in the store's unit."""
        flux: Tensor = self.decoder(latents) * self.scale + self.mean
        return flux

    def forward(
        self, flux: Float[Tensor, "n pixels"], ivar: Float[Tensor, "n pixels"]
    ) -> tuple[Float[Tensor, "n pixels"], Float[Tensor, "n latents"]]:
        """Give reconstruction and latents."""
        latents = self.encode(flux, ivar)
        return self.decode(latents), latents


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
