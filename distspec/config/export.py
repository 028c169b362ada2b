"""Settings of `export`: which columns, in which format."""

from typing import Literal

from pydantic import model_validator

from distspec.config.base import Count, Location, Settings

__all__ = ["Export"]


class Export(Settings):
    """Store -> one table for other programs."""

    format: Literal["parquet", "votable", "hats"] = "parquet"
    """Parquet: one file, or a folder of files. VOTable: one file for TOPCAT and Aladin. HATS: a folder of partitions by
    sky position."""
    to: Location | None = None
    """File, or folder for HATS; none takes `catalog.parquet`, `catalog.vot` or `catalog-hats` in the output."""
    columns: tuple[str, ...] = ()
    """Columns to write, in this order; empty takes all. HATS adds `ra` and `dec`."""
    layers: tuple[str, ...] = ()
    """Layers that give columns; empty takes the value-added tables and the scores of the experiment's own model."""
    scored_only: bool = False
    """Leave out the spectra that are set aside."""
    spectra: bool = False
    """Add the prepared spectra, as a struct of the lists flux, ivar and lambda (Multimodal Universe)."""
    partition_rows: Count = 1_000_000
    """Rows in a file of a table that has more, at most: of Parquet in their order, of HATS by the sky; fewer where they
    are long."""

    @model_validator(mode="after")
    def _lists(self) -> "Export":
        if self.spectra and self.format == "votable":
            raise ValueError("a VOTable cannot hold export.spectra; use format 'parquet' or 'hats'")
        return self
