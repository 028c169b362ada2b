"""Settings of `ingest`: which survey, by which recipe, into which store."""

from pydantic import model_validator

from distspec.config.base import Count, Location, Settings
from distspec.config.prepare import Prepare
from distspec.config.sources import Simulate, Source

__all__ = ["Ingest", "Values"]


class Values(Settings):
    """A table of further facts about the same objects: line fluxes, stellar parameters, visual classes."""

    path: Location
    """Parquet, FITS, VOTable, ECSV or CSV file."""
    id: str = "id"
    """Its column of ids, integer or text as in the store; every value once."""
    columns: tuple[str, ...] = ()
    """Columns to take; empty takes all but the ids."""
    prefix: str = ""
    """Put before the names of the columns, to keep them apart from those of the survey."""


class Ingest(Settings):
    """Survey files -> store."""

    source: Source = Simulate()
    """Where spectra come from."""
    prepare: Prepare = Prepare()
    store: Location | None = None
    """Folder or URL (`s3://bucket/survey.zarr`) of the store; none takes `store.zarr` in the output."""
    values: tuple[Values, ...] = ()
    """Value-added tables whose columns are joined to the store by id."""
    shard_rows: Count = 16_384
    """Spectra in a shard, the unit of distributed work."""
    chunk_rows: Count = 1_024
    """Spectra in a compressed chunk inside a shard; must divide shard_rows."""

    @model_validator(mode="after")
    def _chunks(self) -> "Ingest":
        if self.shard_rows % self.chunk_rows:
            raise ValueError("chunk_rows must divide shard_rows")
        if self.source.kind != "simulate" and "dust" not in self.prepare.model_fields_set:
            raise ValueError("say how to correct Galactic extinction: prepare.dust.kind = 'column', 'sfd' or 'none'")
        return self
