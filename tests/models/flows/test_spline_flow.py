"""A flow is a density: it is one-to-one, knows its own determinant, integrates to one, and can learn a known one."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal

from distspec.config import Spline
from distspec.models.flows.spline_flow import SplineFlow

pytestmark = pytest.mark.numeric

SMALL = Spline(transforms=3, hidden=(16, 16), bins=6)
CASES = [(1, 1), (1, 2), (3, 1), (4, 3)]


def moments(latents: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(latents)
    root = torch.randn(latents, latents, generator=generator) + 2 * torch.eye(latents)
    return torch.randn(latents, generator=generator) * 3, root @ root.T


def random_flow(latents: int, classes: int, settings: Spline = SMALL, size: float = 0.3) -> SplineFlow:
    """Splines far from straight, behind a linear map far from the identity."""
    torch.manual_seed(latents * 10 + classes)
    flow = SplineFlow(settings, latents, classes)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    flow.settle(*moments(latents))
    return flow


def linear_flow(latents: int, classes: int = 1, settings: Spline = SMALL) -> SplineFlow:
    """With all weights zero every spline is a straight line, and only the linear map is left."""
    flow = random_flow(latents, classes, settings)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()
    return flow


def sample(flow: SplineFlow, count: int = 200, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Latents that reach into the linear tails, and labels."""
    generator = torch.Generator().manual_seed(5)
    white = spread * torch.randn(count, flow.latents, generator=generator, dtype=torch.float64)
    label = torch.randint(0, flow.classes, (count,), generator=generator)
    return white @ flow.colouring.T + flow.mean, label


# --- a one-to-one map ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("latents", "classes"), CASES)
@pytest.mark.parametrize(("single", "tolerance"), [(True, 1e-3), (False, 1e-9)])
def test_the_way_there_and_back_ends_where_it_began(latents: int, classes: int, single: bool, tolerance: float) -> None:
    flow = random_flow(latents, classes, size=0.1) if single else random_flow(latents, classes).double()
    z, label = sample(flow)
    x, volume = flow.to_normal(z, label)
    back, same = flow.from_normal(x, label)
    torch.testing.assert_close(back, z, rtol=0, atol=tolerance)
    torch.testing.assert_close(same, volume, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize(("latents", "classes"), CASES)
def test_the_determinant_is_that_of_the_jacobian(latents: int, classes: int) -> None:
    flow = random_flow(latents, classes).double()
    z, label = sample(flow, 12, spread=6.0)
    white = (z - flow.mean) @ flow.whitening.T
    assert (white.abs() > 10).any()
    assert (white.abs() < 5).any()
    volume = flow.to_normal(z, label)[1]
    for row in range(len(z)):
        one = slice(row, row + 1)
        matrix = jacobian(lambda rows, one=one: flow.to_normal(rows, label[one])[0], z[one])
        torch.testing.assert_close(torch.linalg.slogdet(matrix[0, :, 0]).logabsdet, volume[row], rtol=0, atol=1e-8)


@pytest.mark.parametrize("label", [0, 1])
def test_the_density_of_one_latent_integrates_to_one(label: int) -> None:
    flow = random_flow(1, 2)
    width = float(flow.colouring)
    z = float(flow.mean) + width * torch.linspace(-15, 15, 30_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        density = flow.log_prob(z, torch.full((len(z),), label)).exp()
    assert float(torch.trapezoid(density, z[:, 0])) == pytest.approx(1, abs=2e-4)


def test_the_density_of_two_latents_integrates_to_one() -> None:
    flow = random_flow(2, 1)
    axis = torch.linspace(-8, 8, 301, dtype=torch.float64)
    white = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        density = flow.log_prob(white @ flow.colouring.T + flow.mean).exp()
    cell = float((axis[1] - axis[0]) ** 2 * torch.linalg.det(flow.colouring).abs())
    assert float(density.sum()) * cell == pytest.approx(1, abs=5e-3)


# --- the linear map --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latents", [1, 2, 10])
def test_straight_splines_leave_the_gaussian_of_the_moments(latents: int) -> None:
    flow = linear_flow(latents)
    mean, covariance = moments(latents)
    z = sample(flow)[0]
    expected = MultivariateNormal(mean.double(), covariance.double()).log_prob(z)
    torch.testing.assert_close(flow.log_prob(z), expected, rtol=1e-5, atol=1e-4)


def test_its_mean_log_density_is_minus_the_entropy() -> None:
    # Whitened or not, -½ log det(2πeΣ); for ten unit latents -14.189.
    flow = SplineFlow(SMALL, 10)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()
        z = torch.randn(40_000, 10, generator=torch.Generator().manual_seed(1))
        assert float(flow.log_prob(z).mean()) == pytest.approx(-14.189385, abs=0.05)


def test_without_whitening_latents_are_scaled_one_by_one() -> None:
    flow = linear_flow(3, settings=SMALL.model_copy(update={"whiten": False}))
    mean, covariance = moments(3)
    z = sample(flow)[0]
    expected = MultivariateNormal(mean.double(), covariance.double().diagonal().diag()).log_prob(z)
    torch.testing.assert_close(flow.log_prob(z), expected, rtol=1e-5, atol=1e-4)
    assert (flow.whitening - flow.whitening.diagonal().diag()).abs().max() < 1e-12


@pytest.mark.parametrize("whiten", [True, False])
def test_latents_that_never_vary_do_not_make_it_singular(whiten: bool) -> None:
    flow = SplineFlow(SMALL.model_copy(update={"whiten": whiten}), 3)
    flow.settle(torch.zeros(3), torch.diag(torch.tensor([4.0, 0.0, 1.0])))
    z = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1e-3, 1.0]])
    likely, unlikely = flow.log_prob(z).tolist()
    assert math.isfinite(likely)
    assert unlikely < likely - 1e3
    flow.settle(torch.zeros(3), torch.zeros(3, 3))
    assert torch.isfinite(flow.log_prob(z)).all()


# --- far out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("latents", "classes"), CASES)
def test_far_out_the_density_falls_as_a_gaussian_and_stays_finite(latents: int, classes: int) -> None:
    flow = random_flow(latents, classes)
    distance = torch.tensor([30.0, 1e3, 1e8, 1e30], dtype=torch.float64)
    way = torch.ones(latents, dtype=torch.float64) / latents**0.5
    z = ((distance[:, None] * way) @ flow.colouring.T + flow.mean).requires_grad_()
    value = flow.log_prob(z, torch.zeros(4, dtype=torch.int64))
    value.sum().backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    curvature = (value.detach() / distance**2)[1:]
    assert (curvature < 0).all()
    torch.testing.assert_close(curvature, curvature[-1].expand(3), rtol=0.05, atol=0)
    # Uphill is towards the others.
    assert ((z.grad @ flow.colouring) @ way < 0).all()


def test_a_latent_that_is_not_a_number_spoils_its_own_row_alone() -> None:
    flow = random_flow(3, 1)
    z = sample(flow, 4)[0]
    spoiled = z.clone()
    spoiled[2, 1] = torch.nan
    good = torch.tensor([0, 1, 3])
    assert torch.isnan(flow.log_prob(spoiled)[2])
    torch.testing.assert_close(flow.log_prob(spoiled)[good], flow.log_prob(z)[good], rtol=0, atol=1e-5)


# --- classes ---------------------------------------------------------------------------------------------------------


def test_all_classes_at_once_are_each_class_by_itself() -> None:
    flow = random_flow(3, 4)
    z = sample(flow, 20)[0]
    table = flow.log_prob_all(z)
    assert table.shape == (20, 4)
    for index in range(4):
        torch.testing.assert_close(table[:, index], flow.log_prob(z, torch.full((20,), index)), rtol=1e-5, atol=1e-4)
    assert (table.std(dim=1) > 0.1).any()


def test_one_class_needs_no_label() -> None:
    flow = random_flow(3, 1)
    z = sample(flow, 9)[0]
    expected = flow.log_prob(z)
    torch.testing.assert_close(flow.log_prob(z, torch.zeros(9, dtype=torch.int64)), expected)
    torch.testing.assert_close(flow.log_prob_all(z)[:, 0], expected)


@pytest.mark.parametrize("label", [None, torch.tensor([0, 2]), torch.tensor([0, -1]), torch.tensor([0])])
def test_a_label_that_is_missing_or_unknown_is_refused(label: Tensor | None) -> None:
    flow = random_flow(3, 2)
    for call in (flow.to_normal, flow.from_normal, flow.log_prob):
        with pytest.raises(ValueError, match="label"):
            call(torch.zeros(2, 3), label)


# --- training --------------------------------------------------------------------------------------------------------


def draw(label: Tensor, generator: torch.Generator) -> Tensor:
    """A Gaussian for class 0; for class 1 a second latent that follows the square of the first."""
    normal = torch.randn(len(label), 2, generator=generator)
    first = torch.where(label == 0, 0.5 * normal[:, 0] - 1, normal[:, 0] + 2)
    second = torch.where(label == 0, 0.5 * normal[:, 1], 0.4 * normal[:, 1] + 0.5 * (first - 2) ** 2)
    return torch.stack([first, second], dim=1)


def truth(z: Tensor, label: Tensor) -> Tensor:
    first, second = z.double().T
    gaussian = -0.5 * ((first + 1) ** 2 + second**2) / 0.25 - math.log(2 * math.pi * 0.25)
    bend = second - 0.5 * (first - 2) ** 2
    bent = -0.5 * ((first - 2) ** 2 + (bend / 0.4) ** 2) - math.log(2 * math.pi * 0.4)
    return torch.where(label == 0, gaussian, bent)


@pytest.mark.slow
def test_it_learns_the_density_of_each_class() -> None:
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(4)
    label = torch.arange(8000) % 4 // 3  # three of four rows are of class 0
    z = draw(label, generator)
    flow = SplineFlow(Spline(transforms=2, hidden=(32, 32), bins=8), 2, 2)
    flow.settle(z.mean(dim=0), torch.cov(z.T))
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    for step in range(250):
        rows = torch.randint(0, len(z), (512,), generator=generator)
        total, count = flow(z[rows], label[rows])
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 250)
        optimizer.step()
    new = torch.arange(4000) % 2
    fresh = draw(new, generator)
    with torch.no_grad():
        loss = truth(fresh, new) - flow.log_prob(fresh, new)
        table = flow.log_prob_all(fresh)
    for index in (0, 1):
        assert float(loss[new == index].mean()) < 0.06, f"Kullback-Leibler divergence of class {index}"
    best = torch.where(truth(fresh, 0 * new) > truth(fresh, 0 * new + 1), 0, 1)
    assert float((table.argmax(dim=1) == best).double().mean()) > 0.97
    drawn = flow.sample(4000, new, torch.Generator().manual_seed(1))
    for index in (0, 1):
        found, expected = drawn[new == index], fresh[new == index].double()
        torch.testing.assert_close(found.mean(dim=0), expected.mean(dim=0), rtol=0, atol=0.1)
        torch.testing.assert_close(torch.cov(found.T), torch.cov(expected.T), rtol=0.2, atol=0.1)


def test_weights_count_rows_and_unknown_classes_do_not_count() -> None:
    flow = random_flow(3, 2)
    z, label = sample(flow, 6)
    weight = torch.tensor([2.0, 1.0, 0.0, 1.0, 0.5, 3.0])
    label[5] = -1
    total, count = flow.loss(z, label, weight)
    values = flow.log_prob(z[:5], label[:5])
    torch.testing.assert_close(total, -(values * weight[:5].double()).sum())
    assert float(count) == 4.5
    total, count = flow.loss(z[:5], label[:5])
    torch.testing.assert_close(total, -values.sum())
    assert float(count) == 5


def test_every_weight_is_trained() -> None:
    for latents, classes in CASES:
        flow = random_flow(latents, classes)
        total, _ = flow(*sample(flow, 50, 1.0))
        total.backward()
        assert all(parameter.grad is not None for parameter in flow.parameters())


def test_sixteen_bits_in_the_networks_leave_the_sums_in_full() -> None:
    flow = random_flow(3, 2)
    z, label = sample(flow, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = flow(z.float(), label)
    assert total.dtype == torch.float64
    assert float(total.detach()) == pytest.approx(float(flow(z, label)[0].detach()), rel=0.02)


def test_the_same_generator_draws_the_same_latents() -> None:
    flow = random_flow(3, 2)
    label = torch.tensor([0, 1, 1])
    first, second = (flow.sample(3, label, torch.Generator().manual_seed(8)) for _ in range(2))
    assert torch.equal(first, second)
    assert flow.sample(0, label[:0]).shape == (0, 3)


# --- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("latents", "classes"), CASES)
def test_its_weights_travel_as_plain_tensors(latents: int, classes: int, tmp_path: Path) -> None:
    flow = random_flow(latents, classes)
    save_file(flow.state_dict(), tmp_path / "flow.safetensors")
    again = SplineFlow(SMALL, **flow.shape)
    again.load_state_dict(load_file(tmp_path / "flow.safetensors"))
    z, label = sample(flow)
    assert torch.equal(again.log_prob(z, label), flow.log_prob(z, label))
    assert all(torch.isfinite(tensor).all() for tensor in flow.state_dict().values())


@pytest.mark.parametrize(("latents", "classes"), CASES)
def test_a_description_alone_tells_the_shapes(latents: int, classes: int) -> None:
    with torch.device("meta"):
        described = SplineFlow(SMALL, latents, classes).state_dict()
    real = SplineFlow(SMALL, latents, classes).state_dict()
    assert all(tensor.is_meta for tensor in described.values())
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in described.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in real.items()
    }


def test_a_description_of_any_size_takes_no_memory() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="weights"):
        SplineFlow(Spline(hidden=(10**9, 10**9)), 10, 16)
