"""A convolutional autoencoder: each block of the encoder convolves and halves, the decoder mirrors it."""

import itertools
import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from distspec.config import Convolutional
from distspec.errors import ConfigError
from distspec.models.autoencoders.dense import START, Batch, Loss, Progress, masked_chi2, masked_mse
from distspec.spectra import WaveGrid

__all__ = ["ConvolutionalAutoencoder"]

_SHARE = 1e-3
"""A maximum below this share of the largest |flux| is noise and no measure of the spectrum's brightness."""


class ConvolutionalAutoencoder(nn.Module):
    """Convolutional encoder with a mirrored decoder, on spectra that are each scaled into [0, 1].

    The paper's network is known from its text alone ("eight layers" of convolution, pooling and up-sampling, kernels
    of 8, ReLU, a last convolution with sigmoid). It is read here as one convolution and one pooling a layer. Its
    sigmoid reaches no flux above 1, so the authors must have scaled what was 1 at 5550 Å; here the scaling is a step of
    its own, and its factors can be asked for (`scaled`): the paper's errors are in those units.

    A masked pixel enters as the mean spectrum of the training sample, scaled as the spectrum is: by the same rule over
    the same good pixels.

    References:
        Sharma et al. 2019, BSRSL 88, 174: §3 and figure 1.

    Arguments:
        settings: channels, kernel, scaling, output.
        grid: wavelengths of a spectrum.

    Raises:
        ConfigError: the number of pixels cannot be halved once for each of the channels.
    """

    def __init__(self, settings: Convolutional, grid: WaveGrid) -> None:
        super().__init__()
        _check(len(settings.channels), grid.pixels)
        self.settings = settings
        self.latents = settings.channels[-1] * grid.pixels // 2 ** len(settings.channels)
        channels = (1, *settings.channels)
        self.encoder = nn.Sequential()
        for inputs, outputs in itertools.pairwise(channels):
            self.encoder.extend([*_same(inputs, outputs, settings.kernel), nn.ReLU(), nn.MaxPool1d(2)])
        self.decoder = nn.Sequential()
        for inputs, outputs in itertools.pairwise((channels[-1], *channels[:0:-1])):
            self.decoder.extend([*_same(inputs, outputs, settings.kernel), nn.ReLU(), nn.Upsample(scale_factor=2)])
        self.decoder.extend(_same(channels[1], 1, settings.kernel))
        if settings.output == "sigmoid":
            self.decoder.append(nn.Sigmoid())
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(grid.pixels))

    def settle(self, mean: Float[Tensor, "pixels"]) -> None:
        """Take the mean spectrum of the training sample, which stands in for masked pixels."""
        self.mean.copy_(mean)

    def scaled(
        self, flux: Float[Tensor, "n pixels"], ivar: Float[Tensor, "n pixels"]
    ) -> tuple[Float[Tensor, "n pixels"], Float[Tensor, "n"], Float[Tensor, "n"]]:
        """Scale each spectrum by its good pixels.

        A spectrum without a clearly positive maximum is divided by its largest |flux|, one without any flux by 1.

        Returns:
            Scaled flux: at most 1, and at least 0 but for negative flux under "maximum"; factor and offset, in the
            store's unit, of flux = scaled * factor + offset.
        """
        good = ivar > 0
        flux = torch.where(good, flux, 0.0)
        factor, offset = self._scale(flux, good)
        scaled = (flux - offset[:, None]) / factor[:, None]
        of_mean, offset_of_mean = self._scale(self.mean.expand_as(flux), good)
        filled = (self.mean - offset_of_mean[:, None]) / of_mean[:, None]
        if self.settings.scaling != "none":
            filled = filled.clamp(0.0, 1.0)
        return torch.where(good, scaled, filled), factor, offset

    def encode(
        self,
        flux: Float[Tensor, "n pixels"],
        ivar: Float[Tensor, "n pixels"],
        redshift: Float[Tensor, "n"] | None = None,
    ) -> Float[Tensor, "n latents"]:
        """Map spectra to latents, channel by channel."""
        return self._encode(self.scaled(flux, ivar)[0])

    def decode(
        self, latents: Float[Tensor, "n latents"], redshift: Float[Tensor, "n"] | None = None
    ) -> Float[Tensor, "n pixels"]:
        """Map latents to *scaled* flux: a latent vector does not know how bright its spectrum was."""
        channels = self.settings.channels[-1]
        flux: Tensor = self.decoder(latents.reshape(len(latents), channels, self.latents // channels))
        return flux.squeeze(1)

    def forward(
        self,
        flux: Float[Tensor, "n pixels"],
        ivar: Float[Tensor, "n pixels"],
        redshift: Float[Tensor, "n"] | None = None,
    ) -> tuple[Float[Tensor, "n pixels"], Float[Tensor, "n latents"]]:
        """Give reconstruction, in the store's unit, and latents."""
        scaled, factor, offset = self.scaled(flux, ivar)
        latents = self._encode(scaled)
        return self.decode(latents) * factor[:, None] + offset[:, None], latents.to(flux.dtype)

    def loss(self, batch: Batch, *, kind: Loss = "chi2", progress: Progress = START) -> tuple[Tensor, Tensor]:
        """Sum squared residuals and count the good pixels.

        "mse" is the paper's: the squares are of scaled flux, so that a bright spectrum counts as much as a faint one.
        "chi2" is in units of σ.
        """
        flux, ivar, _ = batch
        if kind == "chi2":
            return masked_chi2(flux, ivar, self(flux, ivar)[0])
        scaled = self.scaled(flux, ivar)[0]
        return masked_mse(scaled, ivar, self.decode(self._encode(scaled)))

    def _encode(self, scaled: Float[Tensor, "n pixels"]) -> Float[Tensor, "n latents"]:
        latents: Tensor = self.encoder(scaled.unsqueeze(1))
        return latents.flatten(1)

    def _scale(
        self, flux: Float[Tensor, "n pixels"], good: Bool[Tensor, "n pixels"]
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """Give factor and offset of each spectrum."""
        zero = torch.zeros_like(flux[:, 0])
        if self.settings.scaling == "none":
            return zero + 1, zero
        largest = torch.where(good, flux, -math.inf).amax(dim=1)
        smallest = torch.where(good, flux, math.inf).amin(dim=1)
        seen = good.any(dim=1)
        if self.settings.scaling == "range":
            offset = torch.where(seen, smallest, zero)
            factor = torch.where(seen, largest, zero) - offset
        else:
            offset = zero
            brightest = torch.where(seen, torch.maximum(largest, -smallest), zero)
            factor = torch.where(largest > _SHARE * brightest, largest, brightest)
        return torch.where(factor > torch.finfo(flux.dtype).tiny, factor, 1.0), offset


def _same(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    """Convolve to the same length. An even kernel is padded as Keras does: one pixel less on the left.

    PyTorch's own padding="same" does this too, but warns.
    """
    return [nn.ZeroPad1d(((kernel - 1) // 2, kernel // 2)), nn.Conv1d(inputs, outputs, kernel)]


def _check(depth: int, pixels: int) -> None:
    step = 2**depth
    if pixels % step == 0:
        return
    below, above = pixels - pixels % step, pixels + step - pixels % step
    fits = f"{below} or {above}" if below else f"{above}"
    possible = (pixels & -pixels).bit_length() - 1
    fewer = f", or at most {possible} channels" if possible else ""
    raise ConfigError(f"{pixels} pixels cannot be halved {depth} times, once a channel: use {fits} pixels{fewer}")
