"""One file of an archive: resumed where it stopped, verified, and put in place only when it is whole.

While a file comes it is `.NAME.partial`, with `.NAME.partial.json` beside it that says which version of the remote file
it is a part of; a run that is killed loses nothing but its last piece. Whole is what agrees with the checksum that the
archive publishes; where it publishes none, the length that it announced and the structure of FITS.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from distspec.errors import SourceError
from distspec.sources.archives.manifest import Entry, Failure, Manifest, replace_whole, writing
from distspec.sources.archives.transfer import AgainError, Client, GoneError, RefusedError, StoppedError, chunks
from distspec.sources.files.fits import FitsFile
from distspec.sources.files.places import Files

__all__ = ["Checksums", "Downloads", "Outcome", "Remote", "parse_checksums", "sha256_of"]

LIST_LIMIT: Final = 64 << 20

ALGORITHMS: Final = {64: "sha256", 40: "sha1", 32: "md5"}
"""Checksums by the number of their hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A file that is wanted.

    Arguments:
        paths: where it can be, relative to the archive's root, in the order in which they are tried.
        checksums: path of the archive's list of checksums of its folder, or None where there is none.
    """

    paths: tuple[str, ...]
    checksums: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of some files or spectra; adds up."""

    fetched: int = 0
    there: int = 0
    failed: tuple[Failure, ...] = ()

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(self.fetched + other.fetched, self.there + other.there, self.failed + other.failed)


def parse_checksums(text: str) -> dict[str, tuple[str, str]]:
    """Read the lines of `sha256sum` and its kin.

    Returns:
        Algorithm and hexadecimal checksum by file name, without folders.

    Example:
        >>> parse_checksums("d41d8cd98f00b204e9800998ecf8427e *a/b.fits")
        {'b.fits': ('md5', 'd41d8cd98f00b204e9800998ecf8427e')}
    """
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r"([0-9a-fA-F]{32,64}) [ *](\S.*)", line.strip())
        if match and len(match[1]) in ALGORITHMS:
            found[PurePosixPath(match[2]).name] = ALGORITHMS[len(match[1])], match[1].lower()
    return found


class Checksums:
    """The lists of checksums of an archive; each is asked for once.

    Arguments:
        client: asks.
        base: address of the archive's root.
        given: a list of one's own, in place of the archive's.

    Raises:
        SourceError: the list of one's own cannot be read.
    """

    def __init__(self, client: Client, base: str, given: str | None = None) -> None:
        self._client = client
        self._base = base
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._lists: dict[str, dict[str, tuple[str, str]]] = {}
        self._given = None if given is None else _read_list(given)

    def of(self, path: str, listing: str | None) -> tuple[str, str] | None:
        """Give the algorithm and checksum that the archive states for a file, or None where it states none.

        Raises:
            RefusedError: there is a list and it cannot be had.
        """
        name = PurePosixPath(path).name
        if self._given is not None:
            return self._given.get(name)
        if listing is None:
            return None
        with self._lock:
            lock = self._locks.setdefault(listing, threading.Lock())
        with lock:
            if listing not in self._lists:
                self._lists[listing] = self._ask(listing)
        return self._lists[listing].get(name)

    def _ask(self, listing: str) -> dict[str, tuple[str, str]]:
        try:
            text = self._client.read("GET", f"{self._base}/{listing}", LIST_LIMIT).decode("utf-8", "replace")
        except GoneError:
            return {}
        except RefusedError as error:
            raise RefusedError(f"the list of checksums {PurePosixPath(listing).name}: {error}") from error
        found = parse_checksums(text)
        if text.strip() and not found:
            raise RefusedError(
                f"{PurePosixPath(listing).name} begins {text.strip()[:40]!r}; expected a list of checksums"
            )
        return found


def _read_list(path: str) -> dict[str, tuple[str, str]]:
    try:
        found = parse_checksums(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read ({error}); expected a list of checksums") from error
    if not found:
        raise SourceError(f"no checksum in {path}; expected lines as sha1sum writes them")
    return found


@dataclass(frozen=True)
class Downloads:
    """Brings files of one archive into one folder.

    Arguments:
        client: asks.
        base: address of the archive's root.
        folder: receives the archive's own tree.
        manifest: of the folder.
        checksums: of the archive.
        check: read what is there again, and replace what is no longer what was fetched.
    """

    client: Client
    base: str
    folder: Path
    manifest: Manifest
    checksums: Checksums
    check: bool = False

    def __call__(self, remote: Remote) -> Outcome:
        """Bring a file unless it is there.

        Raises:
            SourceError: the folder cannot be written.
            StoppedError: the run is ending.
        """
        if any(self._is_there(path) for path in remote.paths):
            return Outcome(there=1)
        reason: RefusedError = GoneError("nothing to try")
        for path in remote.paths:
            try:
                return self._bring(path, remote.checksums)
            except GoneError as gone:
                reason = gone
            except RefusedError as refused:
                reason = refused
                break
        return Outcome(failed=(Failure(remote.paths[0], str(reason)),))

    def _is_there(self, path: str) -> bool:
        entry, target = self.manifest.get(path), self.folder / path
        if entry is None or not target.is_file() or target.stat().st_size != entry.bytes:
            return False
        return not self.check or sha256_of(target) == entry.sha256

    def _bring(self, path: str, listing: str | None) -> Outcome:
        target = self.folder / path
        # A link inside the folder must not lead a write out of it.
        if not target.resolve().is_relative_to(self.folder.resolve()):
            raise RefusedError("the path leaves the folder; expected no links in it")
        stated = self.checksums.of(path, listing)
        url = f"{self.base}/{path}"
        if target.exists() and self.manifest.get(path) is None:
            return self._adopt(path, url, stated)
        with writing(self.folder):
            target.parent.mkdir(parents=True, exist_ok=True)
        arriving = _Arriving(self.client, url, target, stated, self._put)
        self.client.persist(arriving, arriving.size)
        return Outcome(fetched=1)

    def _adopt(self, path: str, url: str, stated: tuple[str, str] | None) -> Outcome:
        """Take a file into the manifest that came in another way, if it is the archive's; never replace it."""
        target = self.folder / path
        if stated is not None:
            if digests_of(target, stated[0])[stated[0]] != stated[1]:
                raise RefusedError("a file of this name is there and is not the archive's; move it away")
        else:
            length = self.client.persist(lambda: self._length(url))
            if length != target.stat().st_size:
                raise RefusedError(
                    f"a file of this name is there with {target.stat().st_size} bytes; the archive's has {length}: "
                    "move it away"
                )
            _require_fits(target)
        self._put(path, url, target, stated)
        return Outcome(there=1)

    def _length(self, url: str) -> int | None:
        with self.client.ask("HEAD", url) as response:
            return _number(response.headers.get("Content-Length"))

    def _put(self, path: str | None, url: str, file: Path, stated: tuple[str, str] | None) -> None:
        """Enter a verified file in the manifest and give it its name."""
        path = path or url.removeprefix(f"{self.base}/")
        sha256 = sha256_of(file)
        known = self.manifest.get(path)
        if known is not None and known.sha256 != sha256:
            file.unlink()
            raise RefusedError(
                f"the archive's file is another one than on {known.time}; take its line out of fetch.csv to accept it"
            )
        entry = Entry(path, url, file.stat().st_size, sha256, stated[0] if stated else "none")
        if known is None:
            self.manifest.add(entry)
        with writing(self.folder):
            os.replace(file, self.folder / path)


Put = Callable[[str | None, str, Path, tuple[str, str] | None], None]


class _Arriving:
    """A file on its way; called once for each attempt."""

    def __init__(self, client: Client, url: str, target: Path, stated: tuple[str, str] | None, put: Put) -> None:
        self._client = client
        self._url = url
        self._target = target
        self._stated = stated
        self._put = put
        self._partial = target.with_name(f".{target.name}.partial")
        self._version = target.with_name(f".{target.name}.partial.json")
        self._damaged = False

    def size(self) -> int:
        """Bytes that have come."""
        return self._partial.stat().st_size if self._partial.exists() else 0

    def __call__(self) -> None:
        """Bring what is missing, verify the whole and put it in place.

        Raises:
            AgainError: it broke off, or came damaged for the first time.
            RefusedError: it is not what it should be.
        """
        total = self._receive()
        if total is not None and self.size() != total:
            found = self.size()
            if found > total:
                self._discard()
            raise AgainError(f"{found} of {total} bytes came")
        try:
            self._verify()
        except (RefusedError, SourceError) as error:
            self._discard()
            # A second copy with the same damage is no accident of the line.
            if self._damaged:
                raise RefusedError(str(error)) from error
            self._damaged = True
            raise AgainError(str(error)) from error
        self._put(None, self._url, self._partial, self._stated)
        with writing(self._target.parent):
            self._version.unlink(missing_ok=True)

    def _receive(self) -> int | None:
        """Ask for the rest of the file, or all of it, and keep what comes.

        Returns:
            The length of the whole file, where the archive says it.
        """
        offset, version = self.size(), self._read_version()
        if offset and not (version.get("validator") or self._stated):
            # Nothing could tell whether the rest belongs to the same version.
            offset = 0
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        if offset and version.get("validator"):
            headers["If-Range"] = version["validator"]
        with self._client.ask("GET", self._url, headers) as response:
            total = _total(response)
            if response.status_code == 416:
                if total == offset and offset:
                    return total
                self._discard()
                raise AgainError("the archive refuses to resume the file")
            if response.status_code == 206:
                begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
                known = version.get("validator")
                changed = known is not None and _validator(response) not in (None, known)
                if begins is None or int(begins[1]) != offset or changed:
                    self._discard()
                    raise AgainError("the archive's file changed while it came")
            else:
                offset = 0
                self._begin(response)
            self._keep(response, offset)
            return total

    def _begin(self, response: Any) -> None:
        """Start from the first byte: forget an older part, and note which version this is."""
        kind = response.headers.get("Content-Type", "")
        if kind.lower().startswith("text/html"):
            raise RefusedError("a web page came in place of the file: a login, a proxy or an error page")
        with writing(self._target.parent):
            self._partial.unlink(missing_ok=True)
            replace_whole(self._version, json.dumps({"url": self._url, "validator": _validator(response)}).encode())

    def _keep(self, response: Any, offset: int) -> None:
        with writing(self._target.parent):
            file = self._partial.open("ab" if offset else "wb")
        try:
            for chunk in chunks(response):
                if self._client.gate.stopped:
                    raise StoppedError
                if offset == 0 and re.match(rb"\s*<(!doctype|html|\?xml|head)", chunk[:200], re.IGNORECASE):
                    self._discard()
                    raise RefusedError("a web page came in place of the file: a login, a proxy or an error page")
                offset += len(chunk)
                with writing(self._target.parent):
                    file.write(chunk)
                    file.flush()  # a kill loses nothing that has come
        finally:
            with writing(self._target.parent), file:
                file.flush()
                os.fsync(file.fileno())

    def _verify(self) -> None:
        if self._stated is None:
            _require_fits(self._partial)
            return
        algorithm, wanted = self._stated
        found = digests_of(self._partial, algorithm)[algorithm]
        if found != wanted:
            raise RefusedError(f"its {algorithm} is {found[:12]}…; the archive's list says {wanted[:12]}…")

    def _read_version(self) -> dict[str, Any]:
        try:
            version = json.loads(self._version.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return version if isinstance(version, dict) and version.get("url") == self._url else {}

    def _discard(self) -> None:
        with writing(self._target.parent):
            self._partial.unlink(missing_ok=True)
            self._version.unlink(missing_ok=True)


def _validator(response: Any) -> str | None:
    """Give what names the version of a file in If-Range: a strong ETag, else the time of its last change."""
    tag: str | None = response.headers.get("ETag")
    if tag and not tag.startswith("W/"):
        return tag
    changed: str | None = response.headers.get("Last-Modified")
    return changed


def _total(response: Any) -> int | None:
    """Give the length of the whole file, or None where the archive does not say it."""
    if response.status_code == 200:
        return _number(response.headers.get("Content-Length"))
    return _number(response.headers.get("Content-Range", "").rpartition("/")[2])


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdigit() else None


def _require_fits(path: Path) -> None:
    with FitsFile(Files(str(path.parent), "a FITS file"), path.name):
        pass


def digests_of(path: Path, *algorithms: str) -> dict[str, str]:
    """Compute checksums of a file in one pass, in hexadecimal."""
    sums = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            for one in sums.values():
                one.update(block)
    return {name: one.hexdigest() for name, one in sums.items()}


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    return digests_of(path, "sha256")["sha256"]
