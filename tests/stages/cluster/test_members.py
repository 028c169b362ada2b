"""Peaks of mean weights have the places and lines that they were made with."""

import numpy as np

from distspec.stages.cluster.members import peaks


def test_peaks_are_told_with_their_lines_from_the_highest_down() -> None:
    edges = np.linspace(4_800, 5_100, 31)  # 10 Å
    mean = np.full(30, 0.05)
    mean[[19, 20, 21]] = 0.6, 1.0, 0.55  # 4990 to 5020: [O III] 5008
    mean[6] = 0.5  # 4860 to 4870: H beta
    mean[26] = 0.31
    mean[28] = 0.29  # too low to be told
    signed = -mean
    found = peaks(mean, signed, edges, rest=True)
    assert [(one.low, one.high, one.top, one.value) for one in found] == [
        (4_990, 5_020, 5_005, 1.0),
        (4_860, 4_870, 4_865, 0.5),
        (5_060, 5_070, 5_065, 0.31),
    ]
    assert [one.lines for one in found] == [("[O III] 5008",), ("H beta",), ()]
    assert [one.signed for one in found] == [-1.0, -0.5, -0.31]
    assert [one.lines for one in peaks(mean, signed, edges, rest=False)] == [(), (), ()]
    (whole,) = peaks(np.ones(30), signed, edges, rest=True)
    assert (whole.low, whole.high) == (4_800, 5_100)
    assert peaks(np.zeros(30), np.zeros(30), edges, rest=True) == []


def test_a_continuum_is_named_after_no_line() -> None:
    edges = np.array([3_500.0, 5_500.0, 7_500.0])
    (found, other) = peaks(np.array([1.0, 0.4]), np.ones(2), edges, rest=True)
    assert (found.low, found.high, other.low) == (3_500, 5_500, 5_500)
    assert found.lines == other.lines == ()
