"""What workers of `distspec explain` do: explain spectra by a method, follow them to higher probability, fit lines.

Each takes a few of the selected rows at a time, and writes them as one shard of its layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Final

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from distspec import explainers
from distspec.addresses import Place
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


Unit = tuple[str, int, SelectedRows]
"""Layer, its shard, and the spectra that this consists of."""


class UnitWorker(ABC):
    """Fills a shard of a layer with what is found for a few of the selected spectra; lives in a worker.

    Arguments:
        store: its address.
    """

    def __init__(self, store: str) -> None:
        self._store = SpectraStore.open(store, write=True)

    @abstractmethod
    def find(self, layer: str, chosen: SelectedRows) -> dict[str, np.ndarray]:
        """Give the values of the layer's fields for some spectra, in their order."""

    def __call__(self, item: Unit) -> int:
        return self.without(item, (), "")

    def attempt(self, item: Unit, start: int, stop: int) -> None:
        """Do some of the spectra, by their places in the unit, and keep nothing."""
        layer, _, chosen = item
        self.find(layer, SelectedRows(chosen.rows[start:stop], chosen.rank[start:stop]))

    def without(self, item: Unit, lost: Sequence[int], why: str) -> int:
        """Do a unit without some of its spectra, which get nothing: NaN, 0, or why where reasons are kept."""
        name, shard, chosen = item
        layer, keep = self._store.layer(name), np.ones(len(chosen.rows), bool)
        keep[list(lost)] = False
        told = {"row": chosen.rows, "rank": chosen.rank}
        found = self.find(name, SelectedRows(chosen.rows[keep], chosen.rank[keep])) if keep.any() else {}
        for field, (dtype, shape) in layer.fields.items():
            if field in told:
                continue
            if lost:
                empty = why if dtype == "string" else np.nan if np.dtype(dtype).kind == "f" else 0
                told[field] = np.full((len(keep), *shape), empty, object if dtype == "string" else dtype)
                if keep.any():
                    told[field][keep] = found[field]
            else:
                told[field] = found[field]
        layer.give_up(shard, chosen.rows[~keep].tolist(), why)
        layer.write(shard, {field: told[field] for field in layer.fields})
        return shard


class ExplainWorker(UnitWorker):
    """Explains spectra by the method of the layer that is asked for."""

    def __init__(
        self, store: str, folder: Place, methods: Mapping[str, AnyMethod], ordinary: Baselines, experiment: Experiment
    ) -> None:
        super().__init__(store)
        self._scores = explainable(experiment, self._store, folder)
        self._methods, self._ordinary = methods, ordinary
        rest = self._store.frame == "rest"
        self._explainers = {
            layer: explainers.build(method, self._store.grid, experiment.seed, rest=rest)
            for layer, method in methods.items()
        }

    def find(self, layer: str, chosen: SelectedRows) -> dict[str, np.ndarray]:
        """Give weights, the reason where there are none, and what else the method tells."""
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
        why = [reason or ("a weight is not finite" if bad else "") for reason, bad in zip(reasons, lost, strict=True)]
        return {"weights": weights, "reason": np.array(why)} | fields

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


def explainable(experiment: Experiment, store: SpectraStore, folder: Place) -> Explainable:
    """Load what makes the scores that are explained.

    Raises:
        CheckpointError: a model or a detector is damaged.
    """
    names = experiment.explain.scores
    device = experiment.runtime.needs("explain").device
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


class AscentWorker(UnitWorker):
    """Follows spectra to higher probability."""

    def __init__(
        self,
        store: str,
        folder: Place,
        scores: str,
        layer: str,
        covariance: Float64[np.ndarray, "D D"],
        experiment: Experiment,
    ) -> None:
        super().__init__(store)
        self._layer, self._scored = self._store.layer(layer), self._store.layer(scores)
        checkpoint = Checkpoint.load(folder)
        if checkpoint.density is None or experiment.explain.ascent is None:
            raise CheckpointError(f"{folder} has no density, up which a way could lead; train with train.density")
        self._device = experiment.runtime.needs("explain").device
        self._model = ModelScores(checkpoint, experiment.score, self._device)
        self._density = checkpoint.density
        self._settings = experiment.explain.ascent
        self._covariance = torch.from_numpy(covariance)

    def find(self, layer: str, chosen: SelectedRows) -> dict[str, np.ndarray]:
        """Give the way of each through the latents, and what it looks like on it."""
        rows = chosen.rows
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
        told |= {"taken": path.taken.cpu().numpy()}
        if "class" in self._layer.fields:
            best = self._density.posterior(ends.flatten(0, 1)).max(dim=1)
            told |= {"class": best.indices.view(-1, 2).cpu().numpy()}
            told |= {"class_probability": _array(best.values.view(-1, 2))}
        return told


def _array(values: Tensor) -> np.ndarray:
    return np.asarray(values.float().cpu().numpy())


class LineWorker(UnitWorker):
    """Measures lines and indices."""

    def find(self, layer: str, chosen: SelectedRows) -> dict[str, np.ndarray]:
        """Give the numbers of both tables."""
        # Imported here: only this worker needs scipy.
        from distspec.spectra.lines.fits import measure
        from distspec.spectra.lines.tables import indices

        # As they were observed: what statistics of the sample filled in is no measurement. What the preparation patched
        # spectrum by spectrum, such as sky lines, is part of the store and counts as data here.
        spectra = self._store.take(chosen.rows, frozen=False)
        return {
            one.name: getattr(table, one.name).astype(np.float32)
            for table in (measure(spectra), indices(spectra))
            for one in fields(table)
        }
