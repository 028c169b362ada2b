from typing import get_args

from distspec.config.evaluate import PlantedKind
from distspec.stages.evaluate.injection import KINDS


def test_kinds_are_all_that_can_be_planted() -> None:
    assert get_args(PlantedKind) == KINDS
