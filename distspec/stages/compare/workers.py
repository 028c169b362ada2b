"""Work of `distspec compare`, in a worker: the scores of a shard joined to ensembles by their ranks in the survey.

Ensembles are scores like any other, in a layer of their own.
"""

import io
from typing import Any
from zipfile import BadZipFile

import numpy as np

from distspec.addresses import Place
from distspec.errors import StoreError
from distspec.results.scores import Scores
from distspec.statistics.ensembles import SurvivalFunction, rank_mean, rank_union
from distspec.store import SpectraStore

__all__ = ["EnsembleScorer"]


class EnsembleScorer:
    """Joins the scores of one shard after the other by their ranks in the survey; lives in a worker."""

    def __init__(self, store: str, survivors: Place, layer: str, places: dict[str, str]) -> None:
        self._store = SpectraStore.open(store, write=True)
        self._layer = self._store.layer(layer)
        self._names = list(places)
        self._scores = Scores(self._store.layer(place) for place in dict.fromkeys(places.values()))
        with _opened(survivors) as arrays:
            self._survivors = {
                score: SurvivalFunction(arrays[f"{score}.edges"], arrays[f"{score}.counts"]) for score in places
            }

    def __call__(self, shard: int) -> int:
        values = self._scores.read_shard(shard, *self._names)
        shares = np.stack(
            [self._survivors[score].shares(column) for score, column in zip(self._names, values, strict=True)], axis=1
        )
        self._layer.write(shard, {"rank_mean": rank_mean(shares), "rank_union": rank_union(shares)})
        return shard


def _opened(path: Place) -> Any:
    """Open the distributions that ensembles rank by.

    Raises:
        StoreError: the file is damaged or gone.
    """
    try:
        return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, BadZipFile) as error:
        raise StoreError(f"cannot read {path}: {error}; remove its folder and run `distspec compare` again") from error
