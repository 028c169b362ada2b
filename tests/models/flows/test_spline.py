"""Rational-quadratic splines against worked values, their own inverse and autograd."""

import pytest
import torch

from distspec.models.flows.marginals import pad
from distspec.models.flows.spline import Splines, lookup, spline_forward, spline_inverse, spline_slopes

pytestmark = pytest.mark.numeric

F64 = torch.float64


def worked() -> Splines:
    values = ([-2, -0.5, 1, 3], [-3, -1, 0.5, 2], [0.5, 1.5, 0.8, 2])
    return Splines(*(torch.tensor([row], dtype=F64) for row in values))


def random_splines(maps: int, knots: int) -> Splines:
    generator = torch.Generator().manual_seed(0)
    steps, rises, slopes = (
        torch.rand(maps, knots, generator=generator, dtype=F64).mul(1.8).sub(0.9).exp() for _ in range(3)
    )
    return Splines(steps.cumsum(1) - knots / 2, rises.cumsum(1) - knots / 2, slopes)


def test_worked_values() -> None:
    x = torch.tensor([[-4, -2, -1, 0.25, 2, 5]], dtype=F64)
    y, slope = spline_forward(x, worked())
    expected = torch.tensor([[-4, -3, -1.8125, -0.12790698, 1.04069767, 6]], dtype=F64)
    slopes = torch.tensor([[-0.69314718, -0.69314718, 0.5092619, -0.07232066, -0.64768481, 0.69314718]], dtype=F64)
    torch.testing.assert_close(y, expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(slope, slopes, atol=1e-7, rtol=0)


def test_inverse_returns_the_values_and_the_same_slope() -> None:
    splines = random_splines(5, 12)
    x = torch.linspace(-15, 15, 997, dtype=F64).repeat(5, 1)
    y, slope = spline_forward(x, splines)
    back, again = spline_inverse(y, splines)
    torch.testing.assert_close(back, x, atol=1e-11, rtol=0)
    torch.testing.assert_close(again, slope, atol=1e-10, rtol=0)
    assert (y.diff(dim=1) > 0).all()


def test_slope_is_the_derivative() -> None:
    splines = random_splines(3, 8)
    x = torch.linspace(-9, 9, 301, dtype=F64).repeat(3, 1).requires_grad_()
    y, slope = spline_forward(x, splines)
    (derivative,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope.exp(), derivative)


@pytest.mark.parametrize("shape", ["even", "crowded", "outlier", "filled"])
def test_the_table_changes_no_bin(shape: str) -> None:
    random = torch.Generator().manual_seed(0)
    gaps = torch.rand(2, 3, 59, generator=random, dtype=torch.float64) + 0.01
    if shape == "crowded":
        gaps[..., 20:50] = 1e-5
    if shape == "outlier":
        gaps[..., -1] = 1e8
    x, y = (torch.cat([torch.zeros_like(part[..., :1]), part.cumsum(dim=-1)], dim=-1) for part in (gaps, gaps.flip(0)))
    splines = Splines(x - 7, y, torch.rand(2, 3, 60, generator=random, dtype=torch.float64) + 0.5)
    if shape == "filled":
        splines = pad(splines, 90)
    knots = splines.x
    values = torch.cat([knots, knots + 1e-9, 40 * torch.rand(2, 3, 500, generator=random) - 20, knots * 1e9], dim=-1)
    found = spline_slopes(values, splines, lookup(splines))
    for part, expected in zip(found, spline_slopes(values, splines), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-9, atol=1e-9)
