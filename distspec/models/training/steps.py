"""A step of gradient descent over workers: each averages gradients of its own batches, or adds up those of shares.

With shares, the global batch is cut into a fixed number of parts, each with a feed and random numbers of its own. The
weights are then the same in every bit for any number of workers, and a fit may go on with fewer or more of them.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distspec.models.autoencoders.dense import Progress
from distspec.models.training.group import Shares

__all__ = ["Batches", "ByShares", "Steps", "steps_of"]


class Batches(Protocol):
    """What a network is fitted to; every worker, or share, has its own, with the same number of steps."""

    steps: int

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """Give the training batches of an epoch, on the device."""
        ...

    def validation_batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Give the validation batches."""
        ...


class Steps(Protocol):
    """How workers take steps together. Sums are [2] or [shares of this worker, 2]: of losses, and of their counts."""

    rank: int

    def begin(self, seed: int, epoch: int) -> None:
        """Settle what is random in an epoch."""

    def batches(self, epoch: int) -> Generator[tuple[tuple[Tensor, ...], ...], None, None]:
        """Give, for each step, the batch of each share of this worker."""

    def backward(self, batches: tuple[tuple[Tensor, ...], ...], progress: Progress, *, sixteen: bool) -> Tensor:
        """Give the weights the gradients of the mean loss of the batches of all workers; give the sums of one's own.

        Arguments:
            batches: of this step.
            progress: of the fit.
            sixteen: multiply in bfloat16.
        """

    def validate(self, progress: Progress, device: torch.device) -> Tensor:
        """Give the sums over one's own part of the validation set."""

    def add_up(self, sums: Tensor) -> Tensor:
        """Give the sums over all workers [2]."""


class _Averaged:
    """Each worker has one batch; gradients are averaged in whatever order is fastest.

    Arguments:
        objective: holds the weights; gives (total, count) of a batch.
        feed: of this worker.
        device: of the weights.
    """

    def __init__(self, objective: nn.Module, feed: Batches, device: torch.device) -> None:
        self._group = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self._group else 0
        self._objective, self._feed = objective, feed
        ids = [device.index] if device.type == "cuda" else None
        self._driven = (
            DistributedDataParallel(objective, device_ids=ids, broadcast_buffers=False) if self._group else objective
        )

    def begin(self, seed: int, epoch: int) -> None:
        """Let each worker draw its own."""
        # What is random in a resumed epoch is what it was in an unbroken run.
        torch.manual_seed((seed * 1_000_003 + epoch) * 1_009 + self.rank)
        self._driven.train()

    def batches(self, epoch: int) -> Generator[tuple[tuple[Tensor, ...], ...], None, None]:
        """Give this worker's batches."""
        for batch in self._feed.batches(epoch):
            yield (batch,)

    def backward(self, batches: tuple[tuple[Tensor, ...], ...], progress: Progress, *, sixteen: bool) -> Tensor:
        """Average gradients while they are computed."""
        (batch,) = batches
        with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=sixteen):
            total, count = self._driven(*batch, progress=progress)
        together = count.detach().to(torch.float32)
        workers = self._all_reduce(together)
        # Workers' gradients are averaged, so that their sum must be divided by the count of all of them.
        (total * (workers / together.clamp_min(1.0))).backward()
        return torch.stack([total.detach().double(), count.detach().double()])

    @torch.no_grad()
    def validate(self, progress: Progress, device: torch.device) -> Tensor:
        """Add up over this worker's validation batches."""
        self._objective.eval()
        return _validated(self._objective, self._feed, progress, device)

    def add_up(self, sums: Tensor) -> Tensor:
        """Add up over workers."""
        self._all_reduce(sums)
        return sums

    def _all_reduce(self, values: Tensor) -> int:
        """Add up over all workers in place; give their number."""
        if not self._group:
            return 1
        dist.all_reduce(values)
        return dist.get_world_size()


@dataclass(frozen=True)
class ByShares:
    """The feeds of this worker's shares.

    Arguments:
        feeds: in the order of the shares.
        shares: who has which.
    """

    feeds: tuple[Batches, ...]
    shares: Shares

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.feeds[0].steps


class _Added:
    """Gradients of all shares are added up in the order of the shares.

    Arguments:
        objective: holds the weights; gives (total, count) of a batch.
        feed: the feeds of this worker's shares.
    """

    def __init__(self, objective: nn.Module, feed: ByShares) -> None:
        self._objective, self._feeds, self._shares = objective, feed.feeds, feed.shares
        self.rank = feed.shares.rank
        self._weights = [weight for weight in objective.parameters() if weight.requires_grad]
        self._drawn, self._step = (0, 0), 0

    def begin(self, seed: int, epoch: int) -> None:
        """Let each share draw its own in every step."""
        self._drawn, self._step = (seed, epoch), 0
        self._objective.train()

    def batches(self, epoch: int) -> Generator[tuple[tuple[Tensor, ...], ...], None, None]:
        """Give the batches of this worker's shares."""
        yield from zip(*(feed.batches(epoch) for feed in self._feeds), strict=True)

    def backward(self, batches: tuple[tuple[Tensor, ...], ...], progress: Progress, *, sixteen: bool) -> Tensor:
        """Add up gradients once all shares of this worker have theirs."""
        parts, sums = [], []
        for share, batch in zip(self._shares.mine, batches, strict=True):
            state = np.random.SeedSequence([*self._drawn, self._step, share]).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0]))
            with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=sixteen):
                total, count = self._objective(*batch, progress=progress)
            gradients = torch.autograd.grad(total, self._weights, allow_unused=True, materialize_grads=True)
            known = count.detach().to(gradients[0].dtype).reshape(1)
            parts.append(torch.cat([*(gradient.flatten() for gradient in gradients), known]))
            sums.append(torch.stack([total.detach().double(), count.detach().double()]))
        self._step += 1
        *whole, count = torch.split(self._shares.sum(parts), [*(weight.numel() for weight in self._weights), 1])
        for weight, gradient in zip(self._weights, whole, strict=True):
            weight.grad = (gradient / count.clamp_min(1)).view_as(weight).to(weight.dtype)
        return torch.stack(sums)

    @torch.no_grad()
    def validate(self, progress: Progress, device: torch.device) -> Tensor:
        """Add up over the validation batches of each share."""
        self._objective.eval()
        return torch.stack([_validated(self._objective, feed, progress, device) for feed in self._feeds])

    def add_up(self, sums: Tensor) -> Tensor:
        """Add up over all shares."""
        return self._shares.sum(list(sums))


def _validated(objective: nn.Module, feed: Batches, progress: Progress, device: torch.device) -> Tensor:
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in feed.validation_batches():
        total, count = objective(*batch, progress=progress)
        sums += torch.stack([total.double(), count.double()])
    return sums


def steps_of(objective: nn.Module, feed: Batches | ByShares, device: torch.device) -> Steps:
    """Tell how steps are taken, by what there is to be fitted to."""
    return _Added(objective, feed) if isinstance(feed, ByShares) else _Averaged(objective, feed, device)
