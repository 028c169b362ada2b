"""Who adds up over workers: fits see their own rows only, and merge sums through one of these."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "Alone", "Group", "Together"]


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
