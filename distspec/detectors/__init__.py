"""Detectors: one number per spectrum, higher = odder. Thresholds and top lists are functions of scores.

Neural detectors are made from a checkpoint. Classical ones are fitted: first on a sample, in parts that may be made
side by side, then by looks over the whole survey whose summaries add up.

- `neural/`: scores of a trained model.
- `classical/`: detectors that are fitted without a network.
- `explainable`: scores of both kinds as explainers ask about them.
"""

from collections.abc import Sequence
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from jaxtyping import Float32, Shaped

from distspec.config import AnyDetector
from distspec.spectra import Spectra, WaveGrid

__all__ = ["Arrays", "ClassicalDetector", "Detector", "Fields"]

Arrays = dict[str, Shaped[np.ndarray, "..."]]
"""A fitted detector, or a part of one, as named arrays of numbers: all that is ever written to disk or sent."""

Fields = dict[str, tuple[str, tuple[int, ...]]]
"""dtype and shape of what is kept for each spectrum."""


@runtime_checkable
class Detector(Protocol):
    """What every detector can do."""

    def score(self, spectra: Spectra) -> Float32[np.ndarray, "n"]:
        """Score spectra; higher = odder. A pixel with ivar = 0 has no influence."""
        ...


class ClassicalDetector(Detector, Protocol):
    """A detector that is fitted: grown on a sample, then taught by looks over the survey.

    Parts of the sample's fit depend on the settings, the sample, the seed and their own number only, and summaries add
    up, so that the result depends neither on the number of workers nor on how the survey was cut.
    """

    settings: AnyDetector
    grid: WaveGrid

    @classmethod
    def parts(cls, settings: Any) -> int:
        """Give the number of pieces in which the fit on the sample can be made side by side."""
        ...

    @classmethod
    def grow(cls, settings: Any, sample: Spectra, seed: int, part: int) -> Arrays:
        """Fit one piece on the sample."""
        ...

    @classmethod
    def assemble(cls, settings: Any, grid: WaveGrid, parts: Sequence[Arrays]) -> Self:
        """Join the pieces, in their order, to a detector that may still ask for looks."""
        ...

    @property
    def looking(self) -> bool:
        """Whether another look over the survey is needed before it can score."""
        ...

    def look(self, spectra: Spectra) -> Any:
        """Summarize some spectra of the survey; summaries are added with `+`, and kept by their `to_arrays`."""
        ...

    def summary(self, arrays: Arrays) -> Any:
        """Give the summary whose `to_arrays` these are."""
        ...

    def learn(self, summary: Any) -> Self:
        """Give the detector that has taken in a whole look."""
        ...

    @property
    def fields(self) -> Fields:
        """What is kept for each spectrum: first the score, by the detector's name, then what led to it."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader of the fields must know: regions, numbers of components. Plain values for JSON."""
        ...

    def details(self, spectra: Spectra) -> Arrays:
        """Give all `fields` of some spectra."""
        ...

    def to_arrays(self) -> Arrays:
        """Give the fitted detector as arrays of numbers."""
        ...

    @classmethod
    def from_arrays(cls, settings: Any, grid: WaveGrid, arrays: Arrays) -> Self:
        """Make the detector of `to_arrays` again.

        Raises:
            ValueError: the arrays are not those of such a detector; nothing that they claim is followed unchecked.
        """
        ...
