"""Directions of greatest sliced distance: curve, objective, search."""

import pytest
import torch

from distspec.models.flows.directions import SlicedDistance, cayley, find_directions, random_directions, search

pytestmark = pytest.mark.numeric

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(n: int, D: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, D, generator=generator(seed), dtype=F64)


@pytest.fixture
def bimodal() -> torch.Tensor:
    """Gaussian but for one direction, the diagonal of the first two axes, which has two peaks."""
    data = normal(3_000, 5)
    data[:, 0] = data[:, 0] * 0.3 + torch.where(data[:, 1] * 7 % 1 > 0.5, 0.9, -0.9)
    turn = random_directions(5, 5, generator(3))
    turn[:, 0] = torch.tensor([1, 1, 0, 0, 0], dtype=F64)
    return data @ torch.linalg.qr(turn).Q.T


def test_both_forms_of_the_curve_are_equal_and_orthonormal() -> None:
    A, G = random_directions(7, 3, generator()), normal(7, 3)
    for step in (1e-3, 0.3, 10.0):
        small, large = cayley(A, G, step, low_rank=True), cayley(A, G, step, low_rank=False)
        torch.testing.assert_close(small, large, atol=1e-12, rtol=0)
        torch.testing.assert_close(small.T @ small, torch.eye(3, dtype=F64), atol=1e-12, rtol=0)


def test_objective_is_the_mean_squared_distance_from_quantiles() -> None:
    data, A = normal(101, 4) * 2, random_directions(4, 2, generator())
    target = torch.special.ndtri((torch.arange(101) + 0.5).double() / 101)
    by_hand = ((data @ A).sort(dim=0).values - target[:, None]).square().mean()
    assert SlicedDistance(data).at(A).value == pytest.approx(float(by_hand))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("classes", [1, 3])
def test_gradient_is_that_of_the_objective(weighted: bool, classes: int) -> None:
    data, A = normal(200, 4).exp(), random_directions(4, 2, generator())
    weights = torch.rand(200, generator=generator(2), dtype=F64) if weighted else None
    distance = SlicedDistance(data, weights, torch.arange(200) % classes if classes > 1 else None)
    change = normal(4, 2, seed=5)
    numeric = (distance.at(A + 1e-6 * change).value - distance.at(A - 1e-6 * change).value) / 2e-6
    assert float((distance.at(A).gradient() * change).sum()) == pytest.approx(numeric, rel=1e-6)


def test_every_step_of_the_search_raises_the_objective(bimodal: torch.Tensor) -> None:
    start, values = random_directions(5, 2, generator()), []
    distance = SlicedDistance(bimodal)
    found = search(distance, start, 40, on_step=values.append)
    steps = [distance.at(start).value, *values]
    assert len(values) > 5 and all(after > before for before, after in zip(steps, values, strict=False))
    assert distance.at(found).value == values[-1]


def test_finds_the_direction_with_two_peaks(bimodal: torch.Tensor) -> None:
    A, distances = find_directions(bimodal, 2, generator(), 100, coarse=1_000)
    assert float((A[:2, 0].sum() / 2**0.5).abs()) > 0.99
    assert distances[0] > 3 * distances[1]
    torch.testing.assert_close(A.T @ A, torch.eye(2, dtype=F64), atol=1e-12, rtol=0)


def test_integer_weights_are_repeated_rows(bimodal: torch.Tensor) -> None:
    times = torch.arange(len(bimodal)) % 3
    A = random_directions(5, 2, generator())
    weighted = SlicedDistance(bimodal[times > 0], times[times > 0].double()).at(A)
    repeated = SlicedDistance(bimodal.repeat_interleave(times, dim=0)).at(A)
    # Equal but for the middle of a row's quantiles standing for each of its copies.
    assert weighted.value == pytest.approx(repeated.value, rel=1e-2)
    torch.testing.assert_close(weighted.gradient(), repeated.gradient(), atol=1e-3, rtol=1e-2)


def test_equal_weights_are_none(bimodal: torch.Tensor) -> None:
    A = random_directions(5, 2, generator())
    plain, weighted = SlicedDistance(bimodal).at(A), SlicedDistance(bimodal, torch.full((3_000,), 0.2).double()).at(A)
    assert weighted.value == pytest.approx(plain.value, rel=1e-9)
    torch.testing.assert_close(weighted.gradient(), plain.gradient(), atol=1e-9, rtol=0)


def test_one_dimension_has_one_direction() -> None:
    A, _ = find_directions(normal(50, 1), 1, generator(), 10)
    assert A.tolist() == [[1.0]]
