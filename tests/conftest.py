"""Fixtures that every test may ask for."""

import os
from pathlib import Path

import numpy as np
import pytest

REAL_DATA = Path(__file__).parents[2] / "shared" / "data" / "real"
"""Real survey files beside the checkout; tests that need them skip where they are absent."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--device", default="cpu", help="torch device of the model tests: cpu or cuda")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20_26)


@pytest.fixture
def real_data() -> Path:
    folder = Path(os.environ.get("DISTSPEC_REAL_DATA", REAL_DATA))
    if not folder.is_dir():
        pytest.skip(f"no real survey files at {folder}")
    return folder
