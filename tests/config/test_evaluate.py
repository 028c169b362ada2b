from typing import get_args

from distspec.planting import KINDS

from distspec.config.evaluate import PlantedKind


def test_kinds_are_all_that_can_be_planted() -> None:
    assert get_args(PlantedKind) == KINDS
