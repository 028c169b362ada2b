"""Settings -> networks: the one place that knows which class each kind of model is."""

from torch import nn

from distspec.config import Architecture, Convolutional, Dense, Redshifted, Sliced, Spline, Variational
from distspec.models.autoencoder import DenseAutoencoder, TwoStage
from distspec.models.convolutional import ConvolutionalAutoencoder
from distspec.models.density import LatentDensity
from distspec.models.redshifted import RedshiftedAutoencoder
from distspec.models.sliced import SlicedFlow
from distspec.models.spline_flow import SplineFlow
from distspec.models.variational import VariationalAutoencoder
from distspec.spectra import WaveGrid

__all__ = ["build_autoencoder", "build_density"]


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
