"""The training spectra of a store: drawn, mixed and brought to the device, every worker its own share.

The validation set is drawn by a hash of the row, so that it does not depend on shards or workers. With n workers, a
worker's share is every n-th chunk. Its chunks come in a new order every epoch and are mixed sixteen at a time, which
makes batches nearly as varied as a shuffle of the whole survey and needs the memory of sixteen chunks; the next sixteen
are read meanwhile (`spectra.py`). Where a worker's shares fit in memory, or on the GPU, they are held there and given
out in the same order.
"""

import copy
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import cycle

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from distspec.config import Train
from distspec.models.training.spectra import POOL, Held, Pool, Streamed, Tensors
from distspec.statistics.holdout import held_out, limited
from distspec.statistics.summaries import Moments
from distspec.store import SpectraStore

__all__ = ["Feed"]

_MEAN_SAMPLE = 65_536
"""Spectra that the mean spectrum is taken from, spread evenly over the store."""

_ABSURD = 1e3
"""Pixels beyond so many times the typical flux do not enter the mean spectrum."""


class Feed:
    """The batches of one worker.

    Arguments:
        path: of the store.
        settings: batch size, validation share, memory, threads.
        seed: of the validation set, and of the order unless the settings have one of their own.
        rank: of this worker.
        world: number of workers.
        device: that batches are brought to.
        limit: largest number of training spectra; they come, with their neighbours of the validation set, from chunks
            that are drawn from the whole store. None takes all.
        feeds: number of feeds among which this worker's memory is divided.
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
        feeds: int = 1,
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
        held_spans = sorted({*self._share, *self._trainable})
        size = sum(int(usable[slice(*span)].sum()) for span in held_spans) * self.store.grid.pixels * 8
        self._streamed = Streamed(self.store, self.device, settings.readers)
        self._spectra: Streamed | Held = self._streamed
        if size <= settings.cache_gb * 1e9 / feeds:
            self._spectra = Held(self._streamed, held_spans, usable)
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

    def batches(self, epoch: int) -> Generator[Tensors, None, None]:
        """Give this worker's training batches of an epoch; every worker gives the same number, `steps`."""
        return self._spectra.batches(self._pools(epoch), self.training, self.batch, self.steps)

    def _pools(self, epoch: int) -> Iterator[Pool]:
        """Give the chunks of an epoch, sixteen at a time and as many as fill its steps."""
        rng = np.random.default_rng([self._seed, epoch, self._rank])
        chunks = rng.permutation(len(self._trainable))
        left, carried = self.steps, 0
        # A share that is short begins again, so that no worker waits for another.
        for start in cycle(range(0, len(chunks), POOL)):
            spans = [self._trainable[index] for index in chunks[start : start + POOL]]
            count = carried + sum(int(self.training[slice(*span)].sum()) for span in spans)
            batches = min(left, count // self.batch)
            yield Pool(spans, carried, rng.permutation(count), batches)
            left, carried = left - batches, count - batches * self.batch
            if not left:
                return

    def validation_batches(self) -> Generator[Tensors, None, None]:
        """Give this worker's share of the validation set, in the store's order."""
        with closing(self.in_order(self.validation)) as found:
            for _, batch in found:
                yield batch

    def in_order(
        self, chosen: Bool[np.ndarray, "rows"]
    ) -> Generator[tuple[Int64[np.ndarray, "n"], Tensors], None, None]:
        """Give the chosen spectra of this worker's share with their rows, chunk by chunk in the store's order."""
        return self._spectra.in_order([span for span in self._share if chosen[slice(*span)].any()], chosen)

    def mean(self) -> Float32[Tensor, "pixels"]:
        """Give the mean spectrum of the training set, the same in every worker.

        A pixel far beyond the typical flux is left out: one cosmic ray of 1e30 in a million spectra would otherwise
        be the mean.
        """
        moments = Moments.zero(self.store.grid.pixels)
        wanted = max(1, _MEAN_SAMPLE // self.store.chunk_rows)
        for span in self._spans[:: max(1, len(self._spans) // wanted)]:
            _, spectra = self._streamed.load(span, self.training)
            flux, ivar, _ = (values.numpy() for values in spectra)
            good = ivar > 0
            if good.any():
                typical = np.median(np.abs(flux[good]))
                moments += Moments.of(flux, good & (np.abs(flux) <= _ABSURD * typical))
        return torch.from_numpy(moments.mean.astype(np.float32))
