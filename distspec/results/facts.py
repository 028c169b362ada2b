"""What a stage found about a whole survey: a folder with one JSON, which is written last, and tables beside it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distspec.addresses import Place
from distspec.errors import CheckpointError
from distspec.files import read_json, write_file

__all__ = ["Facts", "find", "write"]


@dataclass(frozen=True)
class Facts:
    """A folder that is finished.

    Arguments:
        folder: with the JSON and the tables beside it.
        content: of the JSON, as whoever opens the file finds it.
    """

    folder: Place
    content: dict[str, Any]


def find(folder: Place, name: str, schema: int | None, verb: str) -> Facts | None:
    """Open a folder of facts; None where its JSON is not there, however much lies beside it.

    Arguments:
        folder: the place.
        name: of the JSON.
        schema: the number that its `schema` must be; None where it has none.
        verb: what makes it again.

    Raises:
        CheckpointError: the JSON is damaged or of another schema.
    """
    path = folder / name
    if not path.is_file():
        return None
    content = read_json(path, f"run `distspec {verb}` again")
    if schema is not None and content.get("schema") != schema:
        found = content.get("schema")
        raise CheckpointError(f"{path} has schema {found}, expected {schema}; remove it and {verb} again")
    return Facts(folder, content)


def write(
    folder: Place,
    name: str,
    content: Mapping[str, Any],
    files: Mapping[str, str | bytes] | None = None,
    *,
    indent: int | None = 1,
) -> Facts:
    """Write the files, then the JSON, each whole; what else lies in the folder stays.

    Arguments:
        folder: the place.
        name: of the JSON.
        content: of the JSON; a number that is not finite is a mistake.
        files: content of the tables beside it, by name.
        indent: of the JSON.

    Raises:
        StoreError: the folder cannot be written.
        ValueError: a number is not finite.
    """
    text = json.dumps(content, indent=indent, allow_nan=False) + "\n"
    for other, table in (files or {}).items():
        write_file(folder / other, table)
    write_file(folder / name, text)
    return Facts(folder, json.loads(text))
