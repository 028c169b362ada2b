"""NOIRLab's SPARCL service: spectra found by constraints or ids, taken in batches, kept as Parquet tables.

The service is asked for JSON over its own HTTP interface, and not through its Python client, because that client
unpickles what the server sends, and so would run whatever a server, or whoever stands in its place, puts there.

Tables have the columns that `sources/table.py` reads: object_id (the survey's own id of the spectrum, specid; int64,
exact), sparcl_id, specid, targetid, ra, dec (deg), z, zwarn, class, subclass, data_release, and the lists flux, ivar,
mask and wavelength (Å).

References:
    Juneau et al. 2024, https://arxiv.org/abs/2401.05576
    https://github.com/astro-datalab/sparclclient (the requests and the names of fields)
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distspec.config import FetchSparcl
from distspec.errors import ConfigError, SourceError
from distspec.files import replacing
from distspec.sources.archives.download import Outcome, sha256_of
from distspec.sources.archives.ids import integers, read_rows
from distspec.sources.archives.manifest import Entry, Failure, Manifest, writing
from distspec.sources.archives.transfer import Client, RefusedError

__all__ = ["Batches", "list_sparcl"]

ANSWER_LIMIT: Final = 256 << 20

IDS_AT_ONCE: Final = 1_000
"""Ids that are looked up in one request."""

PER_ID: Final = 20
"""Most spectra of one id that are expected: an id of the survey need not be unique."""

UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

SCALARS: Final[dict[str, tuple[tuple[str, ...], pa.DataType]]] = {
    # The first name under which the table source looks for an id.
    "object_id": (("specid",), pa.int64()),
    "sparcl_id": (("sparcl_id",), pa.string()),
    "specid": (("specid",), pa.int64()),
    "targetid": (("targetid",), pa.int64()),
    "ra": (("ra",), pa.float64()),
    "dec": (("dec",), pa.float64()),
    "z": (("redshift",), pa.float64()),
    "zwarn": (("redshift_warning",), pa.int64()),
    "class": (("spectype",), pa.string()),
    "subclass": (("subtype", "subclass"), pa.string()),
    "data_release": (("data_release",), pa.string()),
}
"""Columns of a table: SPARCL's names for each, and its type."""

ARRAYS: Final[dict[str, Any]] = {"wavelength": np.float64, "flux": np.float32, "ivar": np.float32, "mask": np.int64}

REQUIRED: Final = ("sparcl_id", "specid", "wavelength", "flux", "ivar")


def list_sparcl(settings: FetchSparcl, batches: "Batches") -> tuple[list[list[str]], Outcome]:
    """Find what is wanted and cut what is not there yet into batches.

    Returns:
        Batches of SPARCL's ids, and what is there already or does not exist.

    Raises:
        ConfigError: the list or the constraints cannot be used.
        SourceError: the service does not answer.
    """
    try:
        ids, missing = batches.find(settings)
    except RefusedError as error:
        raise SourceError(f"SPARCL does not answer: {error}; try again later or mend the request") from error
    there = batches.there()
    pending = [one for one in ids if one not in there]
    cut = [pending[start : start + settings.batch] for start in range(0, len(pending), settings.batch)]
    return cut, Outcome(there=len(ids) - len(pending), failed=tuple(missing))


@dataclass(frozen=True)
class Batches:
    """Takes batches of spectra into a folder.

    Arguments:
        client: asks.
        url: address of the service.
        release: one of its data sets.
        folder: receives a table for each batch.
        manifest: of the folder.
        check: read the tables that are there again.
    """

    client: Client
    url: str
    release: str
    folder: Path
    manifest: Manifest
    check: bool = False
    _names: dict[str, str] = field(default_factory=dict)
    """SPARCL's inner name of each field of the release; filled when first needed."""

    def find(self, settings: FetchSparcl) -> tuple[list[str], list[Failure]]:
        """Give SPARCL's ids of what is wanted, sorted, and what of a list does not exist.

        Raises:
            ConfigError: the list or the constraints cannot be used.
            RefusedError: the service does not answer.
        """
        self._learn_names()
        if settings.ids is None:
            wrong = sorted(set(settings.where) - set(self._names))
            if wrong:
                raise ConfigError(f"where.{wrong[0]} is no field of {self.release}; see the field catalogue of SPARCL")
            search = [[self._names[name], *values] for name, values in settings.where.items()]
            found = self._search(search, ["sparcl_id"], settings.limit)
            return sorted({str(one["sparcl_id"]) for one in found}), []
        given: dict[str, list[Any]] = {"sparcl_id": [], "specid": [], "targetid": []}
        for rows in read_rows(settings.ids, [("sparcl_id",), ("specid",), ("targetid",)]):
            name = next(iter(rows))
            if name == "sparcl_id":
                given[name] += [str(one).strip().lower() for one in rows[name].tolist()]
            else:
                given[name] += integers(rows, name, -(1 << 63), (1 << 63) - 1, settings.ids)
        name = next(name for name in given if given[name])
        ids = sorted(set(given[name]))
        if len(ids) > settings.limit:
            raise ConfigError(f"{settings.ids} names {len(ids)} spectra; limit is {settings.limit}: raise it")
        if name == "sparcl_id":
            wrong = [one for one in ids if not UUID.fullmatch(one)]
            if wrong:
                raise ConfigError(f"{settings.ids}: sparcl_id is {wrong[0]!r}; expected SPARCL's own ids (UUID)")
            return ids, []
        return self._look_up(name, ids)

    def _look_up(self, name: str, ids: list[int]) -> tuple[list[str], list[Failure]]:
        found: dict[str, int] = {}
        wanted = iter(ids)
        while some := list(islice(wanted, IDS_AT_ONCE)):
            rows = self._search([[self._names[name], *some]], ["sparcl_id", name], len(some) * PER_ID)
            found |= {str(row["sparcl_id"]): int(row[name]) for row in rows}
        missing = sorted(set(ids) - set(found.values()))
        return sorted(found), [Failure(f"{name} {one}", f"not in {self.release}") for one in missing]

    def there(self) -> set[str]:
        """Give SPARCL's ids of all spectra in the tables that are there; a damaged table is put aside."""
        found: set[str] = set()
        for entry in self.manifest:
            path = self.folder / entry.name
            if path.suffix != ".parquet" or not path.is_file():
                continue
            if path.stat().st_size != entry.bytes or (self.check and sha256_of(path) != entry.sha256):
                # Its spectra come again, in other tables perhaps; it must not stay where a source would find it.
                with writing(self.folder):
                    path.rename(path.with_name(f".{path.name}.damaged"))
                continue
            found.update(pq.read_table(path, columns=["sparcl_id"])["sparcl_id"].to_pylist())
        return found

    def __call__(self, ids: list[str]) -> Outcome:
        """Take one batch.

        Raises:
            SourceError: the folder cannot be written.
            StoppedError: the run is ending.
        """
        fields = [name for names, _ in SCALARS.values() for name in names] + list(ARRAYS)
        there = sorted({self._names[name] for name in fields if name in self._names})
        parameters = {"include": ",".join(there), "format": "json", "dataset_list": self.release}
        url = f"{self.url}/api/spectras/"
        try:
            records = self._records(url, parameters, ids)
        except RefusedError as error:
            return Outcome(failed=tuple(Failure(one, str(error)) for one in ids))
        good, failed = [], []
        for one in ids:
            reason = _flaw(records.get(one))
            if reason:
                failed.append(Failure(one, reason))
            else:
                good.append(records[one])
        if good:
            self._write(good, url)
        return Outcome(fetched=len(good), failed=tuple(failed))

    def _write(self, records: list[dict[str, Any]], url: str) -> None:
        digest = hashlib.sha256("\n".join(record["sparcl_id"] for record in records).encode()).hexdigest()[:16]
        path = self.folder / f"{self.release}-{digest}.parquet"
        with writing(self.folder), replacing(path) as partial:
            pq.write_table(_table(records), partial, compression="zstd")
            self.manifest.add(Entry(path.name, url, partial.stat().st_size, sha256_of(partial), "none"))

    def _learn_names(self) -> None:
        fields = self._ask("GET", f"{self.url}/api/datafields/")
        releases = sorted({str(one.get("data_release")) for one in fields})
        self._names.update({str(f["newdp"]): str(f["origdp"]) for f in fields if f["data_release"] == self.release})
        if self.release not in releases:
            raise ConfigError(f"no release {self.release!r} in SPARCL; expected one of {', '.join(releases)}")
        missing = [name for name in REQUIRED if name not in self._names]
        if missing:
            raise ConfigError(f"{self.release} has no field {missing[0]!r} in SPARCL; choose another release")

    def _search(self, search: list[list[Any]], names: list[str], most: int) -> list[dict[str, Any]]:
        """Find records; an answer that is cut off is refused, since nothing says which are missing."""
        inner = [self._names[name] for name in names]
        # One more than is wanted, so that an answer that is cut off can be told from one that just fits.
        release = [self._names.get("data_release", "data_release"), self.release]
        spec = {"outfields": inner, "search": [release, *search]}
        answer = self._ask("POST", f"{self.url}/api/find/", params={"limit": most + 1}, json=spec)
        rows = [self._plain(row) for row in answer[1:]]
        if len(rows) > most:
            raise ConfigError(f"more than {most} spectra are found; narrow the constraints, or raise limit")
        if any(name not in row for row in rows for name in names):
            raise RefusedError(f"the service's answer lacks {' or '.join(names)}")
        return rows

    def _records(self, url: str, parameters: dict[str, str], ids: list[str]) -> dict[str, dict[str, Any]]:
        answer = self._ask("POST", url, params=parameters, json=ids)
        return {str(row.get("sparcl_id")): row for row in map(self._plain, answer[1:])}

    def _ask(self, method: str, url: str, **more: Any) -> list[dict[str, Any]]:
        body = self.client.read(method, url, ANSWER_LIMIT, **more)
        try:
            answer = json.loads(body)
        except ValueError:
            raise RefusedError(f"the service sends {body[:40]!r}; expected JSON") from None
        if not isinstance(answer, list) or not answer or not all(isinstance(row, dict) for row in answer):
            raise RefusedError(f"the service answers {str(answer)[:120]}; expected a list of records")
        return answer

    def _plain(self, record: dict[str, Any]) -> dict[str, Any]:
        """Give a record by the outer names of its fields."""
        outer = {inner: name for name, inner in self._names.items()}
        return {outer.get(key, key): value for key, value in record.items()}


def _flaw(record: dict[str, Any] | None) -> str | None:
    """Say what keeps a record from being used, or None."""
    if record is None:
        return "not in the service's answer"
    if _cast(record.get("specid"), pa.int64()) is None:
        return f"specid is {record.get('specid')!r}; expected a whole number of 64 bits"
    lengths = {name: len(record[name]) for name in ARRAYS if isinstance(record.get(name), list)}
    absent = [name for name in REQUIRED[2:] if name not in lengths]
    if absent:
        return f"comes without {absent[0]}"
    if len(set(lengths.values())) > 1 or not lengths["flux"]:
        return f"arrays have lengths {lengths}; expected equal ones"
    return None


def _table(records: Sequence[dict[str, Any]]) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    for column, (names, kind) in SCALARS.items():
        found = [next((record[name] for name in names if record.get(name) is not None), None) for record in records]
        columns[column] = pa.array([_cast(value, kind) for value in found], kind)
    for name, number in ARRAYS.items():
        if all(record.get(name) is not None for record in records):
            columns[name] = _lists([np.array(record[name], number) for record in records])
    return pa.table(columns)


def _cast(value: Any, kind: pa.DataType) -> Any:
    """Give a value as its column holds it; a whole number that is no int64 stays away rather than rounded."""
    if value is None:
        return None
    if kind == pa.string():
        return str(value)
    if kind == pa.float64():
        return float(value)
    # Through text, since ids come as numbers from one release and as text from another.
    text = str(value).strip()
    return int(text) if text.removeprefix("-").isdigit() and -(1 << 63) <= int(text) < 1 << 63 else None


def _lists(arrays: list[np.ndarray]) -> pa.Array:
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(arrays)))
