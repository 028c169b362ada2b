"""A batch of spectra on one grid, and its catalogue columns. Plain numpy: nothing here reads files."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64, Shaped

from distspec.spectra.grid import WaveGrid

__all__ = ["Columns", "Spectra"]

Columns = dict[str, Shaped[np.ndarray, "n ..."]]
"""Catalogue columns by name, all with the same leading axis as the spectra that they describe."""


@dataclass(frozen=True)
class Spectra:
    """A batch of spectra on one grid. `ivar = 0` is the only mask; such a pixel must change no result.

    Arguments:
        rows: position in the store, the identity of a spectrum inside a run.
        flux: flux density on the grid, 1e-17 erg s⁻¹ cm⁻² Å⁻¹ or the recipe's normalised unit.
        ivar: inverse variance of flux, 0 where the pixel is masked.
        grid: vacuum wavelengths of the pixels.
        redshift: of the lines on this grid: z on an observed-frame grid (NaN where unknown), None in the rest frame.

    Raises:
        ValueError: the shapes do not agree.
    """

    rows: Int64[np.ndarray, "n"]
    flux: Float32[np.ndarray, "n pixels"]
    ivar: Float32[np.ndarray, "n pixels"]
    grid: WaveGrid = field(repr=False)
    redshift: Float64[np.ndarray, "n"] | None = None

    def __post_init__(self) -> None:
        expected = (len(self.rows), self.grid.pixels)
        if self.flux.shape != expected or self.ivar.shape != expected:
            raise ValueError(f"flux {self.flux.shape} and ivar {self.ivar.shape}; expected {expected} for this grid")

    @property
    def good(self) -> Shaped[np.ndarray, "n pixels"]:
        """True where a pixel counts."""
        return self.ivar > 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> "Spectra":
        """Select spectra by a slice, an index array or a boolean mask over the leading axis."""
        redshift = None if self.redshift is None else self.redshift[index]
        return Spectra(self.rows[index], self.flux[index], self.ivar[index], self.grid, redshift)

    def __repr__(self) -> str:
        return f"Spectra({len(self)} on {self.grid})"
