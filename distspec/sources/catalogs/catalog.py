"""Selection from catalogues larger than memory: FITS tables or separated text, read by chunks of rows.

What a condition keeps is sorted by key and written once as plain arrays, which all processes of a machine then map
and share: a worker holds no more of a catalogue of fifty million rows than the pages that it touches.
"""

import hashlib
import json
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from distspec.addresses import BucketPath, Place, absolute
from distspec.config import Wanted
from distspec.errors import SourceError
from distspec.sources.catalogs.rows import Chunk, Rows, kind_of, open_rows
from distspec.sources.catalogs.selection import Best, passes
from distspec.sources.files.places import Files

__all__ = ["Catalog", "locate", "stamp_of"]

_BLOCK = 1 << 18

_SCHEMA = 1

_FACTS = "catalog.json"
"""What says of the arrays beside it what they are; written last."""


def locate(catalog: str, root: str) -> str:
    """Find a catalogue that settings name: by itself, or in the folder of the spectra.

    Raises:
        SourceError: it is in neither place.
    """
    if "://" in catalog or Path(catalog).is_file():
        return catalog
    if "://" in root:
        if Files(root, "a catalog").has(catalog):
            return f"{root.rstrip('/')}/{catalog}"
    elif (Path(root) / catalog).is_file():
        return str(Path(root) / catalog)
    raise SourceError(f"no catalog file {catalog!r}; expected a table, here or in {root!r}")


@dataclass(frozen=True)
class Catalog:
    """Selected rows of a catalogue, in the order of their keys; rows of equal keys in the order of the file.

    Arguments:
        folder: where the arrays lie.
        keys: names of the columns, lower case, that identify a row.
        columns: names of the columns that were kept, lower case.
        table: name of the table in the file, upper case; empty where it has none.
    """

    folder: Path
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    table: str

    @classmethod
    def build(
        cls, path: str, keys: tuple[str, ...], columns: tuple[str, ...], wanted: Wanted, scratch: Place
    ) -> "Catalog":
        """Select rows, or open what another process has selected already.

        Arguments:
            path: a FITS file, plain or gzipped, or separated text with a line of names; local or a URL.
            keys: columns of integers that identify a row: one of 64 bits, or several that share 63.
            columns: columns to keep, those of them that there are.
            wanted: conditions, and how many of the highest are taken.
            scratch: place that all workers see; from a bucket each machine takes a copy.

        Raises:
            ConfigError: a condition names a column that is not there, or does not suit its kind.
            SourceError: the file is damaged, lacks a key, or a key is not an exact integer.
        """
        size, changed = stamp_of(path)
        facts = [_SCHEMA, absolute(path), size, changed, keys, columns, wanted.model_dump(mode="json")]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        kept = scratch / "catalogs" / digest
        folder = kept if isinstance(kept, Path) else _own_folder() / digest
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{digest}.", dir=folder.parent))
            try:
                if isinstance(kept, Path) or not (kept / _FACTS).is_file():
                    _distil(path, keys, columns, wanted, part)
                else:
                    _download(kept, part)
                part.chmod(0o755)
                # Another process may have been quicker; its arrays are the same.
                with suppress(OSError):
                    os.rename(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        if not isinstance(kept, Path) and not (kept / _FACTS).is_file():
            _upload(folder, kept)
        try:
            facts_kept = json.loads((folder / _FACTS).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise SourceError(f"{folder}: cannot be read ({error}); remove the folder to make it again") from error
        return cls(folder, keys, tuple(facts_kept["columns"]), facts_kept["table"])

    def __getstate__(self) -> dict[str, Any]:
        # Mapped arrays would be copied whole.
        return {key: self.__dict__[key] for key in self.__dataclass_fields__}

    def __len__(self) -> int:
        return len(self._packed)

    def find(self, *keys: Int64[np.ndarray, "n"]) -> tuple[Bool[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
        """Say which of these are in the catalogue, and where the first row of each stands (0 where there is none)."""
        start, stop = self.span(*keys)
        found = stop > start
        return found, np.where(found, start, 0)

    def span(self, *keys: Int64[np.ndarray, "n"]) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
        """Give the first row and one past the last row of each of these keys, or beginnings of keys.

        Both are equal where there is none.
        """
        rest = len(self.keys) - len(keys)
        low, valid = pack((*keys, *[np.zeros_like(keys[0])] * rest))
        high, _ = pack((*keys, *[np.full_like(keys[0], (1 << 63 // len(self.keys)) - 1)] * rest))
        start = np.searchsorted(self._packed, low, "left")
        return start, np.where(valid, np.searchsorted(self._packed, high, "right"), start)

    def outside(self, *keys: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "m"]:
        """Give the rows that none of these keys, or beginnings of keys, reaches."""
        start, stop = self.span(*keys)
        reached = np.zeros(len(self) + 1, np.int64)
        np.add.at(reached, start, 1)
        np.add.at(reached, stop, -1)
        return np.flatnonzero(np.cumsum(reached)[:-1] <= 0)

    def key(self, name: str) -> Int64[np.ndarray, "rows"]:
        """Give one of the key columns of all rows."""
        number = len(self.keys)
        if number == 1:
            return np.array(self._packed)
        bits = 63 // number
        shift = bits * (number - 1 - self.keys.index(name))
        return (self._packed >> shift) & ((1 << bits) - 1)

    def values(self, name: str, positions: Int64[np.ndarray, "n"]) -> Shaped[np.ndarray, "n ..."]:
        """Give a kept column at these rows; text as str."""
        column = self._arrays[name]
        if not len(column):
            column = np.zeros((1, *column.shape[1:]), column.dtype)
        taken = np.asarray(column[positions])
        return np.char.decode(taken, "utf-8") if taken.dtype.kind == "S" else taken

    @cached_property
    def _packed(self) -> Int64[np.ndarray, "rows"]:
        return _map(self.folder / "keys.npy")

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: _map(self.folder / f"{number}.npy") for number, name in enumerate(self.columns)}


def pack(keys: tuple[Int64[np.ndarray, "n"], ...]) -> tuple[Int64[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Put several integers exactly into one, and say where that can be done; one alone stays as it is."""
    if len(keys) == 1:
        return np.asarray(keys[0], np.int64), np.ones(len(keys[0]), bool)
    bits = 63 // len(keys)
    packed = np.zeros(len(keys[0]), np.int64)
    valid = np.ones(len(packed), bool)
    for key in keys:
        fits = (key >= 0) & (key < 1 << bits)
        valid &= fits
        packed = packed << bits | np.where(fits, key, 0)
    return packed, valid


def _map(path: Path) -> np.ndarray:
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read ({error}); remove the folder to make it again") from error
    return found


def _own_folder() -> Path:
    """Give this user's folder for copies from buckets on this machine."""
    folder = Path(tempfile.gettempdir()) / f"distspec-catalogs-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise SourceError(f"{folder} belongs to somebody else; set TMPDIR to a folder of yours")
    return folder


def _download(kept: BucketPath, folder: Path) -> None:
    for file in kept.iterdir():
        file.download(folder / file.name)


def _upload(folder: Path, kept: BucketPath) -> None:
    """Put a distilled catalogue into a bucket; what makes it one comes last."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name == _FACTS):
        (kept / file.name).upload(file)


def stamp_of(path: str) -> tuple[int, int]:
    """Give size and time of change (ns since 1970) of a file, here or at a URL.

    Raises:
        SourceError: there is none.
    """
    if "://" not in path:
        try:
            facts = os.stat(path)
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror}; expected a catalog") from error
        return facts.st_size, facts.st_mtime_ns
    (entry,) = Files(path, "a catalog").list(("",))
    return entry.size, entry.changed


def _distil(path: str, keys: tuple[str, ...], columns: tuple[str, ...], wanted: Wanted, folder: Path) -> None:
    with open_rows(path, keys, columns, wanted) as rows:
        kept = tuple(name for name in columns if name in rows.names)
        spools = {name: _Spool(folder / f"{number}.spool") for number, name in enumerate(kept)}
        key_spool, rank_spool = _Spool(folder / "keys.spool", np.int64), _Spool(folder / "rank.spool")
        best = Best(wanted.limit) if wanted.limit is not None else None
        for chunk in rows.chunks():
            packed, kept_rows = _pass(chunk, keys, wanted, rows)
            if best is not None and wanted.highest is not None:
                rank = chunk.numbers(wanted.highest.lower())
                kept_rows = kept_rows[best.may_take(rank[kept_rows])]
                rank_spool.write(rank[kept_rows])
            key_spool.write(packed[kept_rows])
            for name, spool in spools.items():
                spool.write(chunk.kept(name)[kept_rows])
        table = rows.table
    order = _order(key_spool, rank_spool, wanted)
    _settle(key_spool, order, folder / "keys.npy")
    for number, name in enumerate(kept):
        _settle(spools[name], order, folder / f"{number}.npy", rows.settle(name))
    for spool in (key_spool, rank_spool, *spools.values()):
        spool.path.unlink(missing_ok=True)
    facts = {"source": path, "columns": kept, "table": table}
    (folder / _FACTS).write_text(json.dumps(facts), "utf-8")


def _pass(
    chunk: Chunk, keys: tuple[str, ...], wanted: Wanted, rows: Rows
) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "m"]]:
    """Give the keys of a chunk, and which of its rows meet the conditions."""
    good = np.ones(len(chunk), bool)
    for condition in wanted.where:
        good &= passes(condition, chunk, rows.place)
    if wanted.highest is not None:
        good &= ~chunk.missing[wanted.highest.lower()]
    for key in keys:
        good &= ~chunk.missing[key]
    found = tuple(chunk.columns[key] for key in keys)
    for name, values in zip(keys, found, strict=True):
        if values.dtype.kind not in "iu" or values.ndim != 1:
            raise SourceError(f"{rows.place}: {name.upper()} holds {kind_of(values)}; expected one integer a row")
    packed, valid = pack(tuple(values.astype(np.int64) for values in found))
    if (good & ~valid).any():
        row = int(np.flatnonzero(good & ~valid)[0])
        shown = ", ".join(f"{name.upper()} {column[row]}" for name, column in zip(keys, found, strict=True))
        raise SourceError(f"{rows.place}: {shown}; expected numbers from 0 to {(1 << 63 // len(keys)) - 1}")
    return packed, np.flatnonzero(good)


def _order(keys: "_Spool", rank: "_Spool", wanted: Wanted) -> Int64[np.ndarray, "rows"]:
    """Sort the kept rows by key, and take the highest ones where that is asked for; ties go to the smaller key."""
    packed = keys.whole(np.dtype(np.int64))
    if wanted.limit is None or len(packed) <= wanted.limit:
        return np.argsort(packed, kind="stable")
    chosen = np.lexsort((packed, -rank.whole(np.dtype(np.float64))))[: wanted.limit]
    chosen.sort()
    return np.asarray(chosen[np.argsort(packed[chosen], kind="stable")])


def _settle(spool: "_Spool", order: Int64[np.ndarray, "rows"], path: Path, kind: np.dtype[Any] | None = None) -> None:
    """Write a spooled column in its order as one array."""
    out = None
    for start in range(0, max(len(order), 1), _BLOCK):
        block = spool.take(order[start : start + _BLOCK])
        if kind is not None:
            block = _convert(block, kind)
        if out is None:
            shape = (len(order), *block.shape[1:])
            # Typed in some versions of numpy only.
            open_memmap: Any = np.lib.format.open_memmap
            out = open_memmap(path, "w+", block.dtype, shape)
        out[start : start + len(block)] = block
    assert out is not None
    out.flush()


def _convert(text: Shaped[np.ndarray, "n"], kind: np.dtype[Any]) -> Shaped[np.ndarray, "n"]:
    if kind.kind == "f":
        text = np.where(text == b"", b"nan", text)
    return text.astype(kind)


class _Spool:
    """A column on its way to disk: chunks one after the other, of one kind but perhaps growing widths of text."""

    def __init__(self, path: Path, kind: type = np.float64) -> None:
        self.path = path
        self._kind: np.dtype[Any] = np.dtype(kind)  # of a table without rows
        self._parts: list[tuple[int, np.dtype[Any], tuple[int, ...], int]] = []
        self._bytes = 0
        path.touch()

    def write(self, values: Shaped[np.ndarray, "n ..."]) -> None:
        """Append a chunk."""
        if values.dtype.kind == "U":
            values = np.char.encode(values, "utf-8")
        values = np.ascontiguousarray(values)
        with self.path.open("ab") as file:
            file.write(values.tobytes())
        self._parts.append((len(values), values.dtype, values.shape[1:], self._bytes))
        self._bytes += values.nbytes

    def whole(self, kind: np.dtype[Any]) -> Shaped[np.ndarray, "rows"]:
        """Give all of a column of one kind."""
        return np.fromfile(self.path, kind)

    def take(self, rows: Int64[np.ndarray, "n"]) -> Shaped[np.ndarray, "n ..."]:
        """Give these rows, in this order."""
        kind = max((part[1] for part in self._parts), key=lambda kind: kind.itemsize, default=self._kind)
        shape = self._parts[0][2] if self._parts else ()
        total = sum(part[0] for part in self._parts)
        if not len(rows) or all(part[1] == kind for part in self._parts):
            every = np.memmap(self.path, kind, "r", 0, (total, *shape)) if len(rows) else np.zeros((0, *shape), kind)
            return np.asarray(every[rows])
        out = np.zeros((len(rows), *shape), kind)
        edges = np.cumsum([0, *(part[0] for part in self._parts)])
        owner = np.searchsorted(edges, rows, "right") - 1
        for number in np.unique(owner):
            count, own, tail, offset = self._parts[number]
            mapped = np.memmap(self.path, own, "r", offset, (count, *tail))
            mine = owner == number
            out[mine] = mapped[rows[mine] - edges[number]]
        return out
