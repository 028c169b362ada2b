"""Which spectra are kept for validation, and which are taken where not all can be: drawn by a hash of the row.

The same rows are held out of everything that is fitted, networks and classical detectors alike, so that what is
measured on them is fair to all.
"""

import numpy as np
from jaxtyping import Bool, Float64, UInt64

__all__ = ["held_out", "limited"]

_BLOCK = 1 << 20
"""Rows that are drawn at once, so that memory does not grow with the survey by more than a byte a row."""


def held_out(usable: Bool[np.ndarray, "rows"], share: float, seed: int) -> Bool[np.ndarray, "rows"]:
    """Choose the validation set: the rows drawn below its share, and of few spectra one at least on either side."""
    held = np.zeros(len(usable), bool)
    lowest, highest = (np.inf, -1), (-np.inf, -1)
    for start in range(0, len(usable), _BLOCK):
        draw = _hash(np.arange(start, min(start + _BLOCK, len(usable)), dtype=np.uint64), seed)
        held[start : start + _BLOCK] = draw < share
        candidates = np.flatnonzero(usable[start : start + _BLOCK])
        if len(candidates):
            low, high = (int(candidates[find(draw[candidates])]) for find in (np.argmin, np.argmax))
            # Of equal ones the first.
            lowest = min(lowest, (float(draw[low]), start + low))
            highest = max(highest, (float(draw[high]), -start - high))
    if usable.sum() >= 2:
        held[lowest[1]] = True
        held[-highest[1]] = False
    return held


def limited(
    usable: Bool[np.ndarray, "rows"], held: Bool[np.ndarray, "rows"], limit: int, chunk: int, seed: int
) -> Bool[np.ndarray, "rows"]:
    """Choose whole chunks at random until they hold enough to train on; of the last one only what is missing."""
    if int((usable & ~held).sum()) <= limit:
        return usable
    kept, left = np.zeros_like(usable), limit
    both = not (usable & held).any()  # or there is nothing held to wait for
    for index in np.random.default_rng([seed, limit]).permutation(-(-len(usable) // chunk)):
        span = slice(index * chunk, (index + 1) * chunk)
        training = np.flatnonzero(usable[span] & ~held[span])
        kept[span] = usable[span]
        kept[span][training[left:]] = False
        left -= min(left, len(training))
        both = both or bool((usable[span] & held[span]).any())
        if not left and both:
            break
    return kept


def _hash(rows: UInt64[np.ndarray, "n"], seed: int) -> Float64[np.ndarray, "n"]:
    """Give each row a number in [0, 1) that looks random (splitmix64 of row and seed)."""
    with np.errstate(over="ignore"):
        mixed = rows * np.uint64(0x9E3779B97F4A7C15) + np.uint64((seed * 0xD1342543DE82EF95 + 1) % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))).astype(np.float64) / 2.0**64
