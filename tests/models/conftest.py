"""What the tests of several models ask for."""

import pytest
import torch
from torch import Tensor


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Flux with noise around one; every tenth pixel is masked."""
    torch.manual_seed(2)
    flux = 1 + 0.3 * torch.randn(16, 50)
    ivar = torch.rand(16, 50) * 20 + 1
    ivar[torch.rand(16, 50) < 0.1] = 0
    return flux, ivar
