"""Sliced iterative normalizing flow: the density of latents, layer by layer, without gradient descent.

Each layer finds the K directions along which the data differ most from a Gaussian, and maps each to a Gaussian by a
one-dimensional spline. Classes share directions and have splines of their own.

References:
    Dai & Seljak (2021), SINF (GIS); Böhm, Kim & Juneau (PAE), §4, for classes.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from distspec.models.flows.spline import Lookup, Splines, lookup, spline_inverse, spline_slopes

__all__ = ["SlicedFlow", "apply_layer", "chunks", "log_normal", "sorted_by_class"]

CHUNK, CHUNK_DEVICE = 4_096, 262_144
"""Rows mapped at once, of all classes together: on the CPU what they need stays in its cache, on other devices few
launches matter more."""

FACTORS = 8
"""Slopes of splines that are multiplied."""


class SlicedFlow(nn.Module):
    """A map of latents to a unit Gaussian, and so their density, for each class.

    Layer l is x' = x + A (Ψ(Aᵀx) - Aᵀx) with orthonormal columns A and splines Ψ; before the first comes a linear map.
    log p(z) = Σ_l Σ_k log ψ'_lk - D/2 log 2π - |x|²/2. All is float64 and all tensors are buffers.

    Arguments:
        latents: D.
        classes: each has its own splines.
        layers: number of layers.
        directions: K, of each layer.
        knots: M, of each spline.
    """

    def __init__(self, latents: int, classes: int = 1, *, layers: int = 0, directions: int = 0, knots: int = 0) -> None:
        super().__init__()
        self.latents, self.classes = latents, classes
        self.mean: Tensor
        self.whiten: Tensor
        self.unwhiten: Tensor
        self.directions: Tensor
        self.x: Tensor
        self.y: Tensor
        self.slopes: Tensor
        self._kept: tuple[tuple[Tensor, ...], list[int], list[Lookup]] | None = None
        one = torch.eye(latents, dtype=torch.float64)
        ladder = torch.linspace(-1, 1, knots, dtype=torch.float64).repeat(layers, classes, directions, 1)
        self.register_buffer("mean", torch.zeros(classes, latents, dtype=torch.float64))
        self.register_buffer("whiten", one.repeat(classes, 1, 1))
        self.register_buffer("unwhiten", one.repeat(classes, 1, 1))
        self.register_buffer("directions", one[:, :directions].repeat(layers, 1, 1))
        self.register_buffer("x", ladder)
        self.register_buffer("y", ladder.clone())
        self.register_buffer("slopes", torch.ones_like(ladder))

    @property
    def shape(self) -> dict[str, int]:
        """The arguments that make a flow of the same shape."""
        layers, classes, directions, knots = self.x.shape
        return {
            "latents": self.latents,
            "classes": classes,
            "layers": layers,
            "directions": directions,
            "knots": knots,
        }

    def to_normal(
        self, z: Float[Tensor, "n D"], label: Int64[Tensor, "n"] | None = None
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n"]]:
        """Map latents to the Gaussian; give the log-determinant of the map, too."""
        return self._by_class(z, label, self.forward_columns)

    def from_normal(
        self, x: Float[Tensor, "n D"], label: Int64[Tensor, "n"] | None = None
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n"]]:
        """Map the Gaussian to latents; give the log-determinant of the forward map there, too."""
        return self._by_class(x, label, self._inverse)

    def log_prob(self, z: Float[Tensor, "n D"], label: Int64[Tensor, "n"] | None = None) -> Float[Tensor, "n"]:
        """Give log p(z | class) in nats."""
        x, volume = self.to_normal(z, label)
        return log_normal(x.T) + volume

    def log_prob_all(self, z: Float[Tensor, "n D"]) -> Float[Tensor, "n classes"]:
        """Give log p(z | class) for every class."""
        z = z.to(self.mean)
        most = _chunk(z.device)
        # As many classes at once as fill a chunk: the tables of each are read once for many rows.
        together = max(most // max(len(z), 1), 1)
        blocks = [slice(start, start + together) for start in range(0, self.classes, together)]
        parts = []
        for rows in torch.split(z, most):
            columns = rows.T[None]
            found = [self.forward_columns(columns, block) for block in blocks]
            parts.append(torch.cat([log_normal(x) + volume for x, volume in found]).T)
        return torch.cat(parts) if parts else z.new_zeros(0, self.classes)

    def sample(
        self, n: int, label: Int64[Tensor, "n"] | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n D"]:
        """Draw latents; `generator` lives on the CPU."""
        normal = torch.randn(n, self.latents, generator=generator, dtype=torch.float64)
        return self.from_normal(normal.to(self.mean), label)[0]

    def _by_class(
        self,
        rows: Tensor,
        label: Tensor | None,
        mapping: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Map rows class by class, each a slice of the tables."""
        rows = rows.to(self.mean)
        if label is None:
            if self.classes > 1:
                raise ValueError(f"label is None, but the flow has {self.classes} classes; give the class of each row")
            order, bounds = None, [0, len(rows)]
        else:
            order, bounds = sorted_by_class(label.to(rows.device), self.classes)
        columns = (rows if order is None else rows[order]).T
        mapped, volumes = [rows.new_zeros(self.latents, 0)], [rows.new_zeros(0)]
        for part, tables in chunks(bounds, rows.device):
            x, volume = mapping(columns[None, :, part], tables)
            mapped.append(x[0])
            volumes.append(volume[0])
        x, volume = torch.cat(mapped, dim=1).T, torch.cat(volumes)
        if order is None:
            return x, volume
        back = order.argsort()
        return x[back], volume[back]

    def forward_columns(
        self, z: Float[Tensor, "c D n"], tables: slice
    ) -> tuple[Float[Tensor, "c D n"], Float[Tensor, "c n"]]:
        """Map columns of some classes to the Gaussian, all layers; give the log-determinants, too."""
        x = self.whiten[tables] @ (z - self.mean[tables, :, None])
        volume = self._linear_volume(tables).expand(x[:, 0].shape)
        for layer, table in enumerate(self._lookups()):
            x, more = apply_layer(x, self.directions[layer], self.splines(layer, tables), of_classes(table, tables))
            volume = volume + more
        return x, volume

    @torch.no_grad()
    def _lookups(self) -> list[Lookup]:
        """Give the table of every layer's splines; they are kept until the knots are others."""
        knots = self.x, self.y, self.slopes
        versions = [0 if table.is_inference() else table._version for table in knots]
        kept = self._kept
        if kept is None or kept[1] != versions or any(a is not b for a, b in zip(kept[0], knots, strict=True)):
            kept = knots, versions, [lookup(self.splines(layer)) for layer in range(len(self.x))]
            self._kept = kept
        return kept[2]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew more quickly than it is sent."""
        return {**self.__dict__, "_kept": None}

    def _inverse(self, x: Float[Tensor, "c D n"], tables: slice) -> tuple[Tensor, Tensor]:
        volume = self._linear_volume(tables).expand(x[:, 0].shape)
        for layer in reversed(range(len(self.directions))):
            A = self.directions[layer]
            projections = A.T @ x
            mapped, slopes = spline_inverse(projections, self.splines(layer, tables))
            x, volume = x + A @ (mapped - projections), volume + slopes.sum(dim=-2)
        return self.unwhiten[tables] @ x + self.mean[tables, :, None], volume

    def _linear_volume(self, tables: slice) -> Float[Tensor, "c 1"]:
        volume: Tensor = torch.linalg.slogdet(self.whiten[tables]).logabsdet[:, None]
        return volume

    def splines(self, layer: int, tables: slice = slice(None)) -> Splines:
        """Give a layer's splines of some classes: tables [classes directions knots]."""
        return Splines(self.x[layer, tables], self.y[layer, tables], self.slopes[layer, tables])

    def with_layers(self, layers: Sequence[tuple[Tensor, Splines]]) -> "SlicedFlow":
        """Give the flow of the same linear map and these layers: directions and splines of each."""
        flow = SlicedFlow(self.latents, self.classes).to(self.mean.device)
        flow.mean, flow.whiten, flow.unwhiten = self.mean, self.whiten, self.unwhiten
        if layers:
            flow.directions = torch.stack([A for A, _ in layers])
            flow.x, flow.y, flow.slopes = (torch.stack(tables) for tables in zip(*(s for _, s in layers), strict=True))
        return flow


def apply_layer(
    x: Float[Tensor, "c D n"],
    A: Float[Tensor, "D K"],
    splines: Splines,
    table: Lookup | None = None,
) -> tuple[Float[Tensor, "c D n"], Float[Tensor, "c n"]]:
    """Apply one layer; only K of the D dimensions change. Give the log-determinant, too."""
    projections = A.T @ x
    mapped, slopes = spline_slopes(projections, splines, table)
    # Products first: a logarithm takes as long as ten of them. Few enough factors neither overflow nor vanish.
    products = torch.stack([part.prod(dim=-2) for part in torch.split(slopes, FACTORS, dim=-2)])
    return x + A @ mapped.sub(projections), products.log().sum(dim=0)


def of_classes(table: Lookup, classes: slice) -> Lookup:
    """Give the part of a layer's table that is about some classes."""
    return Lookup(table.middle[classes], table.scale[classes], table.start[classes], table.last[classes], table.jumps)


def log_normal(x: Float[Tensor, "*c D n"]) -> Float[Tensor, "*c n"]:
    """Logarithm of the density of N(0, I) at each column."""
    return -0.5 * x.square().sum(dim=-2) - 0.5 * x.shape[-2] * math.log(2 * math.pi)


def sorted_by_class(label: Tensor, classes: int) -> tuple[Tensor, list[int]]:
    """Give the order that sorts rows by class, and where each class begins and ends."""
    counts = torch.bincount(label, minlength=classes)
    if len(counts) > classes:
        raise ValueError(f"a label is {len(counts) - 1}, but the flow has {classes} classes, numbered from 0")
    return label.argsort(stable=True), [0, *counts.cumsum(0).tolist()]


def chunks(bounds: Sequence[int], device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Cut classes into chunks of rows; give the rows and the class of each."""
    most = _chunk(device)
    for index, (first, stop) in enumerate(itertools.pairwise(bounds)):
        for start in range(first, stop, most):
            yield slice(start, min(start + most, stop)), slice(index, index + 1)


def _chunk(device: torch.device) -> int:
    return CHUNK if device.type == "cpu" else CHUNK_DEVICE
