"""Groups of latents, found where no labels are given: the Gaussians of a mixture.

A sliced flow bends space a little in every layer. Separate groups it pulls together slowly and badly: on data of six
correlated groups in ten dimensions it stays two nats behind a neural spline flow, and with maps for each group it comes
level.
"""

import warnings
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from distspec.models.flows.sliced import hash_keys
from distspec.models.training.group import ALONE, Group

__all__ = ["find_components"]

_SAMPLE: Final = 40_000
"""Latents that the mixture is fitted to, at most."""

_JUDGES: Final = 4
"""One in so many of them does not fit, but judges how many components there are."""

_TRIED: Final = (1, 2, 3, 4, 6, 8)

_FEWEST: Final = 12
"""Latents to each dimension of a component, at least; fewer would fit noise."""


def find_components(
    training: Float[Tensor, "n D"],
    held: Float[Tensor, "m D"],
    keys: Int64[Tensor, "n"],
    wanted: int | None,
    seed: int,
    group: Group = ALONE,
) -> tuple[Int64[Tensor, "n"], Int64[Tensor, "m"], int]:
    """Part latents into the components of a Gaussian mixture.

    Arguments:
        training: this worker's latents; the mixture is fitted to a sample of all workers'.
        held: this worker's validation latents.
        keys: number of each training spectrum in the survey, unique over all workers: the sample goes by it, so that it
            does not depend on how rows are spread.
        wanted: number of components; None takes the least of 1, 2, 3, 4, 6, 8 under which other latents are as likely
            as under any, but for one standard error.
        seed: of the fit.
        group: gathers over workers.

    Returns:
        Component of each row of either, and the number of components, of which none is empty. Rows that are not finite
        have one, too.
    """
    undivided = torch.zeros_like(training[:, 0], dtype=torch.int64), torch.zeros_like(held[:, 0], dtype=torch.int64), 1
    sample = _sample(training, keys, seed, group)
    if not len(sample):
        return undivided
    middle, width = sample.mean(dim=0), sample.std(dim=0, correction=0)
    width = torch.where(width > 0, width, 1.0)
    scaled = ((sample - middle) / width).cpu().numpy()
    count = _number(scaled, seed) if wanted is None else min(wanted, len(np.unique(scaled, axis=0)))
    count = int(group.broadcast(torch.tensor([count], device=training.device)))
    if count <= 1:
        return undivided
    best = _mixture(scaled, count, seed)
    # Rounding differs between machines; all must cut alike.
    tensors = (best.weights_, best.means_, best.precisions_cholesky_)
    weights, means, precisions = (group.broadcast(torch.from_numpy(t).to(sample)) for t in tensors)
    labels = [_assign((part - middle) / width, weights, means, precisions) for part in (training, held)]
    counts = group.sum(torch.bincount(labels[0], minlength=count))
    # A component that is undivided's is dropped, and the others are numbered anew.
    number = (torch.cumsum(counts > 0, 0) - 1).clamp_min(0)
    return number[labels[0]], number[labels[1]], int((counts > 0).sum())


def _sample(latents: Tensor, keys: Tensor, seed: int, group: Group) -> Float64[Tensor, "s D"]:
    """Draw rows of all workers by a hash of their keys, in the order of the hash."""
    finite = latents.isfinite().all(dim=1)
    latents, ticket = latents[finite].double(), hash_keys(keys[finite], seed)
    rows = int(group.sum(torch.tensor([len(latents)], device=latents.device)))
    chosen = ticket <= int(min(_SAMPLE / max(rows, 1), 1.0) * (2**62 - 1))
    order = group.gather(ticket[chosen]).argsort(stable=True)
    drawn: Tensor = group.gather(latents[chosen])[order]
    return drawn


def _number(scaled: Float64[np.ndarray, "s D"], seed: int) -> int:
    """Find how many components rows need that did not fit them."""
    judges = np.arange(len(scaled)) % _JUDGES == _JUDGES - 1
    fitted, judged = scaled[~judges], scaled[judges]
    most = min(len(fitted) // (_FEWEST * scaled.shape[1]), len(np.unique(fitted, axis=0)))
    tried = [count for count in _TRIED if count <= most]
    if len(tried) < 2 or len(judged) < 2:
        return 1
    scores = [_mixture(fitted, count, seed).score_samples(judged) for count in tried]
    best = max(scores, key=np.mean)
    # A count of components that is not told from the best by this many rows is as good, and quicker.
    errors = [np.std(best - score) / np.sqrt(len(judged)) for score in scores]
    near = [np.mean(best - score) <= error for score, error in zip(scores, errors, strict=True)]
    return tried[near.index(True)]


def _mixture(scaled: Float64[np.ndarray, "s D"], count: int, seed: int) -> GaussianMixture:
    with warnings.catch_warnings():
        # Repeated rows, and groups that only many steps tell apart, are no reason to worry the reader.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return GaussianMixture(count, random_state=seed % 2**32, n_init=2, reg_covar=1e-5).fit(scaled)


def _assign(latents: Tensor, weights: Tensor, means: Tensor, precisions: Tensor) -> Int64[Tensor, "n"]:
    """Give each row the component that it most probably belongs to."""
    scores = []
    for weight, mean, factor in zip(weights, means, precisions, strict=True):
        residual = (latents.to(factor) - mean) @ factor
        scores.append(weight.log() + factor.diagonal().log().sum() - 0.5 * residual.square().sum(dim=1))
    return torch.stack(scores, dim=1).argmax(dim=1)
