"""The K orthogonal directions along which data differ most from a Gaussian: max K-sliced Wasserstein distance.

References:
    Dai & Seljak (2021), SINF, §3 and algorithm 1; search on the Stiefel manifold by Wen & Yin (2013).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["MOST_ROWS", "SlicedDistance", "cayley", "find_directions", "random_directions", "search"]

FIRST_STEP, SHRINK = 0.1, 0.5

LEAST_TRIAL, GREATEST_TRIAL = 1e-3, 50.0

SUFFICIENT = 1e-4
"""Share of the slope's promise that a step must keep (Armijo)."""

SMALLEST_STEP = 1e-10

SMALLEST_MOVE = 1e-6

COARSE = 4_096
"""Rows of the first search; all rows then only correct it."""

FINE_ITERATIONS = 3
"""Of the search that sees all rows, where there are more than these, at most."""

MOST_ROWS = 8_192
"""Rows of the whole search, at most. The public code takes 1e5 log10 D, which is slower and gains no likelihood."""


class SlicedDistance:
    """Mean squared 2-Wasserstein distance J(A) of projections from N(0, 1), and its gradient.

    J(A) = 1/K Σ_k Σ_i w_i (s_ki - g_ki)², where g = Φ⁻¹ of the middle of the sample's share of the cumulative weight,
    in the order of the projections s = Aᵀx. Of several classes J is the mean, weighted by their total weights.

    Arguments:
        data: rows.
        weights: of the rows; none is 1 each.
        labels: class of each row, where classes are to be compared with a Gaussian one by one.
    """

    def __init__(
        self, data: Float[Tensor, "n D"], weights: Float[Tensor, "n"] | None = None, labels: Tensor | None = None
    ) -> None:
        every = torch.arange(len(data), device=data.device)
        parts = [every] if labels is None else [every[labels == label] for label in torch.unique(labels)]
        self.parts = [data[part].T.contiguous() for part in parts]
        total = float(len(data) if weights is None else weights.sum())
        self.shares = [float(len(part) if weights is None else weights[part].sum()) / total for part in parts]
        self.weights = [None if weights is None else weights[part] / weights[part].sum() for part in parts]
        self.targets = [
            None if weights is not None else torch.special.ndtri((torch.arange(len(part)).to(data) + 0.5) / len(part))
            for part in parts
        ]

    def at(self, A: Float[Tensor, "D K"]) -> "Projected":
        """Project and sort the data."""
        return Projected(self, A, [self._residuals(A, part) for part in range(len(self.parts))])

    def _residuals(self, A: Tensor, part: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Give sorted projections less their targets, the order, and the weights in that order."""
        projections, order = torch.sort(A.T @ self.parts[part], dim=1)
        weights, targets = self.weights[part], self.targets[part]
        if targets is not None:
            return projections.sub_(targets), order, None
        assert weights is not None
        ordered = weights[order]
        middle = ordered.cumsum(dim=1) - 0.5 * ordered
        return projections - torch.special.ndtri(middle.clamp(1e-12, 1 - 1e-12)), order, ordered


class Projected:
    """Data projected along some directions: one sort serves the distances and their gradient."""

    def __init__(
        self, distance: SlicedDistance, A: Float[Tensor, "D K"], residuals: list[tuple[Tensor, Tensor, Tensor | None]]
    ) -> None:
        self.distance, self.A, self.residuals = distance, A, residuals
        self.distances = torch.zeros_like(A[0])
        """Squared, along each direction."""
        for share, (residual, _, weights) in zip(distance.shares, residuals, strict=True):
            squares = residual.square()
            self.distances += share * (squares.mean(dim=1) if weights is None else (weights * squares).sum(dim=1))
        self.value = float(self.distances.mean())
        """J(A)."""

    def gradient(self) -> Float[Tensor, "D K"]:
        """∂J/∂A; the ranks are constant but for a set of measure zero."""
        total = torch.zeros_like(self.A)
        for part, share, (residual, order, weights) in zip(
            self.distance.parts, self.distance.shares, self.residuals, strict=True
        ):
            residual = residual / residual.shape[1] if weights is None else residual * weights
            unsorted = torch.empty_like(residual).scatter_(1, order, residual)
            total += 2 * share / self.A.shape[1] * part @ unsorted.T
        return total


def cayley(
    A: Float[Tensor, "D K"], G: Float[Tensor, "D K"], step: float, *, low_rank: bool | None = None
) -> Float[Tensor, "D K"]:
    """Go from A against the gradient G along a curve of orthonormal matrices.

    Both forms are equal; the low-rank one is chosen where it is smaller, 2K < D.
    """
    D, K = A.shape
    if low_rank is None:
        low_rank = 2 * K < D
    if low_rank:
        U, V = torch.cat([G, A], dim=1), torch.cat([A, -G], dim=1)
        system = torch.eye(2 * K).to(A) + 0.5 * step * V.T @ U
        near: Tensor = A - step * U @ torch.linalg.solve(system, V.T @ A)
        return near
    W = G @ A.T - A @ G.T
    one = torch.eye(D).to(A)
    moved: Tensor = torch.linalg.solve(one + 0.5 * step * W, (one - 0.5 * step * W) @ A)
    return moved


def random_directions(D: int, K: int, generator: torch.Generator) -> Float[Tensor, "D K"]:
    """Draw orthonormal columns, uniform under rotations."""
    Q, R = torch.linalg.qr(torch.randn(D, K, generator=generator, dtype=torch.float64))
    signed: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return signed


def search(
    distance: SlicedDistance,
    A: Float[Tensor, "D K"],
    iterations: int,
    tolerance: float = 0.0,
    on_step: Callable[[float], None] | None = None,
) -> Float[Tensor, "D K"]:
    """Raise J along Cayley curves: it grows with every step that is taken.

    The first trial of a step has the length of Barzilai & Borwein, as in Wen & Yin; the public code takes 1.5 times the
    last step, and needs two to three times as many evaluations for the same J.

    Arguments:
        distance: the objective.
        A: the start.
        iterations: at most.
        tolerance: the search ends where ten steps together gained less than this share of J.
        on_step: told J after each step.
    """
    step, here, values = FIRST_STEP, distance.at(A), [0.0]
    previous: tuple[Tensor, Tensor] | None = None
    for number in range(iterations):
        # The search is chaotic. Rounded, gradients that differ by the order of sums are equal in every bit.
        A, G = here.A, -here.gradient().float().double()
        F = G - A @ (G.T @ A)
        if previous is not None:
            S, Y = A - previous[0], F - previous[1]
            products = torch.stack([(S * S).sum(), (S * Y).sum().abs(), (Y * Y).sum()]).clamp_min(1e-300).tolist()
            step = products[0] / products[1] if number % 2 else products[1] / products[2]
            step = min(max(step, LEAST_TRIAL), GREATEST_TRIAL)
        previous = A, F
        slope = -float((G * F).sum())
        while True:
            there = distance.at(cayley(A, G, step))
            if there.value >= here.value - SUFFICIENT * slope * step or step < SMALLEST_STEP:
                break
            step *= SHRINK
        if not there.value > here.value:
            break
        moved = float((there.A - A).abs().max())
        here = there
        values.append(here.value)
        if on_step is not None:
            on_step(here.value)
        if moved < SMALLEST_MOVE or here.value - values[max(len(values) - 11, 0)] < tolerance * here.value:
            break
    return here.A


def find_directions(
    data: Float[Tensor, "n D"],
    count: int,
    generator: torch.Generator,
    iterations: int,
    *,
    weights: Float[Tensor, "n"] | None = None,
    labels: Tensor | None = None,
    coarse: int = COARSE,
    tolerance: float = 1e-2,
) -> tuple[Float[Tensor, "D K"], Float[Tensor, "K"]]:
    """Find directions and the distance (not squared) along each, largest first.

    Arguments:
        data: rows in random order: the first of them stand for all in the coarse search.
        count: K.
        generator: of the random start, on the CPU.
        iterations: of the search, at most.
        weights: of the rows.
        labels: classes that are compared with a Gaussian one by one; none pools all rows.
        coarse: rows of the first search.
    """
    n, D = data.shape
    A = torch.eye(D).to(data) if count == D == 1 else random_directions(D, count, generator).to(data)
    whole = SlicedDistance(data, weights, labels)
    if D > 1 and n > coarse:
        few = slice(0, coarse)
        first = None if weights is None else weights[few]
        A = search(SlicedDistance(data[few], first, None if labels is None else labels[few]), A, iterations, tolerance)
        iterations = min(iterations, FINE_ITERATIONS)
    if D > 1:
        A = search(whole, A, iterations, tolerance)
    distances = whole.at(A).distances
    order = distances.argsort(descending=True, stable=True)
    Q, R = torch.linalg.qr(A[:, order])
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0), distances[order].sqrt()
