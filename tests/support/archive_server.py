"""An archive on this machine that can misbehave, path by path, in the ways that archives and networks do.

It counts what it is asked and how many requests it serves at a time, so that tests can see the manners of a client.
"""

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Fault:
    """One way to misbehave; those that are not set are as they should be.

    Arguments:
        status: answer with this and no file.
        headers: sent with it.
        body: sent with it.
        send: bytes of the file that are sent before `then`, though the whole length is announced.
        then: "close" or "reset" the connection, or "stall" for the server's `stall` seconds.
        pieces: bytes sent at once, with `delay` s between them.
        delay: see `pieces`.
        corrupt: flip a bit in the middle.
        ranges: False ignores the Range header.
        validators: False sends neither ETag nor Last-Modified.
        length: False does not announce a length.
        honest: False takes every Range for granted, whatever If-Range says.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    send: int | None = None
    then: str = "close"
    pieces: int | None = None
    delay: float = 0.0
    corrupt: bool = False
    ranges: bool = True
    validators: bool = True
    length: bool = True
    honest: bool = True


HTML = Fault(200, {"Content-Type": "text/html; charset=utf-8"}, b"<!DOCTYPE html><html>Please log in</html>")


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    time: float


Answer = tuple[int, dict[str, str], bytes]


class ArchiveServer:
    """Serves files by path; `url` is its address."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.pages: dict[str, Callable[[Asked], Answer]] = {}
        self.asked: list[Asked] = []
        self.peak = 0
        self.stall = 5.0
        self._faults: dict[str, list[Fault]] = {}
        self._forever: dict[str, Fault] = {}
        self._active = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        # A client that breaks off, as some tests make it do, is no fault of the server's.
        self._server.handle_error = lambda request, address: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator["ArchiveServer"]:
        """Serve until the context is left."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def misbehave(self, path: str, *faults: Fault, forever: Fault | None = None) -> None:
        """Answer the next requests of a path with these faults, one each, and from then on with `forever`."""
        self._faults[path] = list(faults)
        if forever is not None:
            self._forever[path] = forever

    def behave(self) -> None:
        """End all faults, and forget what was asked."""
        self._faults.clear()
        self._forever.clear()
        self.asked.clear()
        self.peak = 0

    def paths(self, method: str = "GET") -> list[str]:
        """Give the paths that were asked for, in order."""
        with self._lock:
            return [one.path for one in self.asked if one.method == method]

    def next_fault(self, path: str) -> Fault:
        with self._lock:
            waiting = self._faults.get(path)
            return waiting.pop(0) if waiting else self._forever.get(path, Fault())

    @contextmanager
    def serving(self, asked: Asked) -> Iterator[None]:
        with self._lock:
            self.asked.append(asked)
            self._active += 1
            self.peak = max(self.peak, self._active)
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1


def etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'


def _handler(archive: ArchiveServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            asked = Asked(self.command, parts.path.lstrip("/"), query, dict(self.headers), body, time.monotonic())
            with archive.serving(asked):
                try:
                    self._answer(asked)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

        do_HEAD = do_POST = do_GET  # noqa: N815

        def _answer(self, asked: Asked) -> None:
            fault = archive.next_fault(asked.path)
            if fault.status != 200 or fault.body:
                self._whole(fault.status, fault.headers, fault.body)
            elif asked.path in archive.pages:
                self._whole(*archive.pages[asked.path](asked))
            elif asked.path in archive.files:
                self._file(asked, archive.files[asked.path], fault)
            else:
                self._whole(404, {"Content-Type": "text/html"}, b"<html>no such file</html>")

        def _whole(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _file(self, asked: Asked, content: bytes, fault: Fault) -> None:
            total, start = len(content), 0
            wanted = re.fullmatch(r"bytes=(\d+)-", asked.headers.get("Range", ""))
            current = asked.headers.get("If-Range", etag(content)) == etag(content) or not fault.honest
            if wanted and fault.ranges and current:
                start = int(wanted[1])
                if start >= total:
                    self._whole(416, {"Content-Range": f"bytes */{total}"}, b"")
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            else:
                self.send_response(200)
            if fault.validators:
                self.send_header("ETag", etag(content))
            for key, value in fault.headers.items():
                self.send_header(key, value)
            if fault.length:
                self.send_header("Content-Length", str(total - start))
            else:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            if asked.method == "HEAD":
                return
            if fault.corrupt:
                middle = total // 2
                content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            self._send(content[start:], fault)

        def _send(self, body: bytes, fault: Fault) -> None:
            sent = body if fault.send is None else body[: fault.send]
            step = fault.pieces or max(1, len(sent))
            for begin in range(0, len(sent), step):
                self.wfile.write(sent[begin : begin + step])
                self.wfile.flush()
                if fault.delay:
                    time.sleep(fault.delay)
            if fault.send is None:
                return
            self.close_connection = True
            if fault.then == "stall":
                time.sleep(archive.stall)
            if fault.then == "reset":
                # Lingering for no time makes the kernel send RST in place of FIN.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            return

    return Handler


class SparclService:
    """The part of SPARCL's interface that is used, with some spectra of one release behind it.

    Inner names of fields differ from the outer ones, as they may in the service.
    """

    INNER: ClassVar = {"redshift": "z_inner"}
    FIELDS = (
        *("sparcl_id", "specid", "targetid", "ra", "dec", "redshift", "redshift_warning", "spectype", "subtype"),
        *("data_release", "flux", "ivar", "mask", "wavelength"),
    )

    def __init__(self, records: list[dict[str, Any]], release: str = "DESI-DR1") -> None:
        self.records = records
        self.release = release
        self.damage: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda records: records

    def attach(self, server: ArchiveServer) -> None:
        """Answer at the addresses of the service."""
        server.pages |= {
            "api/datafields/": self._fields,
            "api/version/": lambda asked: (200, {}, b"13.0"),
            "api/find/": self._find,
            "api/spectras/": self._spectras,
        }

    def _inner(self, record: dict[str, Any], names: set[str]) -> dict[str, Any]:
        outer = {self.INNER.get(key, key): value for key, value in record.items()}
        return {"_dr": self.release} | {key: outer[key] for key in names & outer.keys()}

    def _fields(self, asked: Asked) -> Answer:
        rows = [
            {"data_release": self.release, "origdp": self.INNER.get(name, name), "newdp": name}
            | {"storage": "C", "default": True, "all": True}
            for name in self.FIELDS
        ]
        return _json(rows)

    def _find(self, asked: Asked) -> Answer:
        spec = json.loads(asked.body)
        chosen = self.records
        for key, *values in spec["search"]:
            name = {inner: outer for outer, inner in self.INNER.items()}.get(key, key)
            if name in ("redshift", "ra", "dec"):
                chosen = [record for record in chosen if values[0] <= record[name] <= values[1]]
            else:
                chosen = [record for record in chosen if record[name] in values]
        limit = asked.query.get("limit", "500")
        chosen = chosen if limit == "None" else chosen[: int(limit)]
        rows = [self._inner(record, set(spec["outfields"])) for record in chosen]
        return _json([{"status": {"success": True, "info": [], "warnings": []}}, *rows])

    def _spectras(self, asked: Asked) -> Answer:
        if asked.query.get("format") != "json":
            return 400, {"Content-Type": "application/json"}, b'{"errorMessage": "only json is spoken here"}'
        wanted = set(json.loads(asked.body))
        names = set(asked.query["include"].split(","))
        rows = [self._inner(record, names) for record in self.records if record["sparcl_id"] in wanted]
        return _json([{"status": {"success": True, "info": [], "warnings": []}}, *self.damage(rows)])


def _json(value: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
