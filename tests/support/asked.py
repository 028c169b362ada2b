"""Scores made of plain functions, for tests of explainers: every version is written out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distspec.config import Score
from distspec.detectors.explainable import Explainable
from distspec.detectors.neural.scores import ModelScores
from distspec.models.checkpoint import Checkpoint
from distspec.spectra import Spectra
from distspec.spectra.perturbed import PerturbedSpectra


class Asked:
    """k scores as functions of a batch of spectra; `torch_of` gives those that can be differentiated."""

    def __init__(
        self,
        *functions: Callable[[Spectra], Any],
        torch_of: Callable[[Tensor], Tensor] | None = None,
        reconstruct: Callable[[Spectra], Any] | None = None,
    ) -> None:
        self.names = tuple(f"score{number}" for number in range(len(functions)))
        self._functions, self._torch, self._reconstruct = functions, torch_of, reconstruct
        self.calls = 0

    def __call__(self, spectra: Spectra) -> Any:
        self.calls += 1
        return np.stack([function(spectra) for function in self._functions], axis=1).astype(np.float32)

    def versions(self, mixture: PerturbedSpectra) -> Callable[[int, int], Any]:
        def score(start: int, stop: int) -> Any:
            return np.stack([self(mixture.spectra(which, start, stop)) for which in range(len(mixture.base))])

        return score

    def reconstruct(self, spectra: Spectra) -> Any:
        assert self._reconstruct is not None
        return self._reconstruct(spectra)

    def ordinary(self, others: Spectra, spectrum: Spectra) -> Any:
        """Give the others as they are."""
        return others.flux

    def gradient_of(self, name: str, spectra: Spectra) -> tuple[Any, tuple[Any, ...], Any]:
        assert self._torch is not None
        return self._torch, (), torch.from_numpy(spectra.flux)


def linear(weights: np.ndarray) -> Asked:
    """The score w · x over good pixels."""
    slopes = torch.from_numpy(weights).float()
    return Asked(
        lambda spectra: np.where(spectra.good, spectra.flux, 0).astype(np.float64) @ weights,
        torch_of=lambda flux: flux @ slopes,
    )


def of_model(checkpoint: Checkpoint, *names: str, device: str = "cpu", exact: bool = True) -> Explainable:
    """Scores of a model."""
    return Explainable(names, ModelScores(checkpoint, Score(), device), exact=exact)


def all_good(spectra: Spectra) -> Spectra:
    """The same without masked pixels."""
    flux = np.where(spectra.good, spectra.flux, np.float32(1))
    return Spectra(spectra.rows, flux, np.full_like(flux, 400), spectra.grid)
