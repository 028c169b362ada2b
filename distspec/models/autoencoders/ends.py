"""A model cut where it touches pixels: linear ends, and little in between.

Of many versions of one spectrum most pixels are alike. Through a linear first layer a version costs what its changes
cost, and through a linear last layer a sum of squares over pixels is a quadratic form in the last hidden layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from distspec.models.autoencoders.dense import DenseAutoencoder, TwoStage
from distspec.models.autoencoders.variational import VariationalAutoencoder

__all__ = ["Ends", "ends_of"]

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Ends:
    """Reconstruction = last · hidden(encode(first · (flux - center) + bias)) + offset, a masked pixel being the center.

    Arguments:
        first: weights of the first layer, for flux in the store's unit.
        center: flux that adds nothing.
        bias: of the first layer.
        encode: from the first layer to latents.
        hidden: from latents to the input of the last layer.
        last: weights of the last layer, to flux in the store's unit.
        offset: flux where they give nothing.
    """

    first: Float[Tensor, "H pixels"]
    center: Float[Tensor, "pixels"]
    bias: Float[Tensor, "H"]
    encode: Function
    hidden: Function
    last: Float[Tensor, "pixels L"]
    offset: Float[Tensor, "pixels"]

    @cached_property
    def by_pixel(self) -> Float[Tensor, "pixels H"]:
        """`first`, laid out pixel by pixel."""
        return self.first.T.contiguous()

    @cached_property
    def _gram(self) -> Float[Tensor, "L L"]:
        return self.last.T @ self.last

    def gram(self, weight: Float[Tensor, "pixels"]) -> Float[Tensor, "L L"]:
        """Give lastᵀ · diag(weight) · last; where few pixels have another weight than 1, only they cost."""
        other = (weight != 1).nonzero()[:, 0]
        if 2 * len(other) > len(weight):
            return self.last.T @ (self.last * weight[:, None])
        rows = self.last[other]
        return self._gram + rows.T @ (rows * (weight[other] - 1)[:, None])


def ends_of(model: nn.Module) -> Ends | None:
    """Cut a model; None where its ends are not linear."""
    match model:
        case DenseAutoencoder():
            return _dense(model)
        case VariationalAutoencoder():
            return _variational(model)
        case TwoStage():
            return _chained(ends_of(model.first), ends_of(model.second))
        case _:
            return None


def _dense(model: DenseAutoencoder) -> Ends:
    first: Any = model.encoder[0]
    last: Any = model.decoder[-1]
    return Ends(
        first.weight / model.scale,
        model.mean,
        first.bias,
        model.encoder[1:],
        model.decoder[:-1],
        last.weight * model.scale[:, None],
        last.bias * model.scale + model.mean,
    )


def _variational(model: VariationalAutoencoder) -> Ends:
    first: Any = model.encoder[0] if len(model.encoder) else model.head_mean
    last: Any = model.decoder[-1]

    def encode(before: Tensor) -> Tensor:
        latents: Tensor = model.head_mean(model.encoder[1:](before)) if len(model.encoder) else before
        return latents

    # Its first layer takes flux as it is, so what the mean spectrum gives is part of the bias.
    bias = first.bias + first.weight @ model.mean
    return Ends(first.weight, model.mean, bias, encode, model.decoder[:-1], last.weight, last.bias)


def _chained(one: Ends | None, two: Ends | None) -> Ends | None:
    """Join two networks: the last layer of the first and the first of the second make one that sees no pixels."""
    if one is None or two is None:
        return None
    joint, bias = two.first @ one.last, two.first @ (one.offset - two.center) + two.bias

    def encode(before: Tensor) -> Tensor:
        return two.encode(one.hidden(one.encode(before)) @ joint.T + bias)

    return Ends(one.first, one.center, one.bias, encode, two.hidden, two.last, two.offset)
