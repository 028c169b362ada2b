"""The vocabulary: a wavelength grid, a batch of spectra on it, and why a spectrum may be set aside.

Plain numpy; nothing here reads files, knows a survey or a model.
"""

from dataclasses import dataclass, field
from enum import IntFlag
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Float64, Int64, Shaped

__all__ = ["LIGHT_SPEED", "Columns", "Spectra", "Status", "WaveGrid", "first_reasons"]

LIGHT_SPEED = 299792.458
"""Speed of light, km/s."""

Columns = dict[str, Shaped[np.ndarray, "n ..."]]
"""Catalogue columns by name, all with the same leading axis as the spectra that they describe."""


class Status(IntFlag):
    """Why a spectrum is set aside: one bit a reason, 0 for a spectrum that is used."""

    OK = 0
    UNREADABLE = 1
    DEAD = 2
    NO_REDSHIFT = 4
    REDSHIFT_WARNING = 8
    REDSHIFT_RANGE = 16
    LOW_COVERAGE = 32
    LOW_SNR = 64
    NO_SCALE = 128
    NO_EXTINCTION = 256
    FIBER = 512
    NOT_A_TARGET = 1024
    CLASS = 2048
    SPAN = 4096
    DUPLICATE = 8192
    UNUSABLE = UNREADABLE | DEAD | NO_REDSHIFT | NO_SCALE | NO_EXTINCTION
    """Not one reason but any of those that leave a spectrum without pixels on the store's grid."""

    @property
    def reasons(self) -> list[str]:
        """One sentence for each bit that is set."""
        return [_REASONS[bit] for bit in Status if bit in self]


_REASONS = {
    Status.UNREADABLE: "the file could not be read",
    Status.DEAD: "no pixel has a positive, finite inverse variance",
    Status.NO_REDSHIFT: "no finite redshift is known",
    Status.REDSHIFT_WARNING: "the redshift pipeline raised a warning",
    Status.REDSHIFT_RANGE: "the redshift is outside the recipe's range",
    Status.LOW_COVERAGE: "too few good pixels on the recipe's wavelength grid",
    Status.LOW_SNR: "the signal-to-noise ratio is below the recipe's limit",
    Status.NO_SCALE: "the flux that the normalisation divides by is not positive",
    Status.NO_EXTINCTION: "no Galactic E(B-V) is known for this position",
    Status.FIBER: "the survey flagged the fibre as bad",
    Status.NOT_A_TARGET: "a sky or calibration fibre, not a science target",
    Status.CLASS: "the survey's pipeline gives a class that the recipe does not take",
    Status.SPAN: "the good pixels do not reach from end to end of the recipe's wavelength grid",
    Status.DUPLICATE: "an earlier row holds the same spectrum",
}


def first_reasons(status: Shaped[np.ndarray, "n"]) -> dict[str, int]:
    """Count the spectra set aside by the first reason that applied; the counts add up to their number."""
    lowest = status & -status
    bits, counts = np.unique(lowest[lowest != 0], return_counts=True)
    return {str(Status(int(bit)).name): int(count) for bit, count in zip(bits, counts, strict=True)}


@dataclass(frozen=True)
class WaveGrid:
    """Uniform grid of wavelengths in vacuum, linear in Å or in log10(Å). Hashable, compares by value.

    Arguments:
        scale: "linear" or "log".
        first: wavelength of the first pixel's centre, Å vacuum.
        step: pixel width in Å (linear) or in log10(Å) (log).
        pixels: number of pixels.

    Raises:
        ValueError: a value is not positive or the scale is unknown.

    Example:
        >>> WaveGrid.between("log", 3388.0, 8318.0, 1000)
        WaveGrid(log, 3388.0-8318.0 Å, 1000 pixels)
    """

    scale: Literal["linear", "log"]
    first: float
    step: float
    pixels: int

    def __post_init__(self) -> None:
        if self.scale not in ("linear", "log"):
            raise ValueError(f"grid scale {self.scale!r}; expected 'linear' or 'log'")
        if not (self.first > 0 and self.step > 0 and self.pixels > 0):
            raise ValueError(f"first, step and pixels must be positive, got {self.first}, {self.step}, {self.pixels}")

    @classmethod
    def between(cls, scale: Literal["linear", "log"], first: float, last: float, pixels: int) -> "WaveGrid":
        """Make the grid whose first and last pixel centres are `first` and `last` (Å vacuum)."""
        if pixels < 2 or last <= first:
            raise ValueError(f"a grid needs last > first and two pixels, got {first}-{last} Å in {pixels}")
        span = np.log10(last / first) if scale == "log" else last - first
        return cls(scale, float(first), float(span / (pixels - 1)), pixels)

    @cached_property
    def wave(self) -> Float64[np.ndarray, "pixels"]:
        """Pixel centres, Å vacuum."""
        return self._at(np.arange(self.pixels, dtype=np.float64))

    @cached_property
    def edges(self) -> Float64[np.ndarray, "pixels+1"]:
        """Pixel edges, Å vacuum: half a step to either side of the centres, in the grid's own scale."""
        return self._at(np.arange(self.pixels + 1, dtype=np.float64) - 0.5)

    def _at(self, position: Float64[np.ndarray, "m"]) -> Float64[np.ndarray, "m"]:
        if self.scale == "log":
            # Not first * 10**(step * i): a survey's own grid is a decimal in log10, and this keeps it exact.
            return np.asarray(10.0 ** (np.log10(self.first) + self.step * position))
        return np.asarray(self.first + self.step * position)

    def position(self, wave: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
        """Fractional pixel number of each wavelength (Å); 0 is the first pixel's centre. No search is needed."""
        if self.scale == "log":
            return np.asarray((np.log10(wave) - np.log10(self.first)) / self.step)
        return np.asarray((wave - self.first) / self.step)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `WaveGrid(**d)` turns back into an equal grid."""
        return {"scale": self.scale, "first": self.first, "step": self.step, "pixels": self.pixels}

    def __repr__(self) -> str:
        return f"WaveGrid({self.scale}, {self.wave[0]:.1f}-{self.wave[-1]:.1f} Å, {self.pixels} pixels)"


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
