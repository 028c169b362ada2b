"""Neural spline flow: the density of latents as a chain of autoregressive rational-quadratic splines.

The flow maps latents z to x, which follows a standard normal distribution if the fit is good; log p(z|c) is the normal
log density of x plus the log determinant of the map. Three maps follow each other: whitening, an affine map that learns
where each class lies and how wide it is, and splines, which bend the bulk and leave the tails straight.
"""

import math
from typing import Any, Final

import torch
import zuko
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from zuko.flows.autoregressive import MaskedAutoregressiveTransform

from distspec.config import Spline

__all__ = ["SplineFlow"]

_UNIT: Final = 1.5
"""Standard deviations in the splines' unit: they act, and end, at 5 units."""

_REACH: Final = 10.0
"""Units up to which a coordinate steers the maps of the others."""

_FLOOR: Final = 1e-12
"""Smallest variance kept, as a share of the largest: latents that never vary do not make the map singular."""

_MOST_WEIGHTS: Final = 1 << 26
"""Above this a description is refused before anything is made: no checkpoint may ask for memory without bound."""


class SplineFlow(nn.Module):
    """Autoregressive neural spline flow (zuko), conditioned on the class by a one-hot context.

    Whitening knows the pooled latents only, and a rare class may lie far out in them, where splines end: hence the
    autoregressive affine map. A coordinate beyond the splines' range passes all of them unchanged. It steers the others
    only up to ±10 (the networks would extrapolate without bound), and what exceeds is added at the end: the map stays
    one-to-one and its determinant exact, however far out the latents lie, and the tails are Gaussian.

    References:
        Durkan et al. 2019, arXiv 1906.04032 (splines); Papamakarios et al. 2017, arXiv 1705.07057 (affine map);
        Böhm, Kim & Juneau, eqs. 5 and 6, for its place.

    Arguments:
        settings: number and size of the networks, bins of a spline, and whether latents are whitened.
        latents: D, dimension of z.
        classes: C; one class needs no label.

    Raises:
        ValueError: the network would have more than 2^26 weights.
    """

    def __init__(self, settings: Spline, latents: int, classes: int = 1) -> None:
        super().__init__()
        self.classes = classes
        self.latents = latents
        self.shape = {"latents": latents, "classes": classes}
        self._whiten = settings.whiten
        _require_bounded(settings, latents, classes)
        # zuko finds its masks from values, and a meta tensor has none.
        context, hidden = classes if classes > 1 else 0, settings.hidden
        with torch.device("cpu"):
            self.affine = MaskedAutoregressiveTransform(latents, context, hidden_features=hidden)
            self.splines = zuko.flows.NSF(
                latents, context, bins=settings.bins, transforms=settings.transforms, hidden_features=hidden
            ).transform
        for name, parameter in self.named_parameters():
            # Of one latent and one class there is no network, and zuko begins with random maps.
            if ".phi." in name:
                nn.init.zeros_(parameter)
        self.to(torch.get_default_device())
        self.mean: Tensor
        self.whitening: Tensor
        self.colouring: Tensor
        self.log_volume: Tensor
        self.register_buffer("mean", torch.zeros(latents, dtype=torch.float64))
        self.register_buffer("whitening", torch.eye(latents, dtype=torch.float64))
        self.register_buffer("colouring", torch.eye(latents, dtype=torch.float64))
        self.register_buffer("log_volume", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def settle(self, mean: Float[Tensor, "D"], covariance: Float[Tensor, "D D"]) -> None:
        """Set the linear map that comes first; call it before training, with the moments of the training latents.

        The map is the inverse symmetric root of the covariance, or of its diagonal alone where `whiten` is off.
        """
        covariance = covariance.to(self.mean)
        if not self._whiten:
            covariance = covariance.diagonal().diag()
        variances, axes = torch.linalg.eigh(covariance)
        largest = variances[-1].clamp_min(0.0)
        variances = torch.where(largest > 0, variances.clamp_min(_FLOOR * largest), 1.0)
        self.mean.copy_(mean)
        self.whitening.copy_((axes / variances.sqrt()) @ axes.T)
        self.colouring.copy_((axes * variances.sqrt()) @ axes.T)
        self.log_volume.copy_(-0.5 * variances.log().sum())

    def to_normal(
        self, z: Float[Tensor, "n D"], label: Int64[Tensor, "n"] | None = None
    ) -> tuple[Float64[Tensor, "n D"], Float64[Tensor, "n"]]:
        """Map latents to x.

        Arguments:
            z: latents, in the autoencoder's unit.
            label: class of each; may be none where there is one class.

        Returns:
            x, and log |det dx/dz|; in double precision, though the splines work in that of the weights.

        Raises:
            ValueError: a label is missing or is not one of the classes.
        """
        context = self._context(label, len(z))
        white = (z.to(self.mean) - self.mean) @ self.whitening.T
        if not len(z):
            return white, white.sum(dim=1)
        moved, first = self._moving(context, white).call_and_ladj(white)
        units = moved / _UNIT
        near = units.clamp(-_REACH, _REACH)
        bent, second = self.splines(context).call_and_ladj(near.to(self._weight))
        return (bent.to(units) + (units - near)) * _UNIT, first.to(white) + second.to(white) + self.log_volume

    def from_normal(
        self, x: Float[Tensor, "n D"], label: Int64[Tensor, "n"] | None = None
    ) -> tuple[Float64[Tensor, "n D"], Float64[Tensor, "n"]]:
        """Map x back to latents.

        Returns:
            z, and log |det dx/dz| of the forward map there.

        Raises:
            ValueError: a label is missing or is not one of the classes.
        """
        context = self._context(label, len(x))
        units = x.to(self.mean) / _UNIT
        if not len(x):
            return units, units.sum(dim=1)
        near = units.clamp(-_REACH, _REACH)
        moved = (self.splines(context).inv(near.to(self._weight)).to(units) + (units - near)) * _UNIT
        white = torch.zeros_like(moved)
        # Each pass finds one more coordinate, from those before it.
        for _ in range(self.latents):
            white = self._moving(context, white).inv(moved)
        z = white @ self.colouring.T + self.mean
        return z, self.to_normal(z, label)[1]

    def log_prob(self, z: Float[Tensor, "n D"], label: Int64[Tensor, "n"] | None = None) -> Float64[Tensor, "n"]:
        """Give log p(z|c), in nats.

        Raises:
            ValueError: a label is missing or is not one of the classes.
        """
        x, logdet = self.to_normal(z, label)
        return logdet - 0.5 * (x.square().sum(dim=1) + self.latents * math.log(2 * math.pi))

    def log_prob_all(self, z: Float[Tensor, "n D"]) -> Float64[Tensor, "n classes"]:
        """Give log p(z|c) of every class."""
        label = torch.arange(self.classes, device=z.device).repeat(len(z))
        return self.log_prob(z.repeat_interleave(self.classes, dim=0), label).view(len(z), self.classes)

    @torch.no_grad()
    def sample(
        self, n: int, label: Int64[Tensor, "n"] | None = None, generator: torch.Generator | None = None
    ) -> Float64[Tensor, "n D"]:
        """Draw latents.

        Arguments:
            n: how many.
            label: class of each; may be none where there is one class.
            generator: of random numbers, on the CPU whatever the flow's device.

        Raises:
            ValueError: a label is missing or is not one of the classes.
        """
        normal = torch.randn(n, self.latents, generator=generator, dtype=torch.float64)
        return self.from_normal(normal.to(self.mean), label)[0]

    def loss(
        self,
        z: Float[Tensor, "n D"],
        label: Int64[Tensor, "n"] | None = None,
        weight: Float[Tensor, "n"] | None = None,
    ) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
        """Sum -w log p(z|c) over the batch, and w; apart, because sums add up across batches and workers.

        A row without a known class, label -1, has no part in either.
        """
        weight = torch.ones_like(self.mean[:1]).expand(len(z)) if weight is None else weight.to(self.mean)
        if label is not None:
            weight = torch.where(label >= 0, weight, 0.0)
            label = label.clamp_min(0)
        return -(weight * self.log_prob(z, label)).sum(), weight.sum()

    def forward(
        self,
        z: Float[Tensor, "n D"],
        label: Int64[Tensor, "n"] | None = None,
        weight: Float[Tensor, "n"] | None = None,
    ) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
        """Give the loss: gradients are averaged over workers only where a wrapped module is called."""
        return self.loss(z, label, weight)

    @property
    def _weight(self) -> Tensor:
        """One of the weights: the splines work in its precision and on its device."""
        weight: Tensor = next(self.splines.parameters())
        return weight

    def _moving(self, context: Float[Tensor, "n classes"] | None, white: Float64[Tensor, "n D"]) -> Any:
        """Make the affine map that the class and the coordinates before each ask for."""
        if self.latents == 1:
            return self.affine(context)
        return self.affine.meta(context, white.clamp(-_REACH, _REACH).to(self._weight))

    def _context(self, label: Int64[Tensor, "n"] | None, n: int) -> Float[Tensor, "n classes"] | None:
        if label is None:
            if self.classes > 1:
                raise ValueError(f"no label for a density of {self.classes} classes; give one per row")
            return None
        if label.shape != (n,):
            raise ValueError(f"labels of shape {tuple(label.shape)} for {n} rows; give one per row")
        if n and not 0 <= int(label.min()) <= int(label.max()) < self.classes:
            raise ValueError(
                f"labels reach from {int(label.min())} to {int(label.max())}; expected 0 <= label < {self.classes}"
            )
        if self.classes == 1:
            return None
        return (label[:, None] == torch.arange(self.classes, device=label.device)).to(self._weight)


def _require_bounded(settings: Spline, latents: int, classes: int) -> None:
    widths = [latents + classes, *settings.hidden, latents * (3 * settings.bins - 1)]
    weights = (settings.transforms + 1) * sum(first * second for first, second in zip(widths, widths[1:], strict=False))
    if weights + latents**2 > _MOST_WEIGHTS:
        raise ValueError(f"a spline flow of {weights} weights; at most {_MOST_WEIGHTS} are made")
