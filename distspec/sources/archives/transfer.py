"""HTTP with manners: few connections, a bounded rate, waits that grow, and the archive's own wishes come first.

All threads of a run share one `Client`; its `Gate` decides when the next request may go out, so that one answer
"too many requests" slows all of them.
"""

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar

import requests
import urllib3

from distspec import __version__
from distspec.config import Transfer

__all__ = ["AgainError", "Client", "Gate", "GoneError", "RefusedError", "StoppedError", "chunks"]

CHUNK: Final = 1 << 18

ENOUGH: Final = 1 << 20
"""Bytes that an attempt must bring to count as progress."""

REDIRECTS: Final = 5

TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504})

Result = TypeVar("Result")


class RefusedError(Exception):
    """This will not come, however often it is asked for; the message says why."""


class GoneError(RefusedError):
    """The archive has nothing at this address."""


class StoppedError(Exception):
    """The run is ending; nothing more is asked for."""


class AgainError(Exception):
    """This attempt failed and another may succeed.

    Attributes:
        after: wait that the archive asks for, s, or None.
    """

    after: float | None = None


class Gate:
    """Lets requests out at a bounded rate; closes when the archive is down or wants to be left alone."""

    def __init__(self, settings: Transfer) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._next = 0.0
        self._in_a_row = 0
        self._closed: str | None = None
        self._stop = threading.Event()

    @property
    def stopped(self) -> bool:
        """True once the run is ending."""
        return self._stop.is_set()

    def stop(self) -> None:
        """End all waiting at once."""
        self._stop.set()

    def wait(self) -> None:
        """Wait for this thread's turn.

        Raises:
            RefusedError: the gate is closed.
            StoppedError: the run is ending.
        """
        while True:
            with self._lock:
                if self._closed is not None:
                    raise RefusedError(f"not tried: {self._closed}")
                now = time.monotonic()
                if self._next <= now:
                    self._next = now + 1 / self._settings.per_second
                    return
                pause = self._next - now
            # A pause may have been asked for meanwhile, so that the turn is not taken in advance.
            self.sleep(pause)

    def sleep(self, seconds: float) -> None:
        """Wait, but not beyond the end of the run.

        Raises:
            StoppedError: the run is ending.
        """
        if self._stop.wait(seconds):
            raise StoppedError

    def pause(self, seconds: float) -> None:
        """Hold all requests back for some time."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def close(self, reason: str) -> None:
        """Let no further request out; the first reason counts."""
        with self._lock:
            self._closed = self._closed or reason

    def answered(self) -> None:
        """Note that the archive is alive."""
        with self._lock:
            self._in_a_row = 0

    def unanswered(self, reason: str) -> None:
        """Note that all attempts at something failed; after some in a row the archive is taken to be down."""
        with self._lock:
            self._in_a_row += 1
            in_a_row = self._in_a_row
        if in_a_row >= self._settings.give_up:
            self.close(f"{in_a_row} in a row failed, the last with: {reason}")


class Client:
    """Asks an archive.

    Arguments:
        settings: rates, waits and patience.
    """

    def __init__(self, settings: Transfer) -> None:
        self.gate = Gate(settings)
        self._settings = settings
        self._local = threading.local()
        self._lock = threading.Lock()
        self._live: set[requests.Response] = set()

    @contextmanager
    def ask(self, method: str, url: str, headers: dict[str, str] | None = None, **more: Any) -> Iterator[Any]:
        """Send one request when it is its turn, and give the response with its body unread.

        Arguments:
            method: GET, HEAD or POST.
            url: the address.
            headers: beyond the usual ones.
            more: `params` and `json` of `requests.request`.

        Raises:
            AgainError: the connection failed, here or while the body was read, or the archive is busy.
            RefusedError: the archive refuses, or the address leads nowhere.
        """
        self.gate.wait()
        patience = (self._settings.connect_timeout, self._settings.stall_timeout)
        # The bytes on disk must be those that the archive counts and sums.
        headers = {"Accept-Encoding": "identity"} | (headers or {})
        try:
            with self._session().request(
                method, url, headers=headers, stream=True, timeout=patience, allow_redirects=True, **more
            ) as response:
                with self._lock:
                    self._live.add(response)
                try:
                    _judge(url, response)
                    yield response
                finally:
                    with self._lock:
                        self._live.discard(response)
        except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL) as error:
            raise RefusedError(f"led to an address that is neither http nor https ({_line(error)})") from error
        except requests.TooManyRedirects as error:
            raise RefusedError(_line(error)) from error
        except (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
            if self.gate.stopped:
                raise StoppedError from error
            raise AgainError(_line(error)) from error

    def read(self, method: str, url: str, most: int, **more: Any) -> bytes:
        """Give the whole body of a small answer, with as many attempts as are allowed.

        Arguments:
            method: GET or POST.
            url: the address.
            most: bytes beyond which it is refused.
            more: `params` and `json` of `requests.request`.

        Raises:
            RefusedError: it cannot be had.
        """

        def attempt() -> bytes:
            with self.ask(method, url, **more) as response:
                body = bytearray()
                for chunk in chunks(response):
                    body += chunk
                    if len(body) > most:
                        raise RefusedError(f"the answer is longer than {most >> 20} MiB; expected a short one")
                return bytes(body)

        return self.persist(attempt)

    def persist(self, attempt: Callable[[], Result], arrived: Callable[[], int] = lambda: 0) -> Result:
        """Repeat an attempt that asks to be repeated, with growing waits.

        Arguments:
            attempt: the work.
            arrived: bytes that are kept from one attempt to the next.

        Raises:
            RefusedError: no attempt succeeded.
            StoppedError: the run is ending.
        """
        settings = self._settings
        left, wait = settings.attempts, settings.backoff
        while True:
            before = arrived()
            try:
                result = attempt()
            except AgainError as again:
                if arrived() - before >= ENOUGH:
                    left, wait = settings.attempts, settings.backoff
                else:
                    left -= 1
                if left <= 0:
                    self.gate.unanswered(str(again))
                    raise RefusedError(f"{again} ({settings.attempts} attempts)") from again
                if again.after is None:
                    self.gate.sleep(random.uniform(wait / 2, wait))
                    wait = min(2 * wait, settings.longest_wait)
                elif again.after > settings.longest_wait:
                    self.gate.close(f"the archive asks to wait {again.after:.0f} s; repeat the command then")
                    raise RefusedError(str(again)) from again
                else:
                    self.gate.pause(again.after)
            except RefusedError:
                self.gate.answered()
                raise
            else:
                self.gate.answered()
                return result

    def stop(self) -> None:
        """End all waiting and reading at once: the run is ending."""
        self.gate.stop()
        with self._lock:
            live = list(self._live)
        for response in live:
            # Wakes a thread that waits for bytes; closing the response from here would not.
            end = getattr(response.raw, "shutdown", None)
            if end is not None:
                try:
                    end()
                except (OSError, ValueError, RuntimeError):
                    continue  # it has just ended by itself

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            # requests knows http and https only: a redirect to anything else is refused.
            session = self._local.session = requests.Session()
            session.max_redirects = REDIRECTS
            session.headers["User-Agent"] = f"distspec/{__version__} {requests.utils.default_user_agent()}"
        return session


def chunks(response: requests.Response) -> Iterator[bytes]:
    """Give the body piece by piece, each as soon as it has come over the line.

    Raises:
        RefusedError: it is compressed although that was declined.
    """
    coding = response.headers.get("Content-Encoding", "identity").lower()
    if coding not in ("identity", ""):
        raise RefusedError(f"the archive sends the file compressed ({coding}); expected it as it is")
    # Not `stream`, which holds back what has come until a whole piece is there: a stall or a kill would lose it.
    while piece := response.raw.read1(CHUNK, decode_content=False):
        yield piece


def _judge(url: str, response: requests.Response) -> None:
    """Raise what the status asks for."""
    if url.startswith("https:") and any(not step.url.startswith("https:") for step in (*response.history, response)):
        raise RefusedError("redirected from https to http; expected an encrypted connection throughout")
    status = response.status_code
    if status in (200, 206, 416):
        return
    said = f"HTTP {status} {response.reason or ''}".rstrip()
    if status in (404, 410):
        raise GoneError(f"{said}: not in the archive")
    if status not in TRANSIENT:
        raise RefusedError(f"{said}{_words(response)}")
    again = AgainError(f"{said}{_words(response)}")
    again.after = _retry_after(response.headers.get("Retry-After"))
    raise again


def _retry_after(value: str | None) -> float | None:
    """Read the wait that an archive asks for, s: a number, or a date."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _words(response: requests.Response) -> str:
    """Give the beginning of what a refusal says, without markup."""
    try:
        body = response.raw.read(2_000, decode_content=True)
    except (urllib3.exceptions.HTTPError, OSError):
        return ""
    words = " ".join(re.sub(r"(?s)<(style|script)\b.*?</\1>|<[^>]*>", " ", body.decode("utf-8", "replace")).split())
    return f" ({words[:160]})" if words else ""


def _line(error: Exception) -> str:
    """Say in a few words what a library says in many."""
    inner: BaseException = error
    while inner.args and isinstance(inner.args[-1], BaseException):
        inner = inner.args[-1]
    reason = getattr(inner, "reason", None)
    text = str(reason if isinstance(reason, BaseException) else inner)
    return " ".join(text.split())[:200] or type(error).__name__
