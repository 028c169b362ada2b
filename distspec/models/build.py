"""Settings -> networks: the one place that knows which class each kind of model is."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distspec.config import Architecture, Convolutional, Dense, Redshifted, Sliced, Spline, Variational
from distspec.models.autoencoders.convolutional import ConvolutionalAutoencoder
from distspec.models.autoencoders.dense import DenseAutoencoder, TwoStage
from distspec.models.autoencoders.redshifted import RedshiftedAutoencoder
from distspec.models.autoencoders.variational import VariationalAutoencoder
from distspec.models.flows.density import LatentDensity
from distspec.models.flows.sliced_flow import SlicedFlow
from distspec.models.flows.spline_flow import SplineFlow
from distspec.spectra import WaveGrid

__all__ = ["build_autoencoder", "build_density", "within_reach"]


def build_autoencoder(settings: Architecture, grid: WaveGrid, *, two_stage: bool = False) -> nn.Module:
    """Make an autoencoder with random weights; with two stages, one behind the other.

    Raises:
        ConfigError: the settings do not fit the grid.
    """
    if two_stage:
        return TwoStage(build_autoencoder(settings, grid), build_autoencoder(settings, grid))
    match settings:
        case Dense():
            return DenseAutoencoder(settings, grid)
        case Convolutional():
            return ConvolutionalAutoencoder(settings, grid)
        case Variational():
            return VariationalAutoencoder(settings, grid)
        case Redshifted():
            return RedshiftedAutoencoder(settings, grid)


def build_density(settings: Sliced | Spline, shape: dict[str, int], names: tuple[str, ...]) -> LatentDensity:
    """Make a density of latents that a checkpoint's weights fit into.

    Arguments:
        settings: of the flow.
        shape: `Flow.shape` of the fitted flow.
        names: of its classes.
    """
    flow = SlicedFlow(**shape) if isinstance(settings, Sliced) else SplineFlow(settings, **shape)
    return LatentDensity(flow, names)


def within_reach(
    model: nn.Module, ivar: Float[Tensor, "n pixels"], redshift: Float[Tensor, "n"] | None
) -> Float[Tensor, "n pixels"]:
    """Mask the pixels that a model says nothing of: those beyond the ends of a rest-frame model at the redshift."""
    last = model.second if isinstance(model, TwoStage) else model
    if isinstance(last, RedshiftedAutoencoder) and redshift is not None:
        return torch.where(last.covers(redshift), ivar, 0.0)
    return ivar
