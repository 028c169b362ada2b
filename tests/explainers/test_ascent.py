"""On a Gaussian the way up is known; on any density log p never falls, and each spectrum goes its own way."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from distspec.config import Spline
from distspec.explainers.ascent import Path, ascend, growth
from distspec.models.flows.density import LatentDensity
from distspec.models.flows.spline_flow import SplineFlow

pytestmark = pytest.mark.numeric

D = 3
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[4.0, 1.0, 0.0], [1.0, 1.0, 0.2], [0.0, 0.2, 0.25]], dtype=torch.float64)
LAW = MultivariateNormal(MEAN, COVARIANCE)
ROOT = torch.linalg.cholesky(COVARIANCE)


def gaussian(z: Tensor) -> Tensor:
    return LAW.log_prob(z)


def two_bumps(z: Tensor) -> Tensor:
    """A mixture with a bent valley between two maxima."""
    first = -0.5 * (z - 2).square().sum(dim=1)
    second = -0.5 * ((z[:, 0] + 2) ** 2 + (z[:, 1] - 0.3 * z[:, 0] ** 2) ** 2 / 0.1 + z[:, 2] ** 2)
    return torch.logsumexp(torch.stack([first, second]), dim=0)


def outliers(count: int = 20, distance: float = 8.0) -> Tensor:
    """At one distance from the mean, in its own metric."""
    white = torch.randn(count, D, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    white = distance * white / white.norm(dim=1, keepdim=True)
    return MEAN + white @ ROOT.T


def crease(z: Tensor) -> Tensor:
    """A sharp, slanting ridge, along which it goes up gently."""
    across, along = z[:, 0] + 0.5 * z[:, 1], z[:, 1] - 0.5 * z[:, 0]
    return -30 * across.abs() - 0.1 * along.square() - z[:, 2].square()


# --- the way ---------------------------------------------------------------------------------------------------------


def test_on_a_gaussian_in_its_own_metric_the_way_is_straight_to_the_mean() -> None:
    z = outliers()
    path = ascend(gaussian, z, covariance=COVARIANCE)
    torch.testing.assert_close(path.latents[:, -1], MEAN.expand_as(z), rtol=0, atol=5e-3)
    along = path.latents[:, 1:20] - z[:, None]
    way = (MEAN - z)[:, None].expand_as(along)
    torch.testing.assert_close(torch.cosine_similarity(along, way, dim=2), torch.ones(20, 19).double())
    # 8 σ of way in steps of a quarter.
    torch.testing.assert_close(path.arc[:, 20], torch.full((20,), 5.0).double())
    torch.testing.assert_close(path.arc[:, -1], torch.full((20,), 8.0).double(), rtol=0, atol=0.01)
    torch.testing.assert_close(path.slope, torch.full((20,), 4.0).double(), rtol=0.01, atol=0)


def test_without_a_metric_it_follows_the_precision_weighted_gradient() -> None:
    z = outliers()
    path = ascend(gaussian, z, steps=1, length=1e-3)
    gradient = torch.linalg.solve(COVARIANCE, (MEAN - z).T).T
    step = path.latents[:, 1] - path.latents[:, 0]
    torch.testing.assert_close(step, 1e-3 * gradient / gradient.norm(dim=1, keepdim=True), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(ascend(gaussian, z, steps=300).latents[:, -1], MEAN.expand_as(z), rtol=0, atol=0.05)


@pytest.mark.parametrize("law", [gaussian, two_bumps])
@pytest.mark.parametrize("metric", [None, COVARIANCE])
def test_log_p_never_falls_and_is_that_of_the_points(law: Any, metric: Tensor | None) -> None:
    path = ascend(law, outliers(), steps=40, covariance=metric)
    assert (path.log_prob.diff(dim=1) >= 0).all()
    assert (path.log_prob[:, -1] > path.log_prob[:, 0] + 1).all()
    torch.testing.assert_close(path.log_prob, law(path.latents.flatten(0, 1)).view(20, -1))


def test_it_follows_a_crease() -> None:
    z = torch.tensor([[-4.0, 7.0, 1.0], [1.0, -3.0, 0.0], [0.2, 5.0, -2.0]], dtype=torch.float64)
    path = ascend(crease, z)
    torch.testing.assert_close(path.log_prob[:, -1], torch.zeros(3).double(), rtol=0, atol=0.02)
    assert (path.arc[:, -1] < 1.5 * z.norm(dim=1)).all()


def test_no_step_is_longer_than_asked() -> None:
    path = ascend(two_bumps, outliers(), steps=30, length=0.1)
    lengths = path.latents.diff(dim=1).norm(dim=2)
    assert lengths.max() <= 0.1 + 1e-9
    torch.testing.assert_close(path.arc[:, 1:], lengths.cumsum(dim=1))


def test_it_stops_where_nothing_is_gained() -> None:
    z = torch.cat([MEAN[None], outliers(1), MEAN[None] + 0.3 * ROOT[:, 0]])
    path = ascend(gaussian, z, covariance=COVARIANCE)
    assert path.taken[0] == 0
    assert 0 < path.taken[2] < path.taken[1] < 60
    assert path.slope[0] == 0
    for row, taken in enumerate(path.taken.tolist()):
        assert (path.latents[row, taken:] == path.latents[row, taken]).all()
        assert (path.log_prob[row, taken:] == path.log_prob[row, taken]).all()
        assert (path.log_prob[row, : taken + 1].diff() > 0).all()


def test_each_spectrum_goes_its_own_way_whatever_the_batch() -> None:
    z = outliers(8)
    whole = ascend(two_bumps, z, steps=40)
    for row in range(3):
        alone = ascend(two_bumps, z[row : row + 1], steps=40)
        torch.testing.assert_close(alone.latents[0], whole.latents[row], rtol=0, atol=1e-6)
        assert alone.taken[0] == whole.taken[row]
    turned = ascend(two_bumps, z.flip(0), steps=40)
    torch.testing.assert_close(turned.latents.flip(0), whole.latents, rtol=0, atol=1e-6)


def test_latents_are_left_as_they_were() -> None:
    z = outliers(4).requires_grad_()
    before = z.detach().clone()
    path = ascend(gaussian, z)
    assert torch.equal(z.detach(), before)
    assert z.grad is None
    assert not path.latents.requires_grad
    assert torch.equal(path.latents[:, 0], before)


def test_evenly_it_gives_points_of_equal_distance_on_the_way() -> None:
    path = ascend(two_bumps, outliers(), steps=40, length=0.3)
    points = path.evenly(7)
    assert torch.equal(points[:, 0], path.latents[:, 0])
    assert torch.equal(points[:, -1], path.latents[:, -1])
    for row in range(3):
        for index in range(1, 6):
            wanted = path.arc[row, -1] * index / 6
            step = int((path.arc[row] < wanted).sum())
            share = (wanted - path.arc[row, step - 1]) / (path.arc[row, step] - path.arc[row, step - 1])
            expected = torch.lerp(path.latents[row, step - 1], path.latents[row, step], share)
            torch.testing.assert_close(points[row, index], expected)


def test_a_way_without_a_step_is_its_start_at_every_point() -> None:
    path = ascend(gaussian, MEAN[None], covariance=COVARIANCE)
    assert path.taken[0] == 0
    assert torch.equal(path.evenly(5), MEAN.expand(1, 5, D))


# --- where it cannot go ----------------------------------------------------------------------------------------------


def test_far_out_in_a_tail_nothing_is_lost() -> None:
    z = torch.tensor([[1e3, 0, 0], [1e100, 1e100, 0], [1e200, 0, 0], [0, 0, 1.0]], dtype=torch.float64)
    path = ascend(gaussian, z, covariance=COVARIANCE)
    assert torch.isfinite(path.latents).all()
    assert path.taken[0] == 100
    assert path.taken[1] == 0  # a quarter of σ is below the rounding of 1e100
    assert path.taken[3] > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_latents_that_are_not_finite_stay_where_they_are(bad: float) -> None:
    def law(z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(dim=1)

    z = outliers(3)
    expected = ascend(law, z)
    z[1, 0] = bad
    path = ascend(law, z)
    assert path.taken[1] == 0
    assert (path.latents[1, :, 1:] == z[1, 1:]).all()
    for row in (0, 2):
        torch.testing.assert_close(path.latents[row], expected.latents[row])


def test_a_density_of_zero_gives_no_direction_and_a_cliff_is_not_climbed() -> None:
    def law(z: Tensor) -> Tensor:
        inside = -0.5 * z.square().sum(dim=1)
        return torch.where(z[:, 0] > 5, -torch.inf, torch.where(z[:, 1] < 0, torch.nan, inside))

    z = torch.tensor([[6.0, 1.0, 0.0], [3.0, 0.5, 0.0], [0.0, -1.0, 0.0]], dtype=torch.float64)
    path = ascend(law, z)
    assert path.taken[0] == path.taken[2] == 0
    assert path.taken[1] > 5
    assert torch.isfinite(path.log_prob[1]).all()


@pytest.mark.slow
def test_latents_that_never_vary_do_not_move() -> None:
    covariance = torch.diag(torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64))
    path = ascend(gaussian, outliers(), covariance=covariance)
    assert (path.latents[:, :, 1] == path.latents[:, :1, 1]).all()
    assert (path.taken > 0).all()


def test_no_spectra_make_no_ways() -> None:
    path = ascend(gaussian, outliers(0), steps=4)
    assert path.latents.shape == (0, 5, D)
    assert growth(path, nn.Linear(D, 7).double()).shape == (0, 7)


# --- spectra along the way -------------------------------------------------------------------------------------------


@pytest.fixture
def path() -> Path:
    return ascend(gaussian, outliers(), steps=50, covariance=COVARIANCE)


def test_growth_of_a_linear_decoder_is_the_decoded_way(path: Path) -> None:
    decoder = nn.Linear(D, 40).double()
    with torch.no_grad():
        expected = (path.latents[:, -1] - path.latents[:, 0]) @ decoder.weight.T
    found = growth(path, decoder)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    steps = growth(path, decoder, by_step=True)
    assert steps.shape == (20, 50, 40)
    torch.testing.assert_close(steps.sum(dim=1), expected)
    spectra = path.decoded(decoder)
    assert spectra.shape == (20, 51, 40)
    torch.testing.assert_close(spectra[3, 7], decoder(path.latents[3, 7]).detach())


def test_a_line_that_makes_the_outlier_fades() -> None:
    # One latent is the strength of a line at pixel 12, the others of a smooth continuum; it alone is odd.
    wave = torch.arange(40, dtype=torch.float64)
    atoms = torch.stack([torch.ones(40).double(), wave / 40, torch.exp(-0.5 * (wave - 12) ** 2)])

    def decode(z: Tensor) -> Tensor:
        return z @ atoms

    def law(z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(dim=1)

    change = growth(ascend(law, torch.tensor([[0.3, -0.2, 9.0]], dtype=torch.float64)), decode)
    assert change.argmin() == 12
    assert change[0, 12] == pytest.approx(-9.3 + 0.06, abs=0.02)
    assert change[0, 30:].abs().max() < 0.5


def test_spectra_are_decoded_a_bounded_number_at_once() -> None:
    most = 0

    def decode(z: Tensor) -> Tensor:
        nonlocal most
        most = max(most, len(z))
        return z

    latents = torch.randn(100, 60, D)
    path = Path(latents, latents[:, :, 0], latents[:, :, 0], torch.zeros(100, dtype=torch.int64))
    torch.testing.assert_close(path.decoded(decode), path.latents)
    assert most == 4096


@pytest.mark.slow
def test_it_climbs_the_density_of_a_flow() -> None:
    torch.manual_seed(2)
    flow = SplineFlow(Spline(transforms=2, hidden=(16,)), D, 2)
    flow.settle(MEAN, COVARIANCE)
    density = LatentDensity(flow, ("A", "B"), torch.tensor([3.0, 1.0]))
    z = outliers(10).float()
    path = ascend(density.log_prob, z, covariance=COVARIANCE)
    assert path.latents.dtype == torch.float32
    assert (path.log_prob.diff(dim=1) >= 0).all()
    assert (path.log_prob[:, -1] > path.log_prob[:, 0] + 20).all()
    # The end is a summit, creases or not: nothing nearby is higher.
    white = torch.randn(200, 1, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    nearby = (path.latents[:, -1] + 0.02 * white @ ROOT.T).float()
    with torch.no_grad():
        higher = density.log_prob(nearby.flatten(0, 1)).view(200, 10) - path.log_prob[:, -1]
    assert higher.max() < 1e-3
    assert all(parameter.grad is None for parameter in flow.parameters())
