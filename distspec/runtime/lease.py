"""A lock in a bucket: an object that whoever holds it changes again and again, and that others may take over once it
stands still.

No clock is compared with another machine's: who finds the lock held watches it for `EXPIRES` seconds of its own. What
changes meanwhile is alive; what does not has been left by a run that was killed. Each change is a conditional put, so
of two that take it over one succeeds.
"""

import _thread
import json
import os
import platform
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

from distspec.addresses import BucketPath
from distspec.errors import BucketError, ConfigError, StoreError

__all__ = ["held"]

RENEW: Final = 15.0
"""Seconds between two changes by whoever holds a lock."""

EXPIRES: Final = 60.0
"""Seconds without a change after which it is free."""

_FREE: Final = b"{}"
"""What a lock is when nobody holds it; nothing is deleted, since no condition can be put on that."""


@contextmanager
def held(path: BucketPath, what: str) -> Iterator[None]:
    """Hold a lock; the main thread is interrupted if it is lost.

    Arguments:
        path: of the lock.
        what: is locked, for messages.

    Raises:
        ConfigError: another run holds it, or the bucket knows no conditions.
        StoreError: it was lost meanwhile, since the bucket did not answer or another run took it.
    """
    lease = _Lease(path, what)
    lease.take()
    ended = threading.Event()
    renewer = threading.Thread(target=lease.renew, args=(ended,), name="distspec-lease", daemon=True)
    renewer.start()
    try:
        yield
    except KeyboardInterrupt:
        if lease.lost:
            raise StoreError(f"the lock of {what} was lost ({lease.lost}); run the same command again") from None
        raise
    finally:
        ended.set()
        renewer.join()
        lease.release()


class _Lease:
    def __init__(self, path: BucketPath, what: str) -> None:
        # Asked with less patience than others have until they take it over.
        self._path, self._what = replace(path, seconds=RENEW), what
        self._mine = {"run": uuid.uuid4().hex, "host": platform.node(), "process": os.getpid()}
        self._changes = 0
        self._tag: str | None = None
        self.lost = ""

    def take(self) -> None:
        try:
            self._tag = self._standing()
            if not self._put():
                raise ConfigError(f"another run is at work in {self._what}; wait for it or choose another")
        except BucketError as error:
            raise ConfigError(f"cannot write to {self._what}: {error}") from error

    def _standing(self) -> str | None:
        """Give the tag of a lock that nobody holds; None where there is none.

        Raises:
            ConfigError: somebody holds it.
        """
        try:
            content, tag = self._path.read_tagged()
        except FileNotFoundError:
            return None
        if content == _FREE:
            return tag
        holder = _told(content)
        print(
            f"distspec: {self._what} is locked by {holder}; looking for up to {EXPIRES:g} s whether it is at work",
            file=sys.stderr,
            flush=True,
        )
        begun = time.monotonic()
        while time.monotonic() - begun < EXPIRES:
            time.sleep(1.0)
            try:
                content, now = self._path.read_tagged()
            except FileNotFoundError:
                return None
            if content == _FREE:
                return now
            if now != tag:
                raise ConfigError(f"another run is at work in {self._what} ({holder}); wait for it or choose another")
        return tag

    def _put(self) -> bool:
        """Change the lock if it is as it was; tell whether it was."""
        self._changes += 1
        content = json.dumps(self._mine | {"changes": self._changes}).encode()
        tag = self._path.put_over(content, self._tag)
        if tag is None:
            try:
                # An answer may have been lost on its way, and the put done twice.
                found, now = self._path.read_tagged()
            except FileNotFoundError:
                return False
            if found != content:
                return False
            tag = now
        self._tag = tag
        return True

    def renew(self, ended: threading.Event) -> None:
        renewed = time.monotonic()
        while not ended.wait(RENEW):
            try:
                if not self._put():
                    self.lost = "another run has taken it"
                renewed = time.monotonic()
            except BucketError as error:
                if time.monotonic() - renewed > EXPIRES - RENEW:
                    self.lost = str(error)
            if self.lost:
                _thread.interrupt_main(signal.SIGINT)
                return

    def release(self) -> None:
        if self.lost:
            return
        try:
            self._path.put_over(_FREE, self._tag)
        except BucketError as error:
            print(
                f"distspec: the lock could not be released: {error}; the next run waits {EXPIRES:g} s for it",
                file=sys.stderr,
                flush=True,
            )


def _told(content: bytes) -> str:
    try:
        found: Any = json.loads(content)
        return f"a run on {found['host']}, process {found['process']}"
    except (ValueError, KeyError, TypeError):
        return "a run that does not say where"
