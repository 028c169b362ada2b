"""`distspec export`: store -> one table for other programs: Parquet, VOTable or a HATS catalogue.

A row is a spectrum: catalogue columns, scores of the experiment's own model and detectors, and value-added columns,
with units and UCDs, for surveys of any size.

    distspec export sdss.toml
    distspec export sdss.toml export.format=hats export.to=catalog
    distspec export sdss.toml export.format=votable export.scored_only=true

Settings that one would change first: `format`; `to` (none takes `catalog.parquet`, `catalog.vot` or `catalog-hats` in
the output); `columns`, in their order; `layers`, such as the scores of another model; `spectra=true`, which adds the
prepared spectra as lists flux, ivar and lambda (not in a VOTable), which the source `table` reads again.

Missing is null. Parquet is one file, or with more than `partition_rows` rows (a million) a folder of files, which
readers of Parquet take for one table. HATS cuts the sky into HEALPix pixels of at most `partition_rows` rows; rows
without a position go to `unplaced.parquet`, which its readers do not see, so that nothing is lost. `distspec run`
leaves the export out; every call replaces an earlier table, and refuses to replace what is none. In Python
`store.table()`, `.arrow()` and `.pandas()` give the same without a file.

In the code: rows are read and written run by run, the files of a large table in workers (`workers.py`), so that memory
does not grow with the survey, and nothing appears under its name before it is whole; but in a bucket, where a folder of
files appears one by one, and an earlier one goes first. HATS is written on this machine's disk first where it goes to a
bucket; where it goes to a folder, workers must see that. What the columns are and what missing means is said in
`distspec.store.table`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import pyarrow.parquet as pq

from distspec import __version__
from distspec.addresses import BucketPath, Place, address_of
from distspec.config import Experiment
from distspec.errors import CheckpointError, ConfigError, DistspecWarning
from distspec.files import in_place, is_unfinished, remove, unfinished
from distspec.models.checkpoint import Checkpoint
from distspec.results.layout import detect_layer, model_folder, output_of, score_layer
from distspec.runtime.workers import map_items
from distspec.stages.export.hats import write_hats
from distspec.stages.export.parquet import described, write_parquet
from distspec.stages.export.votable import write_votable
from distspec.stages.export.workers import ADVICE, PartWriter, Reader
from distspec.stages.stage import Exported, Job, Products, Stage, State
from distspec.store import SpectraStore
from distspec.store.table import SCORES, open_layers, table_layers

__all__ = ["ExportStage", "export"]

_COMMON: Final = "_common_metadata"

_FEW: Final = 500_000
"""Rows that are written in less time than workers take to start."""

_NAMES = {"parquet": "catalog.parquet", "votable": "catalog.vot", "hats": "catalog-hats"}


class ExportStage(Stage):
    """Catalogue, scores and value-added columns -> a table for other programs."""

    name, uses = "export", ("ingest",)
    in_run = False

    def state(self, job: Job) -> State:
        """Look whether there is a table at the place."""
        there = _target(job.experiment).exists()
        return State(int(there), 1, "tables", "" if there else "not written", again=True)

    def make(self, job: Job) -> Products:
        """Write the table anew."""
        return job.having(exported=export(job.experiment, job.store))

    def told(self, made: Products) -> Iterator[tuple[str, str]]:
        """Name the table."""
        if made.exported is not None:
            table = made.exported
            yield "export", f"{table.path}: {table.rows} rows of {len(table.columns)} columns"


def export(experiment: Experiment, store: SpectraStore) -> Exported:
    """Write the table of a finished store, in place of an earlier one.

    Raises:
        LayoutError: there is no such column or layer, or HATS is asked for and there are no positions.
        ConfigError: something else lies at the place.
        StoreError: the place cannot be written.
    """
    settings = experiment.export
    path = _target(experiment)
    layers = _layers(experiment, store)
    reader = Reader(store, settings, layers)
    schema = reader.catalogue().schema
    said = f"{experiment.name}: store {store.digest}, recipe {store.recipe}"
    if _in_files(experiment, store) and isinstance(path, BucketPath):
        # Workers are elsewhere, and this process need not see what they write.
        with unfinished(path):
            return Exported(path, _write_files(experiment, store, layers, path, said), tuple(schema.names))
    with in_place(path, ADVICE) as place:
        if settings.format == "hats":
            facts = {"obs_collection": experiment.name, "obs_title": said, "hats_builder": f"distspec {__version__}"}
            placed, unplaced = write_hats(reader, place, facts, settings.partition_rows, _mapper(experiment, store))
            if unplaced:
                warnings.warn(
                    f"{unplaced} of {placed + unplaced} rows have no position on the sky; they are in "
                    f"{path / 'unplaced.parquet'}, which readers of HATS do not see",
                    DistspecWarning,
                    stacklevel=2,
                )
            return Exported(path, placed + unplaced, tuple(schema.names))
        if _in_files(experiment, store):
            return Exported(path, _write_files(experiment, store, layers, place, said), tuple(schema.names))
        write = write_parquet if settings.format == "parquet" else write_votable
        rows = write(reader.tables(label="export"), schema, place, said)
        if path.is_dir():
            remove(path)  # an earlier table of many files, whose place this one takes
        return Exported(path, rows, tuple(schema.names))


def _mapper(experiment: Experiment, store: SpectraStore) -> Callable[..., Iterator[Any]]:
    """Give what applies work to items: in this process for a small survey, else in workers."""
    needs, here = experiment.runtime.needs("export"), store.rows <= _FEW or None
    if experiment.export.format == "hats" and isinstance(_target(experiment), BucketPath):
        here = True  # its rows are handed out on this machine's disk
    return partial(map_items, settings=experiment.runtime, label="write", needs=needs, here=here)


def _in_files(experiment: Experiment, store: SpectraStore) -> bool:
    """Tell whether Parquet is to be a folder of files, each written by a worker."""
    return experiment.export.format == "parquet" and store.rows > experiment.export.partition_rows


def _write_files(experiment: Experiment, store: SpectraStore, layers: Sequence[str], folder: Place, said: str) -> int:
    """Write a folder of Parquet files of about `partition_rows` rows, which readers take for one table."""
    settings = experiment.export
    catalogue = Reader(store, settings, layers).catalogue()
    files: list[list[tuple[int, int]]] = [[]]
    for start, stop in catalogue.runs():
        if files[-1] and stop - files[-1][0][0] > settings.partition_rows:
            files.append([])
        files[-1].append((start, stop))
    folder.mkdir()
    items = [(number, tuple(runs)) for number, runs in enumerate(files)]
    arguments = (store.address, settings, tuple(layers), folder.resolve(), said)
    rows: int = sum(_mapper(experiment, store)(PartWriter, arguments, items))
    # Tells readers what the columns mean, and us that the folder is ours to replace.
    with in_place(folder / _COMMON, ADVICE) as common:
        pq.write_metadata(described(catalogue.schema, said), common)
    return rows


def _target(experiment: Experiment) -> Place:
    """Say where the table goes, and refuse to replace what is not one."""
    settings = experiment.export
    path = address_of(settings.to or output_of(experiment) / _NAMES[settings.format])
    if is_unfinished(path):
        return path
    if settings.format == "hats":
        if path.exists() and not (path / "hats.properties").is_file():
            raise ConfigError(f"export.to: {path} exists and is not a HATS catalogue; choose another place")
    elif path.is_dir() and not (settings.format == "parquet" and (path / _COMMON).is_file()):
        raise ConfigError(f"export.to: {path} is a folder; expected the name of a file")
    return path


def _layers(experiment: Experiment, store: SpectraStore) -> list[str]:
    """Name the layers to export: those of the settings, else the value-added tables and the experiment's own scores.

    Where the experiment has no scores of its own in this store, those of all models are taken.
    """
    if experiment.export.layers:
        return list(experiment.export.layers)
    layers = table_layers(store)
    own = {detect_layer(experiment, one, store.digest) for one in experiment.detect.detectors} & set(layers)
    try:
        folder = experiment.score.checkpoint or model_folder(experiment, store.digest)
        own |= {score_layer(experiment, Checkpoint.load(folder).sha256)} & set(layers)
    except CheckpointError:
        if not own:
            return layers
    # Ensembles are of these layers or of others; only their own attribute tells.
    own |= {layer.name for layer in open_layers(store, "ensemble-") if set(layer.attributes.get("layers", ())) <= own}
    return [name for name in layers if name in own or not name.startswith(SCORES)] if own else layers
