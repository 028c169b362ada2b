"""Parquet in plain types, one row group a run of rows, with units for both Arrow and the VO.

Lists are of one level: what has further axes is written in C order, with its shape in the metadata of the field, since
astropy and others read no lists of lists.

References:
    VOParquet, https://www.ivoa.net/documents/Notes/VOParquet/: a VOTable header among the file's metadata
"""

import math
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distspec.stages.export.votable import header
from distspec.store.arrow import facts_of

__all__ = ["COMPRESSION", "described", "flat", "write_parquet"]

COMPRESSION = "zstd"


def described(schema: pa.Schema, description: str) -> pa.Schema:
    """Give the schema as it is in a file: lists of one level, and for programs of the VO the header of a VOTable."""
    schema = pa.schema([_flat_field(field) for field in schema])
    return schema.with_metadata(
        {"IVOA.VOTable-Parquet.version": "1.0", "IVOA.VOTable-Parquet.content": header(schema, description)}
    )


def write_parquet(tables: Iterable[pa.Table], schema: pa.Schema, path: Path, description: str) -> int:
    """Write one file, a row group for each table that has rows, and give their number."""
    rows = 0
    full = described(schema, description)
    with pq.ParquetWriter(path, full, compression=COMPRESSION) as writer:
        for table in tables:
            if table.num_rows:
                writer.write_table(flat(table).cast(full), row_group_size=table.num_rows)
            rows += table.num_rows
    return rows


def flat(table: pa.Table) -> pa.Table:
    """Make lists of lists one list."""
    for number, field in enumerate(table.schema):
        kind, shape = _shape(field.type)
        if len(shape) > 1:
            array = table[field.name].combine_chunks()
            while pa.types.is_fixed_size_list(array.type):
                array = array.flatten()
            lists = pa.FixedSizeListArray.from_arrays(array, math.prod(shape))
            table = table.set_column(number, _flat_field(field), lists)
    return table


def _flat_field(field: pa.Field) -> pa.Field:
    kind, shape = _shape(field.type)
    if len(shape) < 2:
        return field
    facts = facts_of(field) | {"shape": ",".join(str(length) for length in shape)}
    return pa.field(field.name, pa.list_(kind, math.prod(shape)), metadata=facts)


def _shape(kind: pa.DataType) -> tuple[pa.DataType, list[int]]:
    shape = []
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    return kind, shape
