"""The wavelengths of pixels: a grid in vacuum Å, uniform in λ or in log λ, and its edges."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

__all__ = ["LIGHT_SPEED", "WaveGrid"]

LIGHT_SPEED = 299792.458
"""Speed of light, km/s."""


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
