"""The FITS file that was read last, left open: a file of many spectra is read by runs of rows, one after the other."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Generic, TypeVar

from distspec.sources.files.fits import FitsFile
from distspec.sources.files.places import Files

__all__ = ["KeptFile"]

T = TypeVar("T")


class KeptFile(Generic[T]):
    """Opens files, one at a time, and goes on with the one that is open if it is asked for again and has not changed.

    Arguments:
        files: where the files lie.
        find: finds what is to be known of a file before its rows are read; called once a file.
    """

    def __init__(self, files: Files, find: Callable[[FitsFile, str], T]) -> None:
        self._files, self._find = files, find
        self._held: tuple[str, object, FitsFile, T] | None = None

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[FitsFile, T]]:
        """Give a file and what was found in it; it stays open, unless there is an error.

        Raises:
            SourceError: as `FitsFile` and its context do.
        """
        state = self._files.state(name)
        if self._held is None or self._held[:2] != (name, state):
            self.close()
            file = FitsFile(self._files, name)
            with ExitStack() as stack:
                stack.push(file)
                self._held = name, state, file, self._find(file, name)
                stack.pop_all()
        held, self._held = self._held, None
        with ExitStack() as stack:
            stack.push(held[2])
            yield held[2:]
            stack.pop_all()
        self._held = held

    def close(self) -> None:
        """Close the file that is open, if one is."""
        if self._held is not None:
            self._held[2].__exit__(None, None, None)
            self._held = None
