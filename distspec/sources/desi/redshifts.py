"""Redshifts of DESI spectra: from the redrock file beside a coadd, or from a catalog of the survey.

Both are joined on TARGETID, never by the order of rows. A catalog may list a target several times, since each survey,
program and sky pixel (or tile) is coadded and fitted by itself: what belongs to the coadd at hand counts first, then
what the survey has chosen (ZCAT_PRIMARY); entries that still differ leave a target without a redshift.
"""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped

from distspec.errors import SourceError
from distspec.sources.catalogs.catalog import Catalog
from distspec.sources.files.fits import FitsFile
from distspec.sources.files.places import Files

__all__ = ["CATALOG_COLUMNS", "Redshifts", "companion", "match", "read_catalog", "read_companion"]

CATALOG_COLUMNS = (
    *("z", "zwarn", "spectype", "subtype"),
    *("survey", "program", "healpix", "tileid", "zcat_primary"),
)
"""What is kept of a catalog, as far as it is there."""


@dataclass(frozen=True)
class Redshifts:
    """Redshifts of some targets, in their order.

    Arguments:
        found: whether the target is listed.
        z: NaN where it is not, or where its entries differ.
        zwarn: redrock's warnings, 0 where none are given.
        kind: GALAXY, QSO or STAR, or empty.
        subkind: redrock's subtype, or empty.
    """

    found: Bool[np.ndarray, "n"]
    z: Float64[np.ndarray, "n"]
    zwarn: Int64[np.ndarray, "n"]
    kind: Shaped[np.ndarray, "n"]
    subkind: Shaped[np.ndarray, "n"]

    def part(self, start: int, stop: int) -> "Redshifts":
        """Give those of a run of the targets."""
        run = slice(start, stop)
        return Redshifts(self.found[run], self.z[run], self.zwarn[run], self.kind[run], self.subkind[run])


def companion(files: Files, name: str) -> str | None:
    """Name the redshift file of a coadd or spectra file: same folder, same name but for the first word."""
    found = re.fullmatch(r"(?:coadd|spectra)-(.+?)\.fits(?:\.gz)?", PurePosixPath(name).name)
    if found is None:
        return None
    names = (files.beside(name, f"{kind}-{found[1]}.fits{end}") for kind in ("redrock", "zbest") for end in ("", ".gz"))
    return next((other for other in names if files.has(other)), None)


def read_companion(files: Files, name: str, ids: Int64[np.ndarray, "n"]) -> Redshifts:
    """Read redshifts from a redrock file, or from a zbest file as redrock wrote them before 2021.

    Raises:
        SourceError: the file is damaged, or holds no redshifts by TARGETID.
    """
    with FitsFile(files, name) as file:
        unit = file.find("REDSHIFTS") or file.find("ZBEST") or file.find_table("targetid", "z")
        if unit is None:
            raise SourceError(f"{file.path}: holds {file.contents}; expected a table with TARGETID and Z")
        names = [column for column in ("zwarn", "spectype", "subtype") if column in unit.columns]
        table: dict[str, Any] = file.table(unit, ["targetid", "z", *names])
        if table["targetid"].dtype.kind not in "iu":
            raise SourceError(f"{unit.place}: TARGETID is stored as {table['targetid'].dtype}; expected integers")
        listed = table["targetid"].astype(np.int64)
        order = np.argsort(listed, kind="stable")
        start = np.searchsorted(listed[order], ids, "left")
        stop = np.searchsorted(listed[order], ids, "right")
        owner, rows = _pairs(start, stop)
        rows = order[rows]
        first, differs = _first(len(ids), owner, table["z"][rows].astype(np.float64))
        return _take(table, stop > start, rows, first, differs, "")


def read_catalog(catalog: Catalog, ids: Int64[np.ndarray, "n"], facts: dict[str, np.ndarray]) -> Redshifts:
    """Look up redshifts in a catalog; see `match`."""
    found, owner, rows = match(catalog, ids, facts, strict=False)
    names = [name for name in CATALOG_COLUMNS[:4] if name in catalog.columns]
    table: dict[str, Any] = {name: catalog.values(name, rows) for name in names}
    first, differs = _first(len(ids), owner, table["z"].astype(np.float64))
    # A quasar catalog names no class in its rows: its table's name does.
    default = "QSO" if catalog.table == "QSO_CAT" else ""
    return _take(table, found, np.arange(len(rows)), first, differs, default)


def match(
    catalog: Catalog, ids: Int64[np.ndarray, "n"], facts: dict[str, np.ndarray], strict: bool
) -> tuple[Bool[np.ndarray, "n"], Int64[np.ndarray, "pairs"], Int64[np.ndarray, "pairs"]]:
    """Find the entries that count for some targets.

    Arguments:
        catalog: by TARGETID.
        ids: the targets.
        facts: `survey`, `program` (empty where unknown), `healpix`, `tileid` (-1 where unknown) of each.
        strict: take only entries that agree with these facts, as far as both sides know them.

    Returns:
        Which targets have an entry; and, in the order of targets, the number of a target and one of its entries.
    """
    owner, rows = _pairs(*catalog.span(ids))
    same, primary = np.ones(len(rows), bool), np.zeros(len(rows), bool)
    for name, known in facts.items():
        if name not in catalog.columns or not len(rows):
            continue
        mine, theirs = known[owner], catalog.values(name, rows)
        if mine.dtype.kind == "U":
            same &= (mine == "") | (np.char.lower(theirs) == np.char.lower(mine))
        else:
            same &= (mine < 0) | (theirs == mine)
    if "zcat_primary" in catalog.columns and len(rows):
        primary = catalog.values("zcat_primary", rows).astype(bool)
    rank = 2 * same + primary
    best = np.full(len(ids), -1)
    np.maximum.at(best, owner, rank)
    taken = (rank == best[owner]) & (same | (not strict))
    found = np.zeros(len(ids), bool)
    found[owner[taken]] = True
    return found, owner[taken], rows[taken]


def _pairs(
    start: Int64[np.ndarray, "n"], stop: Int64[np.ndarray, "n"]
) -> tuple[Int64[np.ndarray, "pairs"], Int64[np.ndarray, "pairs"]]:
    """Write out ranges: the number of each, and each of its members."""
    counts = stop - start
    owner = np.repeat(np.arange(len(start)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts - start, counts)


def _first(
    count: int, owner: Int64[np.ndarray, "pairs"], z: Float64[np.ndarray, "pairs"]
) -> tuple[Int64[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Give the first pair of each target, and whether its other pairs have another redshift."""
    first = np.minimum(np.searchsorted(owner, np.arange(count)), max(len(owner) - 1, 0))
    differs = np.zeros(count, bool)
    if len(owner):
        other = z[first][owner]
        differs[owner[(z != other) & ~(np.isnan(z) & np.isnan(other))]] = True
    return first, differs


def _take(
    table: dict[str, Any],
    found: Bool[np.ndarray, "n"],
    rows: Int64[np.ndarray, "pairs"],
    first: Int64[np.ndarray, "n"],
    differs: Bool[np.ndarray, "n"],
    default: str,
) -> Redshifts:
    def column(name: str, otherwise: Any) -> Shaped[np.ndarray, "n"]:
        blank = np.full(len(found), otherwise)
        return np.where(found, table[name][rows[first]], blank) if name in table and len(rows) else blank

    z = column("z", np.nan).astype(np.float64)
    z[differs | ~np.isfinite(z)] = np.nan
    kind = column("spectype", "") if "spectype" in table else np.where(found, default, "")
    zwarn = column("zwarn", 0).astype(np.int64)
    return Redshifts(found, z, zwarn, kind.astype("U6"), column("subtype", "").astype("U20"))
