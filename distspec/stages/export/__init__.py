"""Store -> one table for other programs.

- `stage`: `ExportStage`: which columns and rows, and where they go.
- `workers`: rows read by runs; files of a large table, in workers.
- `parquet`: a Parquet file.
- `votable`: a VOTable.
- `hats`: a HATS catalogue: Parquet cut by the sky.
"""

__all__: list[str] = []
