"""What would make a spectrum ordinary: follow the gradient of log p(z) from its latents to higher probability.

The spectra decoded along the way show which features grow and which fade. Where the way is steep they are what makes
the outlier one; where it is shallow, the spectrum lies in the tail of a continuous distribution.

References:
    Böhm, Kim & Juneau (PAE), §4 (derivative-based sensitivity analysis) and §4.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

__all__ = ["Path", "ascend", "growth"]

LogProbability = Callable[[Float[Tensor, "n D"]], Float[Tensor, "n"]]
"""Gives log p of latents in nats, each row by itself, with gradients."""

Decoder = Callable[[Float[Tensor, "n D"]], Float[Tensor, "n pixels"]]
"""Gives the spectra of latents."""

_ROWS: Final = 4096
"""Latents evaluated or decoded at once."""

_SHARE: Final = 0.3
"""Of the gain that a gradient promises; less means that it does not hold as far as the step goes."""

_LEAST: Final = 1e-4
"""Nats; a smaller gain is none."""

_ROUNDS: Final = 50

_GAP: Final = 1e-2
"""Of the squared length of the shortest vector; it is short enough when no gradient disagrees with it by more."""

_CANCELLED: Final = 1e-3

_TINY: Final = 1e-30


@dataclass(frozen=True)
class Path:
    """The ways of n spectra; the first point is where they start, and a finished one stays where it is.

    Arguments:
        latents: of each point.
        log_prob: of each point, in nats; never falls along a way.
        arc: length of the way to each point, in the metric of the ascent.
        taken: steps taken until nothing was gained.
    """

    latents: Float[Tensor, "n points D"]
    log_prob: Float[Tensor, "n points"]
    arc: Float[Tensor, "n points"]
    taken: Int64[Tensor, "n"]

    @property
    def slope(self) -> Float[Tensor, "n"]:
        """Mean gain in nats per length of way; 0 for one that takes no step."""
        gain, length = self.log_prob[:, -1] - self.log_prob[:, 0], self.arc[:, -1]
        return torch.where(length > 0, gain / length, 0.0)

    def evenly(self, points: int) -> Float[Tensor, "n points D"]:
        """Give the latents of so many points from start to end, evenly along each way."""
        targets = self.arc[:, -1:] * torch.linspace(0, 1, points).to(self.arc)
        above = torch.searchsorted(self.arc.contiguous(), targets).clamp_min(1)
        low, high = (self.arc.gather(1, place) for place in (above - 1, above))
        share = torch.where(high > low, (targets - low) / (high - low), 0.0)[..., None]
        place = above[..., None].expand(-1, -1, self.latents.shape[2])
        start, end = self.latents.gather(1, place - 1), self.latents.gather(1, place)
        # Not start + share (end - start), which rounds where the end is meant.
        return torch.where(share < 1, torch.lerp(start, end, share.to(start)), end)

    def decoded(self, decode: Decoder) -> Float[Tensor, "n points pixels"]:
        """Give the spectra along the ways."""
        n, points, D = self.latents.shape
        return _decoded(decode, self.latents.reshape(n * points, D)).view(n, points, -1)


def ascend(
    log_prob: LogProbability,
    latents: Float[Tensor, "n D"],
    *,
    steps: int = 100,
    length: float = 0.25,
    halvings: int = 6,
    covariance: Float[Tensor, "D D"] | None = None,
) -> Path:
    """Follow the gradient of log p from all latents at once.

    Each step goes along Σ∇log p, the direction of steepest ascent where distances are measured in whitened latents
    (with Σ of a Gaussian p, straight to its mean). It is `length` long; where this gains nothing it is halved, and
    doubled again afterwards, so that log p never falls. A spectrum stops when no length gains.

    The densities of flows have creases, at the knots of their splines, across which gradients lead to and fro. Where
    a step gains less than 0.3 of what the gradient promises, the shortest vector in the convex hull of the
    gradients nearby takes its place: it leads along the crease.

    References:
        Böhm, Kim & Juneau (PAE), §4, which states no step rule; Burke, Lewis & Overton 2005, SIAM J. Optim. 15, 751
        (gradient sampling), for the creases.

    Arguments:
        log_prob: gives log p; called with rows of the latents' dtype, on their device.
        latents: where the ways start; one that is not finite stays where it is.
        steps: most steps of a way.
        length: of a step, in whitened latents.
        halvings: most times that a step is halved.
        covariance: Σ of the latents of ordinary spectra, which move only where they vary; none is the identity.
    """
    z = latents.detach().clone()
    root = torch.eye(z.shape[1], dtype=torch.float64) if covariance is None else _root(covariance)
    root = root.to(z)
    value = _values(log_prob, z)
    reach = z.new_full((len(z),), length)
    points, values, gone = [z.clone()], [value.clone()], [torch.zeros_like(reach)]
    active = torch.isfinite(z).all(dim=1)
    for _ in range(steps):
        gone.append(_climb(log_prob, z, value, root, reach, active, halvings))
        active = gone[-1] > 0
        reach = torch.where(active, (2 * gone[-1]).clamp_max(length), reach)
        points.append(z.clone())
        values.append(value.clone())
    lengths = torch.stack(gone, dim=1)
    return Path(torch.stack(points, dim=1), torch.stack(values, dim=1), lengths.cumsum(dim=1), (lengths > 0).sum(dim=1))


def _climb(
    log_prob: LogProbability,
    z: Float[Tensor, "n D"],
    value: Float[Tensor, "n"],
    root: Float[Tensor, "D D"],
    reach: Float[Tensor, "n"],
    active: Bool[Tensor, "n"],
    halvings: int,
) -> Float[Tensor, "n"]:
    """Move z and its value one step, each row by its longest length that gains; give these, 0 where none does."""
    gone, reach = torch.zeros_like(reach), reach.clone()
    pending = active.nonzero()[:, 0]
    own = torch.zeros_like(z)
    own[pending] = _gradients(log_prob, z[pending, None], root)[:, 0]
    for attempt in range(2 * (halvings + 1)):
        if not len(pending):
            break
        along_crease = attempt % 2 == 1
        white = _shortest(log_prob, z[pending], reach[pending], root) if along_crease else own[pending]
        steepness = torch.linalg.vector_norm(white, dim=1)
        if along_crease:
            # Gradients that cancel each other surround a summit: only shorter steps lead there.
            summit = steepness <= _CANCELLED * torch.linalg.vector_norm(own[pending], dim=1)
            steepness = torch.where(summit, torch.nan, steepness)
        target = z[pending] + reach[pending, None] * ((white / steepness[:, None]) @ root.T)
        trial = _values(log_prob, target)
        wanted = (0.0 if along_crease else _SHARE) * steepness * reach[pending]
        gains = (trial - value[pending] > wanted.clamp_min(_LEAST)) & torch.isfinite(target).all(dim=1)
        won, pending = pending[gains], pending[~gains]
        z[won], value[won], gone[won] = target[gains], trial[gains], reach[won]
        if along_crease:
            reach[pending] *= 0.5
    return gone


def _shortest(
    log_prob: LogProbability, z: Float[Tensor, "n D"], reach: Float[Tensor, "n"], root: Float[Tensor, "D D"]
) -> Float[Tensor, "n D"]:
    """Give the shortest vector in the convex hull of the gradients at z and a step's length away along each axis.

    By the algorithm of Mitchell, Dem'yanov & Malozemov (1974): weight moves from the gradient that agrees most with
    the mean to the one that disagrees most, as far as that shortens the mean.
    """
    around = torch.cat([torch.zeros_like(root[:1]), root.T, -root.T])
    gradients = _gradients(log_prob, z[:, None] + reach[:, None, None] * around, root)
    rows = torch.arange(len(z), device=z.device)
    weights = torch.zeros_like(gradients[:, :, 0])
    weights[:, 0] = 1.0
    shortest = gradients[:, 0]
    for _ in range(_ROUNDS):
        agreement = torch.linalg.vecdot(gradients, shortest[:, None])
        least = agreement.argmin(dim=1)
        most = torch.where(weights > 0, agreement, -torch.inf).argmax(dim=1)
        change = gradients[rows, least] - gradients[rows, most]
        gap = -torch.linalg.vecdot(change, shortest)
        unfinished = gap > _GAP * shortest.square().sum(dim=1)
        if not unfinished.any():
            break
        share = (gap / change.square().sum(dim=1).clamp_min(_TINY)).minimum(weights[rows, most]) * unfinished
        weights[rows, most] -= share
        weights[rows, least] += share
        shortest = shortest + share[:, None] * change
    return shortest


def _gradients(
    log_prob: LogProbability, points: Float[Tensor, "n m D"], root: Float[Tensor, "D D"]
) -> Float[Tensor, "n m D"]:
    """Give the gradients of log p with respect to whitened latents; 0 where there is none."""
    flat = points.flatten(0, 1)
    parts = [flat[:0]]
    for start in range(0, len(flat), _ROWS):
        part = flat[start : start + _ROWS].clone().requires_grad_()
        with torch.enable_grad():
            total = log_prob(part).sum()
            (gradient,) = torch.autograd.grad(total, part)
        parts.append(torch.where(torch.isfinite(gradient).all(dim=1, keepdim=True), gradient, 0.0) @ root)
    return torch.cat(parts).view(points.shape)


@torch.no_grad()
def _values(log_prob: LogProbability, z: Float[Tensor, "n D"]) -> Float[Tensor, "n"]:
    return torch.cat([log_prob(z[start : start + _ROWS]) for start in range(0, max(1, len(z)), _ROWS)])


def growth(path: Path, decode: Decoder, *, by_step: bool = False) -> Float[Tensor, "n *steps pixels"]:
    """Give what grows (positive) and fades (negative) on the way to higher probability.

    Arguments:
        path: from `ascend`.
        decode: gives the spectra of latents; no gradient is asked for.
        by_step: give the change in each step, `[n steps pixels]`, and not from start to end.
    """
    if by_step:
        return path.decoded(decode).diff(dim=1)
    return _decoded(decode, path.latents[:, -1]) - _decoded(decode, path.latents[:, 0])


@torch.no_grad()
def _decoded(decode: Decoder, latents: Float[Tensor, "n D"]) -> Float[Tensor, "n pixels"]:
    starts = range(0, max(1, len(latents)), _ROWS)
    return torch.cat([decode(latents[start : start + _ROWS]) for start in starts])


def _root(covariance: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    variances, axes = torch.linalg.eigh(covariance.double())
    root: Tensor = axes * variances.clamp_min(0.0).sqrt()
    return root
