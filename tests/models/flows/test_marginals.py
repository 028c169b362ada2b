"""One-dimensional maps: worked values of SINF, samples against their histograms, degenerate samples."""

import pytest
import torch

from distspec.config import Sliced
from distspec.models.flows.marginals import Marginal, Rules, fit_splines, knot_fractions, linear_histogram, pad
from distspec.models.flows.spline import spline_forward

pytestmark = pytest.mark.numeric

F64 = torch.float64


def raw(values: torch.Tensor) -> Marginal:
    """Give samples, one axis a row, as they are."""
    n = values.shape[1]
    return Marginal.of(values, torch.full_like(values, 1 / n), values.std(dim=1), float(n))


def binned(values: torch.Tensor, cells: int) -> Marginal:
    n, low = values.shape[1], values.amin(dim=1)
    cell = (values.amax(dim=1) - low) / cells
    nodes = low[:, None] + cell[:, None] * torch.arange(cells + 1)
    return Marginal.of(nodes, linear_histogram(values, None, low, cell, cells), values.std(dim=1), float(n))


def skewed(n: int) -> torch.Tensor:
    normal = torch.randn(3, n, generator=torch.Generator().manual_seed(0), dtype=F64)
    normal[1] = normal[1].exp()
    normal[2] += torch.where(normal[0] > 0, 3.0, -3.0)
    return normal


def test_fractions() -> None:
    eight = [0.0714286, 0.1428571, 0.2857143, 0.4285714, 0.5714286, 0.7142857, 0.8571429, 0.9285714]
    ten = [0.047619, 0.0952381, 0.1428571, 0.2857143, 0.4285714]
    assert knot_fractions(8, 1).tolist() == pytest.approx(eight, abs=1e-7)
    assert knot_fractions(10, 2).tolist() == pytest.approx(ten + [1 - q for q in ten[::-1]], abs=1e-7)


@pytest.mark.parametrize(
    ("n", "knots", "edge", "alpha"),
    [
        (209_462, 200, 4, (0.89358, 0.99468)),
        (100, 50, 1, (0.96, 0.998)),
        (1_000, 50, 2, (0.94, 0.997)),
        (10_000, 100, 3, (0.92, 0.996)),
    ],
)
def test_rules_of_the_public_code(n: int, knots: int, edge: int, alpha: tuple[float, float]) -> None:
    rules = Rules.of(Sliced(regularization=None), n)
    assert (rules.knots, rules.edge) == (knots, edge)
    assert rules.alpha == pytest.approx(alpha, abs=1e-5)


@pytest.mark.parametrize("alpha", [(0.0, 0.0), (0.9, 0.99)])
def test_worked_values(alpha: tuple[float, float]) -> None:
    marginal = raw(torch.tensor([[-2.0, -1, 0, 1, 2]], dtype=F64))
    found = fit_splines(marginal, Rules(6, 1, alpha, 1.0, clip=False))
    expected = {
        (0.0, 0.0): ([-1.593978, -1.1632131, -0.373864], [1, 0.8374695, 0.7685386]),
        (0.9, 0.99): ([-1.9593978, -1.4663213, -0.4873864], [1, 0.983747, 0.9768539]),
    }[alpha]
    assert found.x[0].tolist() == pytest.approx([-2, -1.5, -0.5, 0.5, 1.5, 2], abs=1e-12)
    assert found.y[0].tolist() == pytest.approx([*expected[0], *(-y for y in expected[0][::-1])], abs=1e-6)
    assert found.slope[0].tolist() == pytest.approx([*expected[1], *expected[1][::-1]], abs=1e-6)


def test_histogram_stands_for_its_sample() -> None:
    values, rules = skewed(20_000), Rules(100, 3, (0.0, 0.0), 1.0, clip=False)
    points = torch.stack([row.quantile(torch.linspace(0.0005, 0.9995, 500, dtype=F64)) for row in values])
    exact, _ = spline_forward(points, fit_splines(raw(values), rules))
    near, _ = spline_forward(points, fit_splines(binned(values, 4_096), rules))
    torch.testing.assert_close(near, exact, atol=1e-3, rtol=0)


def test_histogram_keeps_weight_and_mean() -> None:
    values, weights = skewed(1_000), torch.rand(1_000, generator=torch.Generator().manual_seed(1), dtype=F64)
    low, cell = values.amin(dim=1), (values.amax(dim=1) - values.amin(dim=1)) / 64
    masses = linear_histogram(values, weights, low, cell, 64)
    nodes = low[:, None] + cell[:, None] * torch.arange(65)
    torch.testing.assert_close(masses.sum(dim=1), weights.sum().expand(3))
    torch.testing.assert_close((masses * nodes).sum(dim=1), (values * weights).sum(dim=1))


def test_gaussian_sample_keeps_its_shape() -> None:
    normal = torch.special.ndtri((torch.arange(5_000) + 0.5).double() / 5_000)[None]
    mapped, _ = spline_forward(normal, fit_splines(raw(normal), Rules(70, 2, (0.0, 0.0), 1.0, clip=False)))
    torch.testing.assert_close(mapped, normal, atol=0.02, rtol=0)


def test_any_sample_becomes_gaussian() -> None:
    values = skewed(20_000)
    mapped, slope = spline_forward(values, fit_splines(raw(values), Rules(140, 3, (0.0, 0.0), 0.3, clip=False)))
    assert torch.allclose(mapped.mean(dim=1), torch.zeros(3, dtype=F64), atol=0.02)
    assert torch.allclose(mapped.std(dim=1), torch.ones(3, dtype=F64), atol=0.03)
    assert slope.isfinite().all()


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [2.0, 2.0, 2.0],
        [0.0, 1.0],
        [0.0] * 50 + [1.0] * 50,
        [0.0] * 999 + [1e6],
        [1e-9 * i for i in range(100)],
        [-1e30, 0.0, 1e30],
    ],
)
@pytest.mark.parametrize("clip", [False, True])
def test_degenerate_samples_give_finite_increasing_maps(values: list[float], clip: bool) -> None:
    data = torch.tensor([values], dtype=F64)
    spread = data.std(dim=1) if len(values) > 1 else torch.zeros(1, dtype=F64)
    marginal = Marginal.of(data, torch.ones_like(data), spread, float(len(values)))
    for alpha in ((0.0, 0.0), (0.9, 0.99)):
        splines = fit_splines(marginal, Rules(50, 1, alpha, 1.0, clip))
        for table in splines:
            assert table.isfinite().all()
        assert (splines.x.diff(dim=1) > 0).all() and (splines.y.diff(dim=1) > 0).all() and (splines.slope > 0).all()


def test_padding_changes_nothing() -> None:
    splines = fit_splines(raw(skewed(500)), Rules(20, 1, (0.5, 0.5), 1.0, clip=False))
    points = torch.linspace(-12, 60, 200, dtype=F64).repeat(3, 1)
    for found, expected in zip(spline_forward(points, pad(splines, 31)), spline_forward(points, splines), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
