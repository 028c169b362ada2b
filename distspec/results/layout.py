"""Where everything of an experiment lies, and the digests that name it. Names that hold a digest are made here.

<output>/
  experiment.toml            the resolved settings
  store.zarr/                spectra, columns, layers, unless ingest.store names another place
  ledger.csv                 every spectrum and file that is set aside, and why
  catalogs/<digest>/         what is wanted of large catalogues, for the workers
  training/<model digest>/   state of an unfinished training, one folder per epoch
  models/<model digest>/     the finished checkpoint
  detectors/<name>-<digest>/ a fitted classical detector; <name>-<digest>.unfinished until its last look
  comparison/<digest>/       how far scores agree: comparison.json, overlaps.csv, errors.csv, groups.csv
  comparison/ensemble-<digest>/  distribution of each score, by which ensembles rank
  clusters/<digest>/         groups of explanations: clusters.json, members.csv
  evaluation/<digest>/       how good detectors are: evaluation.json, evaluation.csv; part-*.npz while it is made
  tuning/<study digest>/     a search for settings: Optuna's journal, trials.csv, states of unfinished trials
  tuned.toml                 the settings that it found
  report.html, anomalies.csv
  mlflow.db, mlartifacts/    runs and models, unless a tracking server is set

<output> is a folder, or an address in a bucket, where all but the last line is the same; there a folder is whole once
the file that is written last is there (model.json, detector.json, state.json, ...).
"""

from collections.abc import Sequence
from typing import Any

from distspec.addresses import Place, address_of
from distspec.config import AnyDetector, AnyMethod, Experiment, Train, digest
from distspec.store import Inventory, Layer

__all__ = [
    "ascent_layer",
    "cluster_folder",
    "compare_folder",
    "detect_layer",
    "detector_folder",
    "ensemble_folder",
    "ensemble_layer",
    "evaluation_folder",
    "explain_layer",
    "ledger_path",
    "lines_layer",
    "model_folder",
    "output_of",
    "recipe_digest",
    "report_path",
    "score_layer",
    "store_digest",
    "store_identity",
    "store_path",
    "table_path",
    "tuned_path",
    "tuning_folder",
]


_HOW_READ = {"cache_gb", "readers"}
"""Settings of training that change no batch."""


def output_of(experiment: Experiment) -> Place:
    """Folder, or place in a bucket, of everything that is not set to lie elsewhere."""
    return address_of(experiment.output)


def store_path(experiment: Experiment) -> str:
    """Folder or URL of the store."""
    return experiment.ingest.store or str(output_of(experiment) / "store.zarr")


def recipe_digest(experiment: Experiment) -> str:
    """Name the preparation of the spectra; a model serves every store of the same recipe and grid."""
    return digest(_recipe(experiment))


def _recipe(experiment: Experiment) -> dict[str, Any]:
    # Where frozen statistics come from does not matter; what they are is part of the store's recipe.
    return experiment.ingest.prepare.model_dump(mode="json", exclude={"sample": {"store"}})


def store_identity(experiment: Experiment) -> dict[str, Any]:
    """Settings that must agree for a store to be gone on with; where the files lie is not among them."""
    settings = experiment.ingest
    source = settings.source.model_dump(mode="json", exclude={"path", "catalog"})
    seed = {"seed": experiment.seed} if settings.source.kind == "simulate" else {}
    shape = {"shard_rows": settings.shard_rows, "chunk_rows": settings.chunk_rows}
    return {"source": source, "prepare": _recipe(experiment), **shape, **seed}


def store_digest(experiment: Experiment, inventory: Inventory) -> str:
    """Name a store by its settings and the files that it began with; later extensions do not change it."""
    return digest(store_identity(experiment), inventory.names, inventory.sizes.tolist(), inventory.counts.tolist())


def model_folder(experiment: Experiment, store: str) -> Place:
    """Folder of the checkpoint that the training settings make from a store of this digest."""
    # How spectra are read and held changes no weight; the number of workers does.
    settings = experiment.train.model_dump(mode="json", exclude=_HOW_READ)
    if experiment.train.shares:
        settings["workers"] = {"shares": experiment.train.shares}  # the fewest workers change no weight
    return output_of(experiment) / "models" / digest(settings, experiment.seed, store)


def tuning_folder(experiment: Experiment, least: Train, store: str) -> Place:
    """Folder of a search for settings on a store of this digest.

    Arguments:
        experiment: the settings.
        least: those of training, with one fixed choice in the place of all that is searched, so that what was found
            belongs to the search that found it.
        store: digest of the store.
    """
    # More trials extend a study; how many run at a time, and what follows after the first fit, changes none of them.
    settings = experiment.tune.model_dump(mode="json", exclude={"trials", "concurrent"})
    fixed = least.model_dump(mode="json", exclude={"epochs", "patience", "second", "density", "workers", *_HOW_READ})
    return output_of(experiment) / "tuning" / digest(settings, fixed, experiment.seed, store)


def tuned_path(experiment: Experiment) -> Place:
    """File of the settings that a search has found."""
    return output_of(experiment) / "tuned.toml"


def score_layer(experiment: Experiment, sha256: str) -> str:
    """Name of the layer that a model's scores go to."""
    return f"score-{digest(experiment.score.model_dump(mode='json', exclude={'top', 'checkpoint'}), sha256)}"


def explain_layer(experiment: Experiment, method: AnyMethod, scores: Sequence[Layer], listed: str = "") -> str:
    """Name of the layer of a method's explanations; the spectra that are explained change as the store grows.

    Arguments:
        experiment: with the explain settings.
        method: one of their methods.
        scores: the layer of each score that is explained.
        listed: names the content of the list of ids, if the settings have one.
    """
    chosen = _explained(experiment, scores, listed)
    return f"explain-{method.name}-{digest(method.model_dump(mode='json'), experiment.seed, chosen)}"


def lines_layer(experiment: Experiment, scores: Sequence[Layer], listed: str = "") -> str:
    """Name of the layer of lines measured in the spectra that are explained; arguments as above."""
    return f"lines-{digest(_explained(experiment, scores, listed))}"


def _explained(experiment: Experiment, scores: Sequence[Layer], listed: str) -> list[Any]:
    """Say what decides which spectra are explained."""
    settings = experiment.explain.model_dump(mode="json", include={"scores", "fraction", "limit"})
    return [settings, listed, [(layer.name, *_grown(layer)) for layer in scores]]


def ascent_layer(experiment: Experiment, scores: Layer, listed: str = "") -> str:
    """Name of the layer of the ways up the density from the top lists of a score layer; arguments as above."""
    settings = experiment.explain.model_dump(mode="json", include={"scores", "ascent", "fraction", "limit"})
    return f"ascent-{digest(settings, scores.name, listed, *_grown(scores))}"


def _grown(scores: Layer) -> list[list[int]]:
    return [list(scores.parts[1:])] if len(scores.parts) > 1 else []


def detector_folder(experiment: Experiment, detector: AnyDetector, store: str) -> Place:
    """Folder of a classical detector that is fitted on a store of this digest."""
    settings = detector.model_dump(mode="json")
    # What is held out of the fit is what is held out of training.
    drawn = (experiment.detect.sample, experiment.train.validation, experiment.seed)
    return output_of(experiment) / "detectors" / f"{detector.name}-{digest(settings, *drawn, store)}"


def detect_layer(experiment: Experiment, detector: AnyDetector, store: str) -> str:
    """Name of the layer that a classical detector's scores go to."""
    return f"detect-{detector_folder(experiment, detector, store).name}"


def compare_folder(experiment: Experiment, store: str, scores: Sequence[Layer], names: Sequence[str]) -> Place:
    """Folder of the comparison of scores on a store of this digest; it changes as the store grows.

    Arguments:
        experiment: with the compare settings.
        store: digest of the store.
        scores: layers that are compared, or whose errors are told.
        names: of the scores.
    """
    settings = experiment.compare.model_dump(mode="json", exclude={"scores"})
    return output_of(experiment) / "comparison" / digest(settings, *_ranked(store, scores, names))


def ensemble_layer(store: str, scores: Sequence[Layer], names: Sequence[str]) -> str:
    """Name of the layer of the ensembles of scores on a store of this digest; ranks change as it grows.

    Arguments:
        store: digest of the store.
        scores: layers that hold the scores.
        names: of the scores.
    """
    return f"ensemble-{digest(*_ranked(store, scores, names))}"


def ensemble_folder(experiment: Experiment, layer: str) -> Place:
    """Folder of the distributions by which the ensembles of a layer rank."""
    return output_of(experiment) / "comparison" / layer


def _ranked(store: str, scores: Sequence[Layer], names: Sequence[str]) -> list[Any]:
    return [store, list(names), [(layer.name, list(layer.parts)) for layer in scores]]


def evaluation_folder(experiment: Experiment, store: str, scores: Sequence[Layer]) -> Place:
    """Folder of what planting anomalies in a store of this digest tells of its scores; it changes as the store grows.

    Arguments:
        experiment: with the evaluate and explain settings.
        store: digest of the store.
        scores: layers of the detectors.
    """
    settings = experiment.evaluate.model_dump(mode="json")
    explained = experiment.explain.model_dump(mode="json", exclude={"ascent", "fraction", "limit", "ids"})
    # What is held out of every fit is what anomalies are planted in. A model that was named may have seen it.
    drawn: tuple[Any, ...] = (experiment.train.validation, experiment.seed, experiment.score.checkpoint is not None)
    drawn += (list(experiment.compare.scores),)
    made = sorted(
        [layer.name, layer.attributes.get("model", layer.attributes.get("detector")), list(layer.parts)]
        for layer in scores
    )
    return output_of(experiment) / "evaluation" / digest(settings, explained, *drawn, store, made)


def cluster_folder(experiment: Experiment, store: str, explanations: Layer, score: str) -> Place:
    """Folder of the clusters of the explanations of a score; it changes as the store grows.

    Arguments:
        experiment: with the cluster settings.
        store: digest of the store.
        explanations: their layer.
        score: whose explanations are clustered.
    """
    settings = experiment.cluster.model_dump(mode="json", exclude={"method", "score"})
    drawn = (list(experiment.compare.exposures), experiment.seed)
    made = (store, explanations.name, list(explanations.parts), score)
    return output_of(experiment) / "clusters" / digest(settings, *drawn, *made)


def report_path(experiment: Experiment) -> Place:
    """File of the report."""
    return output_of(experiment) / "report.html"


def table_path(experiment: Experiment) -> Place:
    """File of the ranked table."""
    return output_of(experiment) / "anomalies.csv"


def ledger_path(experiment: Experiment) -> Place:
    """File that lists everything that is set aside."""
    return output_of(experiment) / "ledger.csv"
