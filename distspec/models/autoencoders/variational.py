"""A variational autoencoder whose latents are held to a normal distribution by their divergence and by their sample."""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distspec.config import Variational
from distspec.models.autoencoders.dense import START, Batch, Loss, Progress
from distspec.spectra import WaveGrid

__all__ = ["VariationalAutoencoder", "kl_divergence", "mean_discrepancy"]

_LARGEST_EXPONENT = 20.0
"""Beyond it the exponential goes on as a straight line."""

_SEED = 20_251_005


class VariationalAutoencoder(nn.Module):
    """InfoVAE: a normal posterior per spectrum, q(z|x) = N(μ, σ²), dense layers, and a mirrored decoder.

    L = R · ⟨(x - x̂)²⟩ + (1 - α) KLD + (α + λ - 1) MMD: the first mean is over good pixels, KLD is a *mean* over latents
    too (a textbook's sum divided by their number), and MMD compares the batch's latents with as many from the prior.

    Latents and reconstructions are those of μ. (The authors' network samples z also where it scores, so their scores
    differ from run to run.) z is sampled in the loss alone: in training from the global generator, in evaluation from
    one with a fixed seed, so that the loss is the same quantity and yet does not change.

    A masked pixel enters as the mean spectrum of the training sample.

    References:
        Ortiz Manrique & Boquien 2025, arXiv 2510.05235, §3, and its public code; Zhao, Song & Ermon 2017 (InfoVAE).

    Arguments:
        settings: layer widths, R, α, λ.
        grid: wavelengths of a spectrum.
    """

    def __init__(self, settings: Variational, grid: WaveGrid) -> None:
        super().__init__()
        self.settings = settings
        self.latents = settings.latents
        widths = [grid.pixels, *settings.hidden]
        self.encoder = _stack(widths)
        self.head_mean = nn.Linear(widths[-1], settings.latents)
        self.head_log_variance = nn.Linear(widths[-1], settings.latents)
        self.decoder = _stack([settings.latents, *widths[:0:-1]])
        self.decoder.append(nn.Linear(widths[1] if settings.hidden else settings.latents, grid.pixels))
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(grid.pixels))

    def settle(self, mean: Float[Tensor, "pixels"]) -> None:
        """Take the mean spectrum of the training sample, which stands in for masked pixels."""
        self.mean.copy_(mean)

    def posterior(
        self, flux: Float[Tensor, "n pixels"], ivar: Float[Tensor, "n pixels"]
    ) -> tuple[Float[Tensor, "n latents"], Float[Tensor, "n latents"]]:
        """Give μ and log σ² of q(z|x)."""
        hidden = self.encoder(torch.where(ivar > 0, flux, self.mean))
        return self.head_mean(hidden), self.head_log_variance(hidden)

    def encode(
        self,
        flux: Float[Tensor, "n pixels"],
        ivar: Float[Tensor, "n pixels"],
        redshift: Float[Tensor, "n"] | None = None,
    ) -> Float[Tensor, "n latents"]:
        """Map spectra to the means of their posteriors."""
        return self.posterior(flux, ivar)[0]

    def decode(
        self, latents: Float[Tensor, "n latents"], redshift: Float[Tensor, "n"] | None = None
    ) -> Float[Tensor, "n pixels"]:
        """Map latents to flux in the store's unit."""
        flux: Tensor = self.decoder(latents)
        return flux

    def forward(
        self,
        flux: Float[Tensor, "n pixels"],
        ivar: Float[Tensor, "n pixels"],
        redshift: Float[Tensor, "n"] | None = None,
    ) -> tuple[Float[Tensor, "n pixels"], Float[Tensor, "n latents"]]:
        """Give the reconstruction from the means of the posteriors, and these means."""
        latents = self.encode(flux, ivar)
        return self.decode(latents).to(flux.dtype), latents.to(flux.dtype)

    def loss(self, batch: Batch, *, kind: Loss = "chi2", progress: Progress = START) -> tuple[Tensor, Tensor]:
        """Sum the three terms over the spectra, and count these.

        "mse" is the paper's; "chi2" has residuals in units of σ and the same R.
        """
        flux, ivar, _ = batch
        mean, log_variance = self.posterior(flux, ivar)
        with torch.autocast(flux.device.type, enabled=False):
            mean, log_variance = mean.to(flux.dtype), log_variance.to(flux.dtype)
            noise, prior = self._normal(mean)
            sample = mean + _exp(0.5 * log_variance) * noise
        reconstruction = self.decode(sample)
        good = ivar > 0
        square = torch.where(good, flux - reconstruction, 0.0).square()
        if kind == "chi2":
            square = square * ivar
        with torch.autocast(flux.device.type, enabled=False):
            total = self.settings.reconstruction * (square.sum(dim=1) / good.sum(dim=1).clamp_min(1)).sum()
            total = total + (1 - self.settings.alpha) * len(flux) * kl_divergence(mean, log_variance)
            weight = self.settings.alpha + self.settings.lam - 1
            if weight > 0:
                total = total + weight * len(flux) * mean_discrepancy(prior, sample)
        return total, torch.tensor(len(flux), device=flux.device)

    def _normal(self, like: Float[Tensor, "n latents"]) -> Float[Tensor, "2 n latents"]:
        """Draw from N(0, 1), twice."""
        if self.training:
            return torch.randn((2, *like.shape), dtype=like.dtype, device=like.device)
        # Drawn on the processor, so that a validation loss does not depend on the device.
        generator = torch.Generator().manual_seed(_SEED)
        return torch.randn((2, *like.shape), generator=generator, dtype=like.dtype, device="cpu").to(like.device)


def kl_divergence(mean: Float[Tensor, "n latents"], log_variance: Float[Tensor, "n latents"]) -> Float[Tensor, ""]:
    """Give -½ ⟨1 + log σ² - μ² - σ²⟩, averaged over spectra and latents: 0 where the posterior is N(0, 1)."""
    return -0.5 * (1 + log_variance - mean.square() - _exp(log_variance)).mean()


def mean_discrepancy(prior: Float[Tensor, "m latents"], sample: Float[Tensor, "n latents"]) -> Float[Tensor, ""]:
    """Give the squared maximum mean discrepancy ⟨k(p, p')⟩ + ⟨k(q, q')⟩ - 2⟨k(p, q)⟩, k(a, b) = exp(-‖a - b‖²/dim²).

    The means are over all pairs, those of a point with itself among them, as in the public code.
    """
    # Distances do not change, and those of points far from zero keep their digits.
    center = sample.detach().mean(dim=0)
    prior, sample = prior - center, sample - center
    return _kernel(prior, prior).mean() + _kernel(sample, sample).mean() - 2 * _kernel(prior, sample).mean()


def _kernel(a: Float[Tensor, "m latents"], b: Float[Tensor, "n latents"]) -> Float[Tensor, "m n"]:
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T
    return torch.exp(-squares.clamp_min(0.0) / a.shape[1] ** 2)


def _exp(x: Float[Tensor, "n latents"]) -> Float[Tensor, "n latents"]:
    """Exponentiate without overflow: beyond a limit follow the tangent, so that the gradient still leads back."""
    inside = x.clamp_max(_LARGEST_EXPONENT)
    return inside.exp() * (1 + (x - inside))


def _stack(widths: list[int]) -> nn.Sequential:
    """Chain linear layers, each with its activation."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers)
