"""Which rows of a catalogue meet a condition, and which may be among the highest."""

import math
from functools import reduce
from operator import or_

import numpy as np
from jaxtyping import Bool, Float64, Shaped

from distspec.config import Condition
from distspec.errors import ConfigError
from distspec.sources.catalogs.rows import Chunk, kind_of

__all__ = ["Best", "passes"]


def passes(condition: Condition, chunk: Chunk, place: str) -> Bool[np.ndarray, "n"]:
    """Say which rows meet a condition; a missing value meets none.

    Raises:
        ConfigError: the condition does not suit what the column holds.
    """
    name = condition.column.lower()
    values = chunk.columns[name]
    good = ~chunk.missing[name]
    limits = [limit for limit in (condition.min, condition.max, condition.above, condition.below) if limit is not None]
    bits = condition.any_bits is not None or condition.no_bits is not None
    suits = values.ndim == 1 and (not limits or values.dtype.kind in "iufb") and (not bits or values.dtype.kind in "iu")
    if not suits:
        expected = "integers" if bits else "numbers" if limits else "values"
        raise ConfigError(f"{place}: {condition.column} holds {kind_of(values)}; expected one of {expected} a row")
    if condition.min is not None:
        good &= values >= _exact(condition.min, values, up=True)
    if condition.max is not None:
        good &= values <= _exact(condition.max, values, up=False)
    if condition.above is not None:
        good &= values > _exact(condition.above, values, up=False)
    if condition.below is not None:
        good &= values < _exact(condition.below, values, up=True)
    if condition.one_of is not None:
        good &= _is_one_of(condition, chunk, place)
    if condition.any_bits is not None:
        good &= _bits(values, condition.any_bits) != 0
    if condition.no_bits is not None:
        good &= _bits(values, condition.no_bits) == 0
    return np.asarray(good)


def _exact(limit: float, values: Shaped[np.ndarray, "n"], up: bool) -> float | int:
    """Replace a limit on integers by the integer that cuts at the same place: a float would round large ones."""
    if values.dtype.kind == "f":
        return limit
    return math.ceil(limit) if up else math.floor(limit)


def _is_one_of(condition: Condition, chunk: Chunk, place: str) -> Bool[np.ndarray, "n"]:
    assert condition.one_of is not None
    name = condition.column.lower()
    values = chunk.columns[name]
    if values.dtype.kind in "iufb" and all(isinstance(value, int) for value in condition.one_of):
        return reduce(or_, (values == value for value in condition.one_of), np.zeros(len(values), bool))
    words = values if chunk.text is None else chunk.text[name]
    if words.dtype.kind != "U":
        raise ConfigError(f"{place}: {condition.column} holds {kind_of(values)}; expected numbers in one_of")
    return np.isin(words, [str(value).strip() for value in condition.one_of])


def _bits(values: Shaped[np.ndarray, "n"], bits: tuple[int, ...]) -> Shaped[np.ndarray, "n"]:
    # Unsigned of the same width first: the sign of a short integer is no bit 63.
    unsigned = values.view(values.dtype.str.replace("i", "u")).astype(np.uint64)
    return unsigned & np.uint64(reduce(or_, (1 << bit for bit in bits), 0))


class Best:
    """Keeps the highest values seen so far, to pass over rows that cannot be among them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._highest: Float64[np.ndarray, "k"] = np.zeros(0)

    def may_take(self, values: Float64[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
        """Say which of these may be among the highest of all, those before and those to come included."""
        both = np.concatenate([self._highest, values])
        if len(both) < self._limit:
            self._highest = both
            return np.ones(len(values), bool)
        self._highest = np.partition(both, len(both) - self._limit)[len(both) - self._limit :]
        return np.asarray(values >= self._highest.min())
