"""Steps by shares: the same bits for any number of workers."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from distspec.config import Fit
from distspec.models.autoencoders.dense import Progress
from distspec.models.training import group as adding
from distspec.models.training.group import Shares
from distspec.models.training.loop import best_weights, fit, newest_state
from distspec.models.training.steps import ByShares
from tests.models.training.test_loop import Points, lasting

COUNT = 4
SETTINGS = Fit(epochs=4, learning_rate=0.1, clip=0.5)


class Noisy(nn.Module):
    """A network that draws random numbers; its loss is the squared error."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(1, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 1))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, y: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        return (y - self.layers(x[:, None])[:, 0]).square().sum(), torch.tensor(len(x))


def fitted(folder: Path, shares: Shares, epochs: int = 4) -> None:
    model = Noisy()
    # Shares of unequal size: the first has two rows of each batch, the second none, the others three.
    parts = [slice(0, 2), slice(0, 0), slice(2, 5), slice(5, None)]
    feed = ByShares(tuple(Points(part=parts[share]) for share in shares.mine), shares)
    fit(model, model, feed, SETTINGS.model_copy(update={"epochs": epochs}), folder, 1)


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    # So that sums go over several pieces.
    adding._PIECE = 10
    shares = Shares(COUNT, rank, world)
    rows = [torch.full((share, 2), float(share)) for share in shares.mine]
    assert shares.gather(rows)[:, 0].tolist() == [1.0, 2.0, 2.0, 3.0, 3.0, 3.0]
    fitted(Path(folder) / str(world), shares)
    dist.barrier()
    dist.destroy_process_group()


def test_sums_go_over_shares_in_their_order() -> None:
    parts = [torch.tensor([1e8, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([-1e8, 3.0])]
    assert Shares(3).sum(parts).tolist() == [0.0, 6.0]
    assert Shares(3).gather([part[:1] for part in parts]).tolist() == [1e8, 1.0, -1e8]
    assert [list(Shares(5, rank, 3).mine) for rank in range(3)] == [[0, 3], [1, 4], [2]]


@pytest.mark.slow
def test_weights_are_the_same_in_every_bit_for_any_number_of_workers(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    fitted(tmp_path / "1", Shares(COUNT))
    for world in (2, 3):
        mp.spawn(_worker, args=(world, str(tmp_path)), nprocs=world)
    for name, weights in best_weights(tmp_path / "1", "model").items():
        for other in ("2", "3"):
            assert torch.equal(best_weights(tmp_path / other, "model")[name], weights)
    for other in ("2", "3"):
        assert lasting(newest_state(tmp_path / other)[1]) == lasting(newest_state(tmp_path / "1")[1])
