"""Settings of clusters say what cannot be."""

from typing import Any

import pytest
from pydantic import ValidationError

from distspec.config import Cluster


@pytest.mark.parametrize(
    "wrong", [{"scan": (5, 2)}, {"scan": (1, 4)}, {"fraction": 0.0}, {"k": 0}, {"min_size": 1}, {"nearest": 0}]
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Cluster(**wrong)


def test_a_k_that_is_off_leaves_the_scan() -> None:
    found = Cluster.model_validate_json('{"k": false, "scan": [3, 3]}')
    assert found.k is None and found.scan == (3, 3)
