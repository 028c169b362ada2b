"""Where everything of an experiment lies, and the digests that name it. All names on disk are made here.

<output>/
  experiment.toml            the resolved settings
  store.zarr/                spectra, columns, layers
  training/<model digest>/   state of an unfinished training, one folder per epoch
  models/<model digest>/     the finished checkpoint
  report.html, anomalies.csv
  mlflow.db, mlartifacts/    runs and models, unless a tracking server is set
"""

from pathlib import Path

from distspec.config import Experiment, digest

__all__ = [
    "explain_layer",
    "model_folder",
    "recipe_digest",
    "report_path",
    "score_layer",
    "store_digest",
    "store_path",
    "table_path",
]


def store_path(experiment: Experiment) -> Path:
    """Folder of the store."""
    return Path(experiment.output) / "store.zarr"


def recipe_digest(experiment: Experiment) -> str:
    """Name the preparation of the spectra; a model serves every store of the same recipe and grid."""
    return digest(experiment.ingest.prepare)


def store_digest(experiment: Experiment, inventory: list[tuple[str, int, int]]) -> str:
    """Name a store by its source, its recipe, its layout and the pieces that it was made from."""
    return digest(experiment.ingest, experiment.seed, inventory)


def model_folder(experiment: Experiment, store: str) -> Path:
    """Folder of the checkpoint that the training settings make from a store of this digest."""
    # The cache changes no weight; the number of workers does.
    settings = experiment.train.model_dump(mode="json", exclude={"cache_gb"})
    return Path(experiment.output) / "models" / digest(settings, experiment.seed, store)


def score_layer(experiment: Experiment, sha256: str) -> str:
    """Name of the layer that a model's scores go to."""
    return f"score-{digest(experiment.score.model_dump(mode='json', exclude={'top', 'checkpoint'}), sha256)}"


def explain_layer(experiment: Experiment, score: str, scores: str) -> str:
    """Name of the layer that explains the top list of one score of a score layer."""
    settings = experiment.explain.model_dump(mode="json", exclude={"scores"})
    return f"explain-{score}-{digest(settings, experiment.seed, scores)}"


def report_path(experiment: Experiment) -> Path:
    """File of the report."""
    return Path(experiment.output) / "report.html"


def table_path(experiment: Experiment) -> Path:
    """File of the ranked table."""
    return Path(experiment.output) / "anomalies.csv"
