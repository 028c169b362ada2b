"""What workers of `distspec explain` do: explain spectra by a method, follow them to higher probability, fit lines.

Each takes a few of the selected rows at a time, and writes them as one shard of its layer.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Final

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from distspec import explainers
from distspec.config import AnyMethod, Experiment
from distspec.detectors import ClassicalDetector
from distspec.detectors.explainable import Explainable
from distspec.detectors.neural.scores import ModelScores
from distspec.errors import CheckpointError, DistspecError
from distspec.explainers import Explainer, Explanation
from distspec.explainers.ascent import ascend, growth
from distspec.explainers.baselines import Baselines
from distspec.models.checkpoint import Checkpoint
from distspec.results.layout import detector_folder
from distspec.spectra import Spectra
from distspec.stages.explain.selection import SelectedRows
from distspec.store import SpectraStore

__all__ = ["AscentWorker", "ExplainWorker", "LineWorker", "explainable"]

_CHANCE: Final = 4
"""So few spectra of a unit may all fail by themselves."""


class ExplainWorker:
    """Explains a few spectra at a time, by the method of the layer that is asked for; lives in a worker."""

    def __init__(
        self, store: str, folder: str, methods: Mapping[str, AnyMethod], ordinary: Baselines, experiment: Experiment
    ) -> None:
        self._store = SpectraStore.open(store, write=True)
        self._scores = explainable(experiment, self._store, folder)
        self._methods, self._ordinary = methods, ordinary
        rest = self._store.frame == "rest"
        self._explainers = {
            layer: explainers.build(method, self._store.grid, experiment.seed, rest=rest)
            for layer, method in methods.items()
        }

    def __call__(self, item: tuple[str, int, SelectedRows]) -> int:
        layer, shard, chosen = item
        explainer = self._explainers[layer]
        spectra = self._store.take(chosen.rows)
        near = self._ordinary.near(self._store, chosen.rows, self._methods[layer])
        reasons = [""] * len(spectra)
        try:
            parts = [explainer.explain(self._scores, spectra, near)]
        except DistspecError:
            raise
        except Exception:
            # One spectrum must not take the others with it: each is tried by itself, and failures are recorded.
            parts = []
            for index in range(len(spectra)):
                part, reasons[index] = self._alone(explainer, spectra[[index]], near[index : index + 1])
                parts.append(part)
            if len(spectra) > _CHANCE and all(reasons):
                # What fails on every one of so many is no fault of theirs.
                raise
        weights = np.concatenate([part.weights for part in parts])
        fields = {key: np.concatenate([part.more[key] for part in parts]) for key in parts[0].more}
        lost = ~np.isfinite(weights).all(axis=(1, 2))
        for values in (weights, *(array for array in fields.values() if array.dtype.kind == "f")):
            values[lost] = np.nan
        told = {"row": chosen.rows, "rank": chosen.rank, "weights": weights}
        told["reason"] = np.array(
            [reason or ("a weight is not finite" if bad else "") for reason, bad in zip(reasons, lost, strict=True)]
        )
        self._store.layer(layer).write(shard, told | fields)
        return shard

    def _alone(self, explainer: Explainer, spectrum: Spectra, near: list[Spectra]) -> tuple[Explanation, str]:
        """Explain one spectrum; where that fails, give nothing in the same shape, and why."""
        try:
            return explainer.explain(self._scores, spectrum, near), ""
        except DistspecError:
            raise
        except Exception as error:
            fields = explainer.fields(len(self._scores.names))
            kept = {
                key: np.full((1, *shape), np.nan if dtype == "f4" else 0, dtype)
                for key, (dtype, shape) in fields.items()
            }
            nothing = Explanation(spectrum.rows, kept.pop("weights"), explainer.segment_of, kept)
            return nothing, f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def explainable(experiment: Experiment, store: SpectraStore, folder: str) -> Explainable:
    """Load what makes the scores that are explained.

    Raises:
        CheckpointError: a model or a detector is damaged.
    """
    names = experiment.explain.scores
    device = "cuda" if experiment.runtime.gpus_per_worker else "cpu"
    model = ModelScores(Checkpoint.load(folder), experiment.score, device)
    detectors: dict[str, ClassicalDetector] = {}
    for one in experiment.detect.detectors:
        # A detector may give a second score, named after the first.
        own = {one.name, f"{one.name}_mixture"} & set(names)
        if own:
            # Imported here: scikit-learn takes a second, in every worker, and scores of a model do without.
            from distspec.detectors.classical.saved import load_detector

            detectors |= dict.fromkeys(own, load_detector(detector_folder(experiment, one, store.digest))[0])
    return Explainable(names, model, detectors)


class AscentWorker:
    """Follows a few spectra at a time; lives in a worker."""

    def __init__(
        self,
        store: str,
        folder: str,
        scores: str,
        layer: str,
        covariance: Float64[np.ndarray, "D D"],
        experiment: Experiment,
    ) -> None:
        self._store = SpectraStore.open(store, write=True)
        self._layer, self._scored = self._store.layer(layer), self._store.layer(scores)
        checkpoint = Checkpoint.load(folder)
        if checkpoint.density is None or experiment.explain.ascent is None:
            raise CheckpointError(f"{folder} has no density, up which a way could lead; train with train.density")
        self._device = "cuda" if experiment.runtime.gpus_per_worker else "cpu"
        self._model = ModelScores(checkpoint, experiment.score, self._device)
        self._density = checkpoint.density
        self._settings = experiment.explain.ascent
        self._covariance = torch.from_numpy(covariance)

    def __call__(self, item: tuple[str, int, SelectedRows]) -> int:
        shard, rows = item[1], item[2].rows
        # Those that were scored; in float64, so that no gain is lost in rounding.
        start = torch.from_numpy(self._scored.take("latents", rows)).double().to(self._device)
        settings = self._settings
        path = ascend(
            self._density.log_prob, start, steps=settings.steps, length=settings.length, covariance=self._covariance
        )
        decode = self._model.decoder(self._store.take(rows))
        ends = path.latents[:, [0, -1]]
        fields = {
            "log_prob": path.log_prob,
            "arc": path.arc,
            "latents": path.latents,
            "spectra": torch.stack([decode(place) for place in path.evenly(settings.points).unbind(1)], dim=1),
            "growth": growth(path, decode),
        }
        told = {name: _array(values) for name, values in fields.items()}
        told |= {"row": rows, "taken": path.taken.cpu().numpy()}
        if "class" in self._layer.fields:
            best = self._density.posterior(ends.flatten(0, 1)).max(dim=1)
            told |= {"class": best.indices.view(-1, 2).cpu().numpy()}
            told |= {"class_probability": _array(best.values.view(-1, 2))}
        self._layer.write(shard, told)
        return shard


def _array(values: Tensor) -> np.ndarray:
    return np.asarray(values.float().cpu().numpy())


class LineWorker:
    """Measures lines and indices of some spectra at a time."""

    def __init__(self, store: str, layer: str) -> None:
        self._store = SpectraStore.open(store, write=True)
        self._layer = self._store.layer(layer)

    def __call__(self, item: tuple[str, int, SelectedRows]) -> int:
        # Imported here: only this worker needs scipy.
        from distspec.spectra.lines.fits import measure
        from distspec.spectra.lines.tables import indices

        shard, rows = item[1], item[2].rows
        # As they were observed: what statistics of the sample filled in is no measurement. What the preparation patched
        # spectrum by spectrum, such as sky lines, is part of the store and counts as data here.
        spectra = self._store.take(rows, frozen=False)
        told = {
            one.name: getattr(table, one.name).astype(np.float32)
            for table in (measure(spectra), indices(spectra))
            for one in fields(table)
        }
        self._layer.write(shard, {"row": rows, **told})
        return shard
