"""Which spectra are held out of every fit, and which are taken where there are too many."""

import numpy as np
import pytest

from distspec.statistics import holdout
from distspec.statistics.holdout import held_out, limited


def test_even_two_spectra_can_be_trained_and_validated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdout, "_hash", lambda rows, seed: np.array([0.5, 0.9, 0.7])[rows])
    for block in (1, 3):
        monkeypatch.setattr(holdout, "_BLOCK", block)
        assert held_out(np.array([True, False, True]), 0.01, 0).tolist() == [True, False, False]
        assert held_out(np.array([True, False, True]), 0.8, 0).tolist() == [True, False, False]


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    for usable in (rng.random(300) < 0.8, np.arange(300) == 77, np.isin(np.arange(300), (3, 299)), np.zeros(300, bool)):
        for share in (0.0, 0.1, 1.0):
            monkeypatch.setattr(holdout, "_BLOCK", 1 << 20)
            whole = held_out(usable, share, 5)
            monkeypatch.setattr(holdout, "_BLOCK", 7)
            np.testing.assert_array_equal(held_out(usable, share, 5), whole)
            if usable.sum() >= 2:
                assert 0 < whole[usable].sum() < usable.sum()


def test_a_sample_ends_once_it_is_full(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    usable, looked = rng.random(6400) < 0.5, []
    flatnonzero = np.flatnonzero
    monkeypatch.setattr(np, "flatnonzero", lambda values: looked.append(len(values)) or flatnonzero(values))
    # Nothing is held: there is nothing to go on for, through a hundred chunks.
    kept = limited(usable, ~usable, 100, 64, 3)
    assert kept.sum() == 100
    assert not (kept & ~usable).any()
    assert 2 <= len(looked) <= 6
