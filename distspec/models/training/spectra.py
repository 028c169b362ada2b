"""Where the spectra of a feed come from: read from the store whenever they are needed, or held in memory.

Spectra that are read come through three kinds of threads. `train.readers` threads read the chunks of two pools side by
side, each into its place; one thread mixes: it copies the spectra of each batch out of the pool, into pinned memory
for a GPU, and sends them there; the one that trains finds them there. No more than two pools are in memory, and
`_CUT` batches. Which spectra are in a batch, and in what order, was settled before (`feed.py`), so that none of this
changes a bit.

Where chunks are read side by side each is decoded by the thread that reads it: the threads of `store/shard_files.py`
work on runs of several chunks.
"""

import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import cycle, islice
from typing import Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from distspec.models.transfer import Sent, Transfer
from distspec.store import SpectraStore, read_ahead

__all__ = ["POOL", "Held", "Pool", "Span", "Streamed", "Tensors"]

POOL: Final = 16
"""Chunks that are mixed before batches are drawn from them."""

_CUT: Final = 2
"""Batches that are cut ahead of the one that is given."""

Tensors = tuple[Tensor, ...]
"""flux [n, pixels] with masked pixels at zero, ivar [n, pixels], redshift [n] of lines on the grid (0 at rest)."""

Span = tuple[int, int]
"""First row of a chunk, and one past its last."""


class Pool(NamedTuple):
    """Chunks whose spectra are mixed, with those that the pool before has left over.

    Arguments:
        spans: the chunks.
        carried: number of spectra that were left over.
        order: of all, the carried ones counted first.
        batches: number that is cut from it; what is left over goes into the next pool.
    """

    spans: list[Span]
    carried: int
    order: Int64[np.ndarray, "n"]
    batches: int

    def cuts(self, batch: int) -> Iterator[Int64[np.ndarray, "batch"]]:
        """Give the places of each batch's spectra in the pool."""
        for start in range(0, self.batches * batch, batch):
            yield self.order[start : start + batch]

    def left(self, batch: int) -> Int64[np.ndarray, "left"]:
        """Give the places of what is left over."""
        return self.order[self.batches * batch :]


class Streamed:
    """Spectra that are read from the store whenever they are needed.

    Arguments:
        store: that holds them.
        device: that they are brought to.
        readers: threads that read.
    """

    def __init__(self, store: SpectraStore, device: torch.device, readers: int) -> None:
        self.store = store
        self._readers = readers
        self._own = threading.local()
        self._transfer = Transfer(device)

    @property
    def device(self) -> torch.device:
        """The device that spectra are brought to."""
        return self._transfer.device

    def batches(
        self, pools: Iterator[Pool], chosen: Bool[np.ndarray, "rows"], batch: int, steps: int
    ) -> Generator[Tensors, None, None]:
        """Give the batches of the pools, `steps` in all; the threads end with the generator."""
        with (
            closing(self._cut(pools, chosen, batch)) as cut,
            closing(read_ahead(lambda _: next(cut), range(steps), most=_CUT)) as coming,
        ):
            for sent in coming:
                yield self._transfer.receive(sent)

    def in_order(
        self, spans: Sequence[Span], chosen: Bool[np.ndarray, "rows"]
    ) -> Generator[tuple[Int64[np.ndarray, "n"], Tensors], None, None]:
        """Give the chosen spectra of each chunk, with their rows, chunk after chunk."""

        def send(span: Span) -> tuple[Int64[np.ndarray, "n"], Sent]:
            rows, spectra = self.load(span, chosen)
            return rows, self._transfer.send(spectra)

        with closing(read_ahead(send, spans, self._readers, self._readers)) as coming:
            for rows, sent in coming:
                yield rows, self._transfer.receive(sent)

    def load(self, span: Span, chosen: Bool[np.ndarray, "rows"]) -> tuple[Int64[np.ndarray, "n"], Tensors]:
        """Read a chunk and give the rows of the chosen spectra, and these, in memory."""
        rows = _rows(chosen, span)
        room = self._room(len(rows), self._transfer.pinned)
        self._fill(span, rows, room)
        return rows, room

    def _cut(self, pools: Iterator[Pool], chosen: Bool[np.ndarray, "rows"], batch: int) -> Generator[Sent, None, None]:
        """Read pools side by side and cut the batches; asked for these by the thread that mixes."""
        most = batch + POOL * self.store.chunk_rows
        rooms = cycle([self._room(most), self._room(most)])
        reader = ThreadPoolExecutor(self._readers, thread_name_prefix="distspec-reader")
        begun: deque[tuple[Pool, Tensors, list[Future[None]]]] = deque()

        def begin() -> None:
            for pool in islice(pools, 1):
                room, place, reads = next(rooms), pool.carried, []
                for span in pool.spans:
                    rows = _rows(chosen, span)
                    reads.append(reader.submit(self._fill, span, rows, _part(room, place, len(rows))))
                    place += len(rows)
                begun.append((pool, room, reads))

        try:
            begin()
            begin()
            while begun:
                pool, room, reads = begun.popleft()
                for read in reads:
                    read.result()
                for places in pool.cuts(batch):
                    cut = self._room(batch, self._transfer.pinned)
                    _copy(room, places, cut)
                    yield self._transfer.send(cut)
                if begun:
                    after, into, _ = begun[0]
                    _copy(room, pool.left(batch), _part(into, 0, after.carried))
                # Into the room that is free now.
                begin()
        finally:
            reader.shutdown(cancel_futures=True)

    def _fill(self, span: Span, rows: Int64[np.ndarray, "n"], room: Tensors) -> None:
        """Read a chunk and put some of its spectra where there is room for so many."""
        # As they are scored: with the statistics of the sample.
        spectra = self.store.between(*span, rooms=self._scratch(span[1] - span[0]))
        redshift = np.zeros(len(spectra)) if spectra.redshift is None else spectra.redshift
        found = spectra.flux, spectra.ivar, redshift.astype(np.float32)
        _copy(tuple(map(torch.from_numpy, found)), rows - span[0], room)
        flux, ivar, _ = (values.numpy() for values in room)
        # The same as `flux[ivar <= 0] = 0` where flux may be NaN, at five times its rate: 0 and 1 times the bits.
        bits = flux.view(np.int32)
        np.multiply(bits, ~(ivar <= 0), out=bits)

    def _scratch(self, count: int) -> list[Float32[np.ndarray, "count pixels"]]:
        """Give this thread's memory for flux and ivar of a chunk: fresh memory would cost more than to read."""
        held: Float32[np.ndarray, "2 rows pixels"] | None = getattr(self._own, "scratch", None)
        if held is None:
            held = self._own.scratch = np.empty((2, self.store.chunk_rows, self.store.grid.pixels), np.float32)
        return [values[:count] for values in held]

    def _room(self, count: int, pinned: bool = False) -> Tensors:
        pixels = self.store.grid.pixels
        flux, ivar, redshift = (
            torch.empty(shape, pin_memory=pinned) for shape in ((count, pixels), (count, pixels), (count,))
        )
        return flux, ivar, redshift


class Held:
    """Spectra that are read once and stay on the device.

    Arguments:
        source: that reads them.
        spans: chunks that are held.
        usable: spectra of these that are.
    """

    def __init__(self, source: Streamed, spans: Sequence[Span], usable: Bool[np.ndarray, "rows"]) -> None:
        self._source, self._spans, self._usable = source, spans, usable
        self._place: Int64[np.ndarray, "rows"] | None = None
        self._tensors: Tensors | None = None

    def batches(
        self, pools: Iterator[Pool], chosen: Bool[np.ndarray, "rows"], batch: int, steps: int
    ) -> Generator[Tensors, None, None]:
        """Give the batches of the pools, `steps` in all."""
        left = np.zeros(0, np.int64)
        for pool in pools:
            rows = np.concatenate([left, *(_rows(chosen, span) for span in pool.spans)])
            for places in pool.cuts(batch):
                yield self._pick(rows[places])
            left = rows[pool.left(batch)]

    def in_order(
        self, spans: Sequence[Span], chosen: Bool[np.ndarray, "rows"]
    ) -> Generator[tuple[Int64[np.ndarray, "n"], Tensors], None, None]:
        """Give the chosen spectra of each chunk, with their rows, chunk after chunk."""
        for span in spans:
            rows = _rows(chosen, span)
            yield rows, self._pick(rows)

    def _pick(self, rows: Int64[np.ndarray, "n"]) -> Tensors:
        place, tensors = self._held()
        index = torch.from_numpy(place[rows]).to(self._source.device)
        return tuple(tensor.index_select(0, index) for tensor in tensors)

    def _held(self) -> tuple[Int64[np.ndarray, "rows"], Tensors]:
        if self._place is None or self._tensors is None:
            rows = np.concatenate([np.zeros(0, np.int64), *(_rows(self._usable, span) for span in self._spans)])
            self._place = np.full(len(self._usable), -1)
            self._place[rows] = np.arange(len(rows))
            pixels, device = self._source.store.grid.pixels, self._source.device
            shapes = ((len(rows), pixels), (len(rows), pixels), (len(rows),))
            tensors = tuple(torch.zeros(shape, device=device) for shape in shapes)
            start = 0
            for part, spectra in self._source.in_order(self._spans, self._usable):
                for held, values in zip(tensors, spectra, strict=True):
                    held[start : start + len(part)] = values
                start += len(part)
            self._tensors = tensors
        return self._place, self._tensors


def _rows(chosen: Bool[np.ndarray, "rows"], span: Span) -> Int64[np.ndarray, "n"]:
    return np.flatnonzero(chosen[slice(*span)]) + span[0]


def _part(tensors: Tensors, start: int, count: int) -> Tensors:
    return tuple(values[start : start + count] for values in tensors)


def _copy(source: Tensors, places: Int64[np.ndarray, "n"], to: Tensors) -> None:
    """Copy some rows, in one thread: those of torch are the training's."""
    for values, into in zip(source, to, strict=True):
        # Places are right; to clip them is the mode that needs no memory between.
        np.take(values.numpy(), places, axis=0, out=into.numpy(), mode="clip")
