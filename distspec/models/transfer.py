"""The way of tensors to the device that computes: to a GPU beside its computation."""

import torch
from torch import Tensor

__all__ = ["Sent", "Transfer"]

Sent = tuple[tuple[Tensor, ...], torch.cuda.Event | None]
"""Tensors of the device, and what must have happened before they are used."""


class Transfer:
    """Brings tensors to a device; to a GPU from pinned memory and on a stream of its own, so that nobody waits.

    Arguments:
        device: that computes.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.pinned = self.device.type == "cuda"
        """Whether host memory should be pinned; other memory is copied into such first."""
        self._stream = torch.cuda.Stream(self.device) if self.pinned else None  # type: ignore[no-untyped-call]

    def send(self, tensors: tuple[Tensor, ...]) -> Sent:
        """Begin to bring tensors of the host; in whatever thread."""
        if self._stream is None:
            return tuple(tensor.to(self.device) for tensor in tensors), None
        with torch.cuda.stream(self._stream):
            # The allocator of pinned memory gives none of it away again before it is copied.
            sent = tuple(tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors)
            return sent, self._stream.record_event()

    def receive(self, sent: Sent) -> tuple[Tensor, ...]:
        """Give what was sent, in the thread that computes with it: the device, not the thread, waits for the copy."""
        tensors, copied = sent
        if copied is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(copied)
            for tensor in tensors:
                # Its memory is not given away before what is computed with it is done.
                tensor.record_stream(computing)
        return tensors
