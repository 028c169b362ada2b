"""The training spectra of a store: drawn, mixed and brought to the device, every worker its own share.

The validation set is drawn by a hash of the row, so that it does not depend on shards or workers. With n workers, a
worker's share is every n-th chunk. Its chunks come in a new order every epoch and are mixed sixteen at a time, which
makes batches nearly as varied as a shuffle of the whole survey and needs the memory of sixteen chunks; the next sixteen
are read meanwhile. Where the shares fit in memory, or on the GPU, they are held there and given out in the same order.
"""

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from distspec.config import Train
from distspec.statistics.holdout import held_out, limited
from distspec.statistics.summaries import Moments
from distspec.store import SpectraStore

__all__ = ["Feed", "Tensors"]

_MEAN_SAMPLE = 65_536
"""Spectra that the mean spectrum is taken from, spread evenly over the store."""

_POOL = 16
"""Chunks that are mixed before batches are drawn from them."""

_ABSURD = 1e3
"""Pixels beyond so many times the typical flux do not enter the mean spectrum."""

Tensors = tuple[Tensor, Tensor, Tensor]
"""flux [n, pixels] with masked pixels at zero, ivar [n, pixels], redshift [n] of lines on the grid (0 at rest)."""

Span = tuple[int, int]
"""First row of a chunk, and one past its last."""

Arrays = tuple[np.ndarray[Any, Any], ...]
"""Arrays with one row for each spectrum; the first holds their rows in the store."""


class Feed:
    """The batches of one worker.

    Arguments:
        path: of the store.
        settings: batch size, validation share, memory.
        seed: of the validation set, and of the order unless the settings have one of their own.
        rank: of this worker.
        world: number of workers.
        device: that batches are brought to.
        limit: largest number of training spectra; they come, with their neighbours of the validation set, from chunks
            that are drawn from the whole store. None takes all.
    """

    def __init__(
        self,
        path: str,
        settings: Train,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        limit: int | None = None,
    ) -> None:
        self.store = SpectraStore.open(path)
        self.device = torch.device(device)
        self._rank, self._world = rank, world
        self._seed = seed if settings.seed is None else settings.seed
        usable = self.store.column("status") == 0
        held = held_out(usable, settings.validation, seed)
        if limit is not None:
            usable = limited(usable, held, limit, self.store.chunk_rows, seed)
        self.training: Bool[np.ndarray, "rows"] = usable & ~held
        self.validation: Bool[np.ndarray, "rows"] = usable & held
        chunk = self.store.chunk_rows
        # A chunk never crosses a shard: shards are whole numbers of chunks.
        spans = [(start, min(start + chunk, self.store.rows)) for start in range(0, self.store.rows, chunk)]
        self._spans = [span for span in spans if usable[slice(*span)].any()]
        self._share = self._spans[rank::world]
        trainable = [span for span in self._share if self.training[slice(*span)].any()]
        # A worker whose share holds nothing to train on would never fill a batch, and the others would wait for it.
        self._trainable = trainable or [span for span in self._spans if self.training[slice(*span)].any()]
        size = int(usable.sum()) * self.store.grid.pixels * 8
        self._streamed = _Streamed(self.store, self.device)
        self._spectra: _Streamed | _Held = self._streamed
        if size <= settings.cache_gb * 1e9:
            self._spectra = _Held(self._streamed, sorted({*self._share, *self._trainable}), usable)
        self.batch = self.steps = 1
        self._set_batch(settings.batch)

    def with_batch(self, batch: int) -> "Feed":
        """Give the same spectra in batches of another size (over all workers); what is held in memory is shared."""
        other = copy.copy(self)
        other._set_batch(batch)
        return other

    def _set_batch(self, batch: int) -> None:
        rows = int(self.training.sum())
        self.batch = max(1, min(batch, rows) // self._world)
        self.steps = max(1, rows // (self.batch * self._world))

    def batches(self, epoch: int) -> Iterator[Tensors]:
        """Give this worker's training batches of an epoch; every worker gives the same number, `steps`."""
        rng = np.random.default_rng([self._seed, epoch, self._rank])
        pools = self._pools(rng.permutation(len(self._trainable)))
        left = self.steps
        waiting = self._spectra.load([], self.training)
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._spectra.load, next(pools), self.training)
            while left:
                new = coming.result()
                coming = reader.submit(self._spectra.load, next(pools), self.training)
                mixed = rng.permutation(len(waiting[0]) + len(new[0]))
                waiting = tuple(np.concatenate(pair)[mixed] for pair in zip(waiting, new, strict=True))
                while left and len(waiting[0]) >= self.batch:
                    yield self._spectra.bring(tuple(values[: self.batch] for values in waiting))
                    waiting = tuple(values[self.batch :] for values in waiting)
                    left -= 1

    def _pools(self, order: Int64[np.ndarray, "n"]) -> Iterator[list[Span]]:
        """Give sixteen chunks at a time; a share that is short begins again, so that no worker waits for another."""
        while True:
            for start in range(0, len(order), _POOL):
                yield [self._trainable[index] for index in order[start : start + _POOL]]

    def validation_batches(self) -> Iterator[Tensors]:
        """Give this worker's share of the validation set, in the store's order."""
        for _, batch in self.in_order(self.validation):
            yield batch

    def in_order(self, chosen: Bool[np.ndarray, "rows"]) -> Iterator[tuple[Int64[np.ndarray, "n"], Tensors]]:
        """Give the chosen spectra of this worker's share with their rows, chunk by chunk in the store's order."""
        for span in self._share:
            if chosen[slice(*span)].any():
                arrays = self._spectra.load([span], chosen)
                yield arrays[0], self._spectra.bring(arrays)

    def mean(self) -> Float32[Tensor, "pixels"]:
        """Give the mean spectrum of the training set, the same in every worker.

        A pixel far beyond the typical flux is left out: one cosmic ray of 1e30 in a million spectra would otherwise
        be the mean.
        """
        moments = Moments.zero(self.store.grid.pixels)
        wanted = max(1, _MEAN_SAMPLE // self.store.chunk_rows)
        for span in self._spans[:: max(1, len(self._spans) // wanted)]:
            _, flux, ivar, _ = self._streamed.load([span], self.training)
            good = ivar > 0
            if good.any():
                typical = np.median(np.abs(flux[good]))
                moments += Moments.of(flux, good & (np.abs(flux) <= _ABSURD * typical))
        return torch.from_numpy(moments.mean.astype(np.float32))


class _Streamed:
    """Spectra that are read from the store whenever they are needed."""

    def __init__(self, store: SpectraStore, device: torch.device) -> None:
        self.store, self.device = store, device

    def load(self, spans: Sequence[Span], chosen: Bool[np.ndarray, "rows"]) -> Arrays:
        """Read chunks and keep the chosen spectra: rows, flux, ivar, redshift."""
        pixels = self.store.grid.pixels
        kept = [np.flatnonzero(chosen[slice(*span)]) for span in spans]
        count = sum(len(inside) for inside in kept)
        rows, redshift = np.zeros(count, np.int64), np.zeros(count, np.float32)
        flux, ivar = (np.zeros((count, pixels), np.float32) for _ in range(2))
        start = 0
        for (first, last), inside in zip(spans, kept, strict=True):
            part = slice(start, start + len(inside))
            rows[part] = inside + first
            # As they are scored: with the statistics of the sample.
            spectra = self.store.between(first, last)
            flux[part], ivar[part] = spectra.flux[inside], spectra.ivar[inside]
            if spectra.redshift is not None:
                redshift[part] = spectra.redshift[inside]
            start = part.stop
        flux[ivar <= 0] = 0
        return rows, flux, ivar, redshift

    def bring(self, arrays: Arrays) -> Tensors:
        """Bring what was loaded to the device."""
        flux, ivar, redshift = (torch.from_numpy(values) for values in arrays[1:])
        if self.device.type == "cuda":
            # From pinned memory the copy runs beside the computation.
            flux, ivar, redshift = (t.pin_memory().to(self.device, non_blocking=True) for t in (flux, ivar, redshift))
        return flux, ivar, redshift


class _Held:
    """Spectra that are read once and stay on the device."""

    def __init__(self, source: _Streamed, spans: Sequence[Span], usable: Bool[np.ndarray, "rows"]) -> None:
        self._source, self._spans, self._usable = source, spans, usable
        self._place: Int64[np.ndarray, "rows"] | None = None
        self._tensors: Tensors | None = None

    def load(self, spans: Sequence[Span], chosen: Bool[np.ndarray, "rows"]) -> Arrays:
        """Give the rows of the chosen spectra alone."""
        rows = [np.flatnonzero(chosen[slice(*span)]) + span[0] for span in spans]
        return (np.concatenate([np.zeros(0, np.int64), *rows]),)

    def bring(self, arrays: Arrays) -> Tensors:
        """Pick rows from what is held."""
        place, tensors = self._held()
        index = torch.from_numpy(place[arrays[0]]).to(self._source.device)
        flux, ivar, redshift = (tensor.index_select(0, index) for tensor in tensors)
        return flux, ivar, redshift

    def _held(self) -> tuple[Int64[np.ndarray, "rows"], Tensors]:
        if self._place is None or self._tensors is None:
            (rows,) = self.load(self._spans, self._usable)
            self._place = np.full(len(self._usable), -1)
            self._place[rows] = np.arange(len(rows))
            pixels, device = self._source.store.grid.pixels, self._source.device
            shapes = ((len(rows), pixels), (len(rows), pixels), (len(rows),))
            flux, ivar, redshift = (torch.zeros(shape, device=device) for shape in shapes)
            for span in self._spans:
                arrays = self._source.load([span], self._usable)
                index = torch.from_numpy(self._place[arrays[0]]).to(device)
                for held, part in zip((flux, ivar, redshift), self._source.bring(arrays), strict=True):
                    held[index] = part
            self._tensors = (flux, ivar, redshift)
        return self._place, self._tensors
