"""Groups of latents: planted ones are found, one stays one, workers agree, tiny samples do no harm."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from distspec.models.flows.components import find_components
from tests.models.flows.test_sliced import Threads, normal

pytestmark = pytest.mark.numeric

Found = tuple[Tensor, Tensor, int]


def groups(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four groups, ten apart, of different shapes."""
    truth = torch.arange(count) % 4
    middle = 10 * torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    return normal(count, 3, seed) * (1 + truth[:, None]) / 2 + middle[truth], truth


def found(training: Tensor, wanted: int | None = None, held: Tensor | None = None) -> Found:
    return find_components(training, training[:0] if held is None else held, torch.arange(len(training)), wanted, 0)


def test_planted_groups_are_found() -> None:
    training, truth = groups(2_000)
    held, judged = groups(500, seed=1)
    labels, others, count = found(training, held=held)
    assert count == 4
    assert adjusted_rand_score(truth, labels) > 0.95
    assert adjusted_rand_score(judged, others) > 0.95


@pytest.mark.parametrize("seed", range(3))
def test_one_gaussian_is_one_component(seed: int) -> None:
    labels, _, count = found(normal(2_000, 4, seed) @ normal(4, 4, seed=9))
    assert count == 1 and not labels.any()


@pytest.mark.parametrize("wanted", [None, 3])
@pytest.mark.parametrize("shards", [2, 4])
def test_answer_does_not_depend_on_how_rows_are_spread(
    shards: int, wanted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distspec.models.flows.components._SAMPLE", 600)
    training, _ = groups(1_200)
    held, _ = groups(100, seed=1)
    alone = found(training, wanted, held)
    keys = torch.arange(1_200)
    # The last worker has no rows at all.
    owner = keys * keys % 7 % (shards - 1)
    threads = Threads(shards)

    def work(rank: int) -> Found:
        mine = owner == rank
        return find_components(training[mine], held, keys[mine], wanted, 0, threads.worker(rank))

    with ThreadPoolExecutor(shards) as pool:
        for rank, (labels, others, count) in enumerate(pool.map(work, range(shards))):
            assert count == alone[2]
            assert torch.equal(labels, alone[0][owner == rank])
            assert torch.equal(others, alone[1])


@pytest.mark.parametrize("wanted", [None, 1, 4, 50])
@pytest.mark.parametrize(
    "training",
    [
        torch.zeros(0, 3),
        torch.zeros(1, 3),
        normal(2, 3),
        normal(5, 3),
        normal(20, 3).repeat(30, 1),
        torch.ones(200, 3),
        torch.cat([normal(300, 2), torch.full((300, 1), 1e6)], dim=1),
        torch.cat([normal(300, 2), torch.full((1, 2), torch.nan)]),
    ],
    ids=["none", "one", "two", "five", "repeated", "equal", "constant column", "not finite"],
)
def test_odd_samples_have_an_answer(training: Tensor, wanted: int | None) -> None:
    labels, others, count = found(training, wanted, training)
    assert labels.shape == others.shape == training[:, 0].shape
    assert 1 <= count <= max(wanted or 8, 1)
    finite = labels[training.isfinite().all(dim=1)]
    assert sorted(set(labels.tolist()) | {0}) == list(range(count))
    assert torch.equal(labels, others) and (not len(finite) or finite.min() >= 0)
