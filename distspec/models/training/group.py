"""Who adds up over workers: fits see their own rows only, and merge sums through one of these."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "Alone", "Group", "OnlyHere", "Shares", "Together"]


_PIECE = 1 << 22
"""Values that are added up at once."""


class Group(Protocol):
    """Merges tensors over workers; every worker calls the same methods in the same order."""

    def sum(self, values: Tensor) -> Tensor:
        """Give the sum over workers, the same on each."""

    def minimum(self, values: Tensor) -> Tensor:
        """Give the least over workers."""

    def maximum(self, values: Tensor) -> Tensor:
        """Give the greatest over workers."""

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate the workers' rows, whose numbers may differ, in the order of the workers."""

    def broadcast(self, values: Tensor) -> Tensor:
        """Give the first worker's values; shapes must agree."""


class Alone:
    """One worker has it all."""

    def sum(self, values: Tensor) -> Tensor:
        """Give the values."""
        return values

    minimum = maximum = gather = broadcast = sum  # noqa: A003


class OnlyHere(Alone):
    """One of several workers does what follows by itself, without the others."""


@dataclass(frozen=True)
class Shares:
    """A fixed number of shares of the work, dealt to however many workers there are at the moment.

    What is computed of a share depends on its number alone, and shares are added up in their order: so sums are the
    same in every bit for any number of workers.

    Arguments:
        count: of shares; no less than workers.
        rank: of this worker.
        world: number of workers, of a `torch.distributed` process group if there is more than one.
    """

    count: int
    rank: int = 0
    world: int = 1

    @property
    def mine(self) -> range:
        """Numbers of this worker's shares."""
        return range(self.rank, self.count, self.world)

    def sum(self, parts: Sequence[Tensor]) -> Tensor:
        """Add up over all shares, one after the other.

        Arguments:
            parts: of this worker's shares, in their order and of one shape.
        """
        return self._sum_flat(torch.stack([part.flatten() for part in parts])).view_as(parts[0])

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        """Concatenate the rows of all shares, whose numbers may differ, in the order of the shares."""
        lengths = torch.zeros(self.count, dtype=torch.int64, device=parts[0].device)
        for share, part in zip(self.mine, parts, strict=True):
            lengths[share] = len(part)
        joined = torch.cat(list(parts))
        if self.world == 1:
            return joined
        together = Together()
        counts = together.sum(lengths).tolist()
        order = [share for rank in range(self.world) for share in range(rank, self.count, self.world)]
        pieces = dict(zip(order, torch.split(together.gather(joined), [counts[share] for share in order]), strict=True))
        return torch.cat([pieces[share] for share in range(self.count)])

    def _sum_flat(self, own: Tensor) -> Tensor:
        """Add up [shares of this worker, values]; by pieces, since the parts of all shares are held at once."""
        total = torch.empty_like(own[0])
        for start in range(0, own.shape[1], _PIECE):
            part = own[:, start : start + _PIECE]
            pieces = self._everyones(part) if self.world > 1 else part
            added = pieces[0].clone()
            for share in range(1, self.count):
                added += pieces[share]
            total[start : start + _PIECE] = added
        return total

    def _everyones(self, part: Tensor) -> Tensor:
        """Give the values of all shares [shares, values]."""
        most = -(-self.count // self.world)
        # Collectives want equal shapes.
        padded = part.new_zeros(most, part.shape[1])
        padded[: len(part)] = part
        found = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(found, padded)
        return torch.stack([found[share % self.world][share // self.world] for share in range(self.count)])


class Together:
    """Workers of a `torch.distributed` process group (gloo or nccl)."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def sum(self, values: Tensor) -> Tensor:
        """Give the sum over workers."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def minimum(self, values: Tensor) -> Tensor:
        """Give the least over workers."""
        return self._reduce(values, dist.ReduceOp.MIN)

    def maximum(self, values: Tensor) -> Tensor:
        """Give the greatest over workers."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate the workers' rows."""
        workers = dist.get_world_size(self.group)
        own = torch.tensor([len(values)], device=values.device)
        lengths = [torch.zeros_like(own) for _ in range(workers)]
        dist.all_gather(lengths, own, group=self.group)
        rows = [int(length) for length in lengths]
        # Collectives want equal shapes.
        padded = values.new_zeros(max(rows), *values.shape[1:])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(workers)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    def broadcast(self, values: Tensor) -> Tensor:
        """Give the first worker's values."""
        values = values.contiguous().clone()
        dist.broadcast(values, group=self.group, group_src=0)
        return values

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        values = values.contiguous().clone()
        dist.all_reduce(values, op=operation, group=self.group)
        return values


ALONE = Alone()
