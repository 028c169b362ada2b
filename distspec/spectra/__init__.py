"""The vocabulary: spectra, their grid, their status, their lines. It imports no other room.

- `batch`: `Spectra`, a frozen batch of flux and ivar; ivar = 0 is the only mask.
- `grid`: `WaveGrid`, vacuum wavelengths, uniform in λ or in log λ.
- `status`: why a spectrum is set aside, as bits and in words.
- `segments`: runs of pixels.
- `perturbed`: a spectrum with something else in the place of some of its segments.
- `lines/`: spectral lines: where they are, how they are measured, what they tell.
"""

from distspec.spectra.batch import Columns, Spectra
from distspec.spectra.grid import LIGHT_SPEED, WaveGrid
from distspec.spectra.status import Status, first_reasons

__all__ = ["LIGHT_SPEED", "Columns", "Spectra", "Status", "WaveGrid", "first_reasons"]
