"""VOTable, with rows streamed: a header by astropy, then one line of XML a row, so that no table is too large to write.

References:
    VOTable 1.4, https://www.ivoa.net/documents/VOTable/20191021/
"""

import io
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pyarrow as pa
import pyarrow.compute as pc

from distspec.store.arrow import facts_of

__all__ = ["header", "write_votable"]

_TYPES = {
    pa.bool_(): "boolean",
    pa.uint8(): "unsignedByte",
    pa.int8(): "short",
    pa.int16(): "short",
    pa.uint16(): "int",
    pa.int32(): "int",
    pa.uint32(): "long",
    pa.int64(): "long",
    pa.float16(): "float",
    pa.float32(): "float",
    pa.float64(): "double",
}
"""What VOTable calls Arrow's types; it has no 64-bit unsigned integers, which go as text."""

_FORBIDDEN = re.compile("[^\\t\\n\\r\\u0020-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")
"""Characters that XML cannot hold, however they are written."""


def header(schema: pa.Schema, description: str) -> str:
    """Give a VOTable of these columns without rows: units, UCDs and descriptions for whoever reads the data."""
    from astropy.io.votable.tree import CooSys, Resource, TableElement, VOTableFile

    file = VOTableFile(version="1.4")
    resource = Resource()
    file.resources.append(resource)
    resource.coordinate_systems.append(CooSys(ID="icrs", system="ICRS"))
    table = TableElement(file, name="catalog")
    table.description = description
    resource.tables.append(table)
    text = io.BytesIO()
    with warnings.catch_warnings():
        # The VO calls erg and Angstrom deprecated; astronomers do not.
        warnings.simplefilter("ignore")
        table.fields.extend(_field(file, field) for field in schema)
        file.to_xml(text, tabledata_format="tabledata")
    return text.getvalue().decode("utf-8")


def _field(file: Any, field: pa.Field) -> Any:
    from astropy.io.votable.tree import Field
    from astropy.io.votable.ucd import check_ucd
    from astropy.utils.xml.check import fix_id

    kind = field.type
    shape: list[str] = []
    while pa.types.is_fixed_size_list(kind):
        shape.insert(0, str(kind.list_size))
        kind = kind.value_type
    datatype, arraysize = _TYPES.get(kind, "unicodeChar"), "x".join(shape) or None
    if pa.types.is_struct(kind):
        # Of what VOTable cannot say (lists in a struct) only the name is told, to readers of the Parquet file.
        datatype, arraysize = "unicodeChar", "*"
    facts = facts_of(field)
    ucd = facts.get("ucd", "")
    unit = _unit(facts.get("unit", ""))
    result = Field(
        file,
        ID=fix_id(field.name),
        name=field.name,
        datatype=datatype,
        arraysize="*" if datatype == "unicodeChar" else arraysize,
        unit=unit,
        ucd=ucd if check_ucd(ucd, check_controlled_vocabulary=True) and ucd else None,
        ref="icrs" if ucd.startswith("pos.eq") else None,
    )
    said = [facts.get("description", ""), f"in {facts['unit']}" if "unit" in facts and unit is None else ""]
    result.description = "; ".join(text for text in said if text) or None
    return result


def _unit(unit: str) -> str | None:
    """Write a unit as the VO does; None where it has no name for it."""
    from astropy import units

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return units.Unit(unit).to_string("vounit") or None
        except ValueError:
            return None


def write_votable(tables: Iterable[pa.Table], schema: pa.Schema, path: Path, description: str) -> int:
    """Write a VOTable of TABLEDATA and give its number of rows."""
    head, end, tail = header(schema, description).rpartition("</TABLE>")
    rows = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(f"{head}<DATA><TABLEDATA>\n")
        for table in tables:
            for batch in table.to_batches(max_chunksize=4096):
                file.writelines(_lines(batch))
            rows += table.num_rows
        file.write(f"</TABLEDATA></DATA>\n{end}{tail}")
    return rows


def _lines(batch: pa.RecordBatch) -> Iterator[str]:
    cells = [_cells(column) for column in batch.columns]
    for row in zip(*cells, strict=True):
        yield f"<TR><TD>{'</TD><TD>'.join(row)}</TD></TR>\n"


def _cells(column: pa.Array) -> list[str]:
    """Write each value as VOTable does; nothing at all means null."""
    kind = column.type
    if pa.types.is_string(kind):
        return [_text(value) for value in pc.fill_null(column, "").to_pylist()]
    if pa.types.is_fixed_size_list(kind):
        inner, width = column, 1
        while pa.types.is_fixed_size_list(inner.type):
            width *= inner.type.list_size
            inner = inner.flatten()
        # Lists are never null; integers that are missing are so as a whole list.
        flat = _cells(inner)
        return [" ".join(flat[start : start + width]).strip() for start in range(0, len(flat), width)]
    if pa.types.is_boolean(kind):
        return [{None: "", True: "T", False: "F"}[value] for value in column.to_pylist()]
    if pa.types.is_floating(kind):
        # Arrow writes the shortest decimal that gives the same float again.
        named = {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}
        return [named.get(cell, cell) for cell in pc.fill_null(column.cast(pa.string()), "").to_pylist()]
    return list(pc.fill_null(column.cast(pa.string()), "").to_pylist())


def _text(value: str) -> str:
    return escape(_FORBIDDEN.sub("\ufffd", value), {"\r": "&#13;"})
