"""The way to the device: nothing is changed on it, and on a processor nothing is copied."""

import pytest
import torch

from distspec.models.transfer import Transfer


def test_on_a_processor_tensors_are_what_they_were() -> None:
    transfer = Transfer("cpu")
    tensors = torch.rand(5, 3), torch.rand(5)
    received = transfer.receive(transfer.send(tensors))
    assert all(one is two for one, two in zip(received, tensors, strict=True))
    assert not transfer.pinned


@pytest.mark.gpu
def test_to_a_gpu_they_travel_beside_its_computation_and_arrive_whole(device: str) -> None:
    transfer = Transfer(device)
    tensors = [(torch.rand(2_000, 500), torch.rand(2_000)) for _ in range(8)]
    square = torch.rand(2_000, 2_000, device=device)
    sent = transfer.send(tensors[0])
    for number, expected in enumerate(tensors):
        received = transfer.receive(sent)
        if number + 1 < len(tensors):
            sent = transfer.send(tensors[number + 1])
        square = (square @ square).clamp(0, 1)
        assert all(torch.equal(one.cpu(), two) for one, two in zip(received, expected, strict=True))
