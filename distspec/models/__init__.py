"""Networks: what an ordinary spectrum looks like in few numbers, and how dense these numbers lie.

A network knows a grid and its own settings. Only `training/` knows that there are stores and workers.

- `autoencoders/`: spectrum -> latents -> spectrum.
- `flows/`: the density of latents.
- `training/`: fits, by one worker or many.
- `transfer`: tensors to the device that computes, to a GPU beside its computation.
- `checkpoint`: a trained model on disk: safetensors and JSON, nothing that can run code.
"""

from typing import TYPE_CHECKING

from distspec.config import Architecture, Convolutional, Dense, Redshifted, Variational
from distspec.spectra import WaveGrid

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build"]


def build(settings: Architecture, grid: WaveGrid, *, two_stage: bool = False) -> "nn.Module":
    """Make an autoencoder with random weights; with two stages, one behind the other.

    Raises:
        ConfigError: the settings do not fit the grid.
    """
    # Imported here: torch takes seconds, and few who ask for a name of this room train a network.
    if two_stage:
        from distspec.models.autoencoders.dense import TwoStage

        return TwoStage(build(settings, grid), build(settings, grid))
    match settings:
        case Dense():
            from distspec.models.autoencoders.dense import DenseAutoencoder

            return DenseAutoencoder(settings, grid)
        case Convolutional():
            from distspec.models.autoencoders.convolutional import ConvolutionalAutoencoder

            return ConvolutionalAutoencoder(settings, grid)
        case Variational():
            from distspec.models.autoencoders.variational import VariationalAutoencoder

            return VariationalAutoencoder(settings, grid)
        case Redshifted():
            from distspec.models.autoencoders.redshifted import RedshiftedAutoencoder

            return RedshiftedAutoencoder(settings, grid)
