"""`distspec export`: store -> one table for other programs: Parquet, VOTable or a HATS catalogue.

A row is a spectrum: catalogue columns, scores of the experiment's own model and detectors, and value-added columns,
with units and UCDs, for surveys of any size.

    distspec export sdss.toml
    distspec export sdss.toml export.format=hats export.to=catalog
    distspec export sdss.toml export.format=votable export.scored_only=true

Settings that one would change first: `format`; `to` (none takes `catalog.parquet`, `catalog.vot` or `catalog-hats` in
the output); `columns`, in their order; `layers`, such as the scores of another model; `spectra=true`, which adds the
prepared spectra as lists flux, ivar and lambda (not in a VOTable), which the source `table` reads again.

Missing is null. HATS cuts the sky into HEALPix pixels of at most `partition_rows` rows; rows without a position go to
`unplaced.parquet`, which its readers do not see, so that nothing is lost. `distspec run` leaves the export out; every
call replaces an earlier table, and refuses to replace what is none. In Python `store.table()`, `.arrow()` and
`.pandas()` give the same without a file.

In the code: rows are read and written run by run, so that memory does not grow with the survey, and nothing appears
under its name before it is whole. What the columns are and what missing means is said in `distspec.store.table`.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from distspec import __version__
from distspec.config import Experiment, Export
from distspec.errors import CheckpointError, ConfigError, DistspecWarning, LayoutError
from distspec.files import in_place
from distspec.models.checkpoint import Checkpoint
from distspec.results.layout import detect_layer, model_folder, score_layer
from distspec.runtime.progress import progress
from distspec.stages.export.hats import write_hats
from distspec.stages.export.parquet import write_parquet
from distspec.stages.export.votable import write_votable
from distspec.stages.stage import Exported, Job, Products, Stage, State
from distspec.store import SpectraStore
from distspec.store.table import SCORES, Catalogue, open_layers, table_layers

__all__ = ["ExportStage", "export"]

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
    reader = _Reader(store, settings, _layers(experiment, store))
    schema = reader.catalogue().schema
    said = f"{experiment.name}: store {store.digest}, recipe {store.recipe}"
    with in_place(path, "make room or choose another place by export.to") as partial:
        if settings.format == "hats":
            columns = reader.catalogue(("ra", "dec"))
            facts = {"obs_collection": experiment.name, "obs_title": said, "hats_builder": f"distspec {__version__}"}
            placed, unplaced = write_hats(
                reader.tables(columns), reader.tables(label="export"), schema, partial, facts, settings.partition_rows
            )
            if unplaced:
                warnings.warn(
                    f"{unplaced} of {placed + unplaced} rows have no position on the sky; they are in "
                    f"{path / 'unplaced.parquet'}, which readers of HATS do not see",
                    DistspecWarning,
                    stacklevel=2,
                )
            return Exported(path, placed + unplaced, tuple(schema.names))
        write = write_parquet if settings.format == "parquet" else write_votable
        return Exported(path, write(reader.tables(label="export"), schema, partial, said), tuple(schema.names))


class _Reader:
    """Reads the wanted columns of the wanted rows."""

    def __init__(self, store: SpectraStore, settings: Export, layers: Sequence[str]) -> None:
        self._store = store
        self._settings = settings
        self._layers = layers
        if settings.format == "hats" and not {"ra", "dec"} <= set(store.column_names):
            raise LayoutError(
                f"{store.path} has no columns ra and dec, which HATS needs; use export.format = 'parquet'"
            )

    def catalogue(self, columns: tuple[str, ...] | None = None) -> Catalogue:
        """Give the table of the settings, or of some columns."""
        if columns is not None:
            return Catalogue(self._store, columns, ())
        wanted: tuple[str, ...] | None = self._settings.columns or None
        if wanted is not None and self._settings.format == "hats":
            wanted += tuple(name for name in ("ra", "dec") if name not in wanted)
        return Catalogue(self._store, wanted, self._layers, spectra=self._settings.spectra)

    def tables(self, catalogue: Catalogue | None = None, label: str = "") -> Iterator[pa.Table]:
        """Read all runs, without the rows that are not wanted."""
        catalogue = self.catalogue() if catalogue is None else catalogue
        runs = list(catalogue.runs())
        for start, stop in progress(runs, len(runs), label, "run"):
            table = catalogue.read(start, stop)
            if self._settings.scored_only:
                table = table.filter(pa.array(self._store.status(start, stop) == 0))
            yield table


def _target(experiment: Experiment) -> Path:
    """Say where the table goes, and refuse to replace what is not one."""
    settings = experiment.export
    if settings.to is not None and "://" in settings.to:
        raise ConfigError(f"export.to is {settings.to}; expected a local path: copy the table when it is written")
    path = Path(settings.to or Path(experiment.output) / _NAMES[settings.format])
    if settings.format == "hats":
        if path.exists() and not (path / "hats.properties").is_file():
            raise ConfigError(f"export.to: {path} exists and is not a HATS catalogue; choose another place")
    elif path.is_dir():
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
