"""What the report says of an evaluation, from its JSON alone."""

import copy
import json
import re
from typing import Any

import pytest

from distspec.config import Experiment
from distspec.pipeline import Products
from distspec.stages.evaluate.section import content, figures
from distspec.stages.stage import Section
from tests.support.sections import rendered


@pytest.fixture
def facts(whole: tuple[Experiment, Products]) -> dict[str, Any]:
    """Of the whole run: ten scores and a detector, two kinds in a few hosts."""
    evaluated = whole[1].evaluation
    assert evaluated is not None
    return copy.deepcopy(json.loads((evaluated.folder / "evaluation.json").read_text("utf-8")))


def render(facts: dict[str, Any]) -> str:
    """Render the section as the page does; give its text alone."""
    section = Section(
        "evaluation", "Measured", "evaluate/section.html.jinja", {"evaluated": content(facts)}, figures(facts)
    )
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", rendered(section)))


def test_every_detector_and_kind_is_in_the_tables(facts: dict[str, Any]) -> None:
    told = render(facts)
    for name in (*facts["detectors"], *facts["kinds"]):
        assert name.replace("_", " ") in told or name in told
    assert f"{facts['background']}" in told


def test_a_background_too_small_for_any_list_is_told_and_leaves_the_area(facts: dict[str, Any]) -> None:
    facts["level"] = None
    for of_kind in facts["results"].values():
        for found in of_kind.values():
            found["recall"] = {level: [[None] * 3 for _ in facts["strengths"]] for level in found["recall"]}
    told = render(facts)
    assert f"Recall cannot be known from a background of {facts['background']:,} spectra" in told
    assert "Area under the curve" in told or "area under the curve" in told


def test_the_best_detector_heads_the_table(facts: dict[str, Any]) -> None:
    shown = content(facts)
    assert shown["tables"]["auc"]["rows"][0]["name"].replace("_", " ") in render(facts)
    assert {row["name"] for row in shown["tables"]["auc"]["rows"]} == set(facts["detectors"])
