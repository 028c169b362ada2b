"""All scores of a store side by side, whichever layers they lie in: those of a model, of detectors, of ensembles."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float32, Int64, Shaped

from distspec.errors import LayoutError
from distspec.store import Layer

__all__ = ["Scores", "joined_scores", "score_names"]


def score_names(layer: Layer) -> list[str]:
    """Name the scores of a layer: what it says itself, else its fields that hold one number per row."""
    named = layer.attributes.get("scores")
    return list(named) if named else [name for name, (_, shape) in layer.fields.items() if shape == ()]


def joined_scores(wanted: Sequence[str], scores: "Scores") -> list[str]:
    """Name the scores that are compared and joined to ensembles: those wanted, else one or a few of each kind."""
    if wanted:
        return list(dict.fromkeys(wanted))
    # The first score of a detector bears its name; others of its layer are variants.
    detectors = [score_names(layer)[0] for layer in scores.layers if "detector" in layer.attributes]
    return [*(name for name in ("chi2", "mse", "density") if name in scores.names), *detectors]


class Scores:
    """Scores of the same rows from several layers, read by shard as from one.

    Arguments:
        layers: over all rows of one store; every score's name is its own.

    Raises:
        LayoutError: the layers have other rows or shards, or a score comes twice.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.layers = list(layers)
        self._of: dict[str, Layer] = {}
        for layer in self.layers:
            first = self.layers[0]
            if (layer.parts, layer.shard_rows) != (first.parts, first.shard_rows):
                raise LayoutError(
                    f"{layer.name} has {layer.rows} rows, {first.name} has {first.rows}; run `distspec score` and "
                    "`distspec detect` on this store"
                )
            for name in score_names(layer):
                if name in self._of:
                    raise LayoutError(f"score {name!r} is in {self._of[name].name} and in {layer.name}; name one anew")
                self._of[name] = layer

    @property
    def names(self) -> list[str]:
        """Names of the scores, layer by layer."""
        return list(self._of)

    @property
    def rows(self) -> int:
        """Number of spectra, those set aside included."""
        return self.layers[0].rows if self.layers else 0

    @property
    def shards(self) -> int:
        """Number of shards."""
        return self.layers[0].shards if self.layers else 0

    @property
    def key(self) -> tuple[str, ...]:
        """What names these scores: those of their layers."""
        return tuple(layer.name for layer in self.layers)

    def bounds(self, shard: int) -> tuple[int, int]:
        """Give the first row of a shard and one past its last."""
        return self.layers[0].bounds(shard)

    def layer(self, name: str) -> Layer:
        """Give the layer that a score lies in."""
        if name not in self._of:
            raise LayoutError(f"no score {name!r}; there are {', '.join(self._of)}")
        return self._of[name]

    def only(self, names: Iterable[str]) -> "Scores":
        """Give some of the scores, in the order named."""
        chosen = Scores([])
        chosen._of = {name: self.layer(name) for name in names}
        chosen.layers = list(dict.fromkeys(chosen._of.values()))
        return chosen

    def read(self, name: str, start: int, stop: int) -> Float32[np.ndarray, "n"]:
        """Read one score of a run of rows; NaN for what is set aside."""
        values: Float32[np.ndarray, "n"] = self.layer(name).read(name, start, stop)
        return values

    def read_shard(self, shard: int, *names: str) -> tuple[Shaped[np.ndarray, "n"], ...]:
        """Read some scores of one shard."""
        start, stop = self.bounds(shard)
        return tuple(self.read(name, start, stop) for name in names)

    def take(self, name: str, rows: Int64[np.ndarray, "m"]) -> Float32[np.ndarray, "m"]:
        """Read one score of single rows, in the order given."""
        values: Float32[np.ndarray, "m"] = self.layer(name).take(name, rows)
        return values

    def __repr__(self) -> str:
        return f"Scores({', '.join(self._of)}: {self.rows} rows)"
