"""Scores as functions of flux that torch can differentiate, for explainers that follow gradients."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distspec.config import METRICS
from distspec.detectors.neural.scores import DENSITY, ModelScores
from distspec.models.autoencoders.redshifted import within_reach

__all__ = ["differentiable"]


def differentiable(model: ModelScores, name: str) -> Callable[..., Float[Tensor, "n"]]:
    """Give one score of a model as a function of flux, ivar, pixels away from lines, and redshift.

    It equals `ModelScores.some` to rounding. Which residuals a trimmed score leaves out does not count as a change;
    neither does the clipping of flux in the weight of a relative score.
    """

    def score(
        flux: Float[Tensor, "n pixels"],
        ivar: Float[Tensor, "n pixels"],
        away: Bool[Tensor, "n pixels"],
        redshift: Float[Tensor, "n"] | None = None,
    ) -> Float[Tensor, "n"]:
        if name == DENSITY:
            assert model.density is not None
            latents = model.model.encode(flux, ivar, redshift)  # type: ignore[operator]
            return -model.density.log_prob(latents)
        reconstruction, _ = model.model(flux, ivar, redshift)
        judged = within_reach(model.model, ivar, redshift)
        return _residual_score(name, flux, judged, reconstruction, away, model)

    return score


def _residual_score(
    name: str,
    flux: Float[Tensor, "n pixels"],
    ivar: Float[Tensor, "n pixels"],
    reconstruction: Float[Tensor, "n pixels"],
    away: Bool[Tensor, "n pixels"],
    model: ModelScores,
) -> Float[Tensor, "n"]:
    """Write the definition of a score out, without its shortcuts (see `reconstruction_scores`)."""
    good = ivar > 0
    residual = torch.where(good, reconstruction - flux, 0.0).abs()
    if name == "chi2":
        return (residual.square() * ivar).sum(dim=1) / good.sum(dim=1)
    settings, parts = model.settings, name.split("_")
    power = METRICS.get(parts[0], 2.0)
    kept = good & away if "filtered" in parts else good
    if "trimmed" in parts:
        kept = _without_largest(residual.detach(), kept, 0.01 * settings.trim_percentage)
    # The root and small powers have no slope at zero; pixels that are left out must not bring it in.
    terms = torch.where(kept, torch.where(kept, residual, 1.0).clamp_min(1e-30).pow(power), 0.0)
    if "relative" in parts:
        terms = terms / (torch.where(good, flux, 0.0).clamp_min(0.0) + settings.epsilon)
    return terms.sum(dim=1).clamp_min(1e-30).pow(1.0 / power)


def _without_largest(
    residual: Float[Tensor, "n pixels"], considered: Bool[Tensor, "n pixels"], share: float
) -> Bool[Tensor, "n pixels"]:
    """Leave out the largest residuals; of equal ones the first pixels."""
    count = considered.sum(dim=1, keepdim=True)
    dropped = count - (count.double() * share).long()
    order = torch.where(considered, residual, -1.0).sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(residual.shape[1], device=residual.device).expand_as(order)
    return considered & (torch.empty_like(order).scatter_(1, order, places) >= dropped)
