"""Which catalogue columns are properties of the spectra, which name exposures, and which parts of the instrument.

A list that prefers a S/N, a plate or a fiber tells of the instrument as much as of the sky.
"""

import re
from typing import Final

import numpy as np

from distspec.config import Compare
from distspec.errors import ConfigError
from distspec.store import SpectraStore

__all__ = ["EXPOSURES", "PARTS", "Columns", "exposure_columns", "property_columns"]

Columns = tuple[str, ...]
"""Names of columns that make a label together."""

_MAGNITUDES: Final = re.compile(r"(psf|c?model|petro|fiber2?)?mag(_\w+)?|[a-z]\w*_mag|flux_([grz]|w[12])|norm")
"""Names of columns of brightness. `norm` is the flux that a spectrum was divided by."""

_PROPERTIES: Final = (
    *("snr", "z", "ebv", "coverage"),
    *("plate", "tileid", "tile", "fiber", "fiberid", "mjd", "lmjd", "night", "lastnight"),
)
"""Properties that are tested unless others are named, beside brightness."""

EXPOSURES: Final[tuple[Columns, ...]] = (
    ("plate", "mjd"),
    ("tileid", "lastnight"),
    ("tileid", "night"),
    ("lmjd", "planid", "spid"),
    ("tileid",),
    ("tile",),
    ("survey", "program", "healpix"),
    ("file",),
)
"""What may name an exposure or comes nearest to one. The first that most spectra have is taken."""

PARTS: Final[tuple[Columns, ...]] = (
    ("plate",),
    ("spid",),
    ("spid", "fiber"),
    ("fiber",),
    ("fiberid",),
    ("petal",),
    ("petal_loc",),
    ("spectrograph",),
)
"""Parts of the instrument in which outliers may come together."""

_IN_A_FILE: Final = 10
"""Spectra that files hold on average from which on a file counts as an exposure."""


def property_columns(settings: Compare, store: SpectraStore) -> list[str]:
    """Name the columns of numbers that lists are tested for.

    Raises:
        ConfigError: a named column is not there, or is not one number per spectrum.
    """
    for name in settings.properties:
        _require(store, "properties", name, "iufb", "one number")
    if settings.properties:
        return list(dict.fromkeys(settings.properties))
    there = [name for name in store.column_names if _kind(store, name) in tuple("iuf")]
    bright = [name for name in there if _MAGNITUDES.fullmatch(name)]
    return [name for name in (*_PROPERTIES[:2], *bright, *_PROPERTIES[2:]) if name in there]


def exposure_columns(settings: Compare, store: SpectraStore) -> list[Columns]:
    """Name the columns whose values make labels: what may name an exposure, then parts of the instrument.

    Raises:
        ConfigError: a named column is not there, or is neither whole numbers nor text.
    """
    for name in settings.exposures:
        _require(store, "exposures", name, "iubt", "one whole number or text")
    there = {name for name in store.column_names if _kind(store, name) in tuple("iubt")}
    exposures = [columns for columns in EXPOSURES if set(columns) <= there]
    if ("file",) in exposures and store.rows < _IN_A_FILE * len(store.inventory()):
        exposures.remove(("file",))
    exposures = [settings.exposures] if settings.exposures else exposures
    parts = [columns for columns in PARTS if set(columns) <= there and columns not in exposures]
    if ("spid", "fiber") in parts:
        parts.remove(("fiber",))  # each spectrograph numbers its own
    return [*exposures, *parts]


def _kind(store: SpectraStore, name: str) -> str:
    """Tell what a column holds: i, u, f, b as numpy, t for text, nothing where a spectrum has several values."""
    dtype, shape = store.base.fields[f"columns/{name}"]
    return "" if shape else "t" if dtype == "string" else np.dtype(dtype).kind


def _require(store: SpectraStore, setting: str, name: str, kinds: str, expected: str) -> None:
    if name not in store.column_names:
        raise ConfigError(f"compare.{setting} names {name!r}; the store has {', '.join(store.column_names)}")
    if _kind(store, name) not in tuple(kinds):
        dtype, shape = store.base.fields[f"columns/{name}"]
        held = "text" if dtype == "string" else f"{dtype} {list(shape)}" if shape else dtype
        raise ConfigError(f"compare.{setting} names {name!r}, a column of {held}; expected {expected} per spectrum")
