"""What the report says of a comparison, from its JSON alone."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distspec.config import Compare
from distspec.results.columns import exposure_columns
from distspec.results.scores import Scores
from distspec.stages.compare.bias import find_groups, measure_bias
from distspec.stages.compare.errors import measure_residuals
from distspec.stages.compare.section import about, between, content, figures
from distspec.stages.stage import Section
from distspec.statistics.overlap import ASSUMPTION, curve, estimate
from tests.support.sections import rendered
from tests.support.surveys import make_layer, make_survey

ROWS, SIZES = 2_000, (50, 200)


def made(folder: Path, lists: dict[str, np.ndarray], *, errors: bool = True, plate: Any = None) -> dict[str, Any]:
    """Make the JSON of a comparison of some lists, best first."""
    rng = np.random.default_rng(5)
    columns = {
        "snr": np.arange(ROWS, dtype=np.float32),
        "z": rng.random(ROWS),
        "plate": rng.integers(1, 30, ROWS) if plate is None else plate,
    }
    store = make_survey(folder, columns)
    layer = make_layer(
        store, "score-x", {"rmse": rng.lognormal(-3, 0.4, ROWS), "difference": rng.normal(0, 0.01, ROWS)}
    )
    scores = Scores([layer])
    joints = curve(lists, SIZES, ROWS)
    pairs = []
    names = list(lists)
    for first in range(len(names)):
        for second in range(first + 1, len(names)):
            shared = int(joints[200].overlaps[first, second])
            alone = estimate(shared, 200, 200, ROWS)
            spans = dict(zip(("low68", "high68", "low95", "high95"), (*alone.within68, *alone.within95), strict=True))
            pairs.append({"first": names[first], "second": names[second], "shared": shared, "n": alone.n} | spans)
    tops = {name: rows[:200] for name, rows in lists.items()}
    told = None if not errors else measure_residuals(store, layer, Compare().errors)
    facts = {
        "names": names,
        "spectra": ROWS,
        "scored": ROWS,
        "top": 200,
        "left_out": [5_000],
        "assumption": ASSUMPTION,
        "pairs": pairs,
        "joint": joints[200].to_dict(),
        "curve": [{"g": size, **joint.to_dict()} for size, joint in joints.items()],
        "bias": {"top": 100, **measure_bias(store, scores, {n: r[:100] for n, r in lists.items()}, ["snr", "z"])},
        "groups": find_groups(store, scores, tops, exposure_columns(Compare(), store), asked=False).to_dict(),
        "errors": None if told is None else told.facts,
    }
    return json.loads(json.dumps(facts, allow_nan=False))


def render(facts: dict[str, Any]) -> str:
    return rendered(
        Section("compare", "compare", "compare/section.html.jinja", {"compared": content(facts)}, figures(facts))
    )


def words(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page).replace("&nbsp;", " ").replace("&lt;", "<"))


def random_lists(count: int, pool: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    return {f"score_{number}": rng.permutation(pool)[:300].astype(np.int64) for number in range(count)}


def test_a_pool_is_told_with_its_assumption(tmp_path: Path) -> None:
    facts = made(tmp_path, random_lists(15, 1_000))  # of the 1,000 spectra of smallest S/N
    shown = content(facts)
    assert shown.implied is None and not shown.random
    text = words(render(facts))
    assert f"n ≈ {about(facts['joint']['pairs']['n'])}" in text
    assert 900 < facts["joint"]["pairs"]["n"] < 1_100
    assert ASSUMPTION in text
    assert "Lists of 5000 were asked for" in text
    # All lists prefer small S/N, and none a redshift.
    names = shown.properties
    cells = {
        (score, name): cell for score in shown.names for name, cell in zip(names, shown.leaning[score], strict=True)
    }
    assert names == ["snr", "z"]
    assert all(cell.significant == (name == "snr") for (_, name), cell in cells.items())
    assert all(cell.low > 0.4 and cell.high == 0 for (_, name), cell in cells.items() if name == "snr")
    assert f"{shown.leans} of {shown.tests} tests" in text and (shown.leans, shown.tests) == (15, 30)


@pytest.mark.slow
def test_lists_from_the_whole_survey_are_said_to_be_as_random_ones(tmp_path: Path) -> None:
    facts = made(tmp_path, random_lists(4, ROWS))
    assert content(facts).random
    assert "lists drawn at random from the whole survey would share as few" in words(render(facts))
    assert "None: no list holds more spectra of one plate (29)" in words(render(facts))


@pytest.mark.slow
def test_lists_of_several_pools_are_not_told_as_one(tmp_path: Path) -> None:
    same = {name: np.arange(300, dtype=np.int64) for name in ("a", "b", "c", "d", "e")}
    same["f"] = np.arange(900, 1_200)
    facts = made(tmp_path, same)
    assert facts["joint"]["distinct"] == 400
    # Ten of fifteen pairs share all: 200² / (200 · 10 / 15).
    assert content(facts).implied == "300"
    assert "these lists do not draw from one pool" in words(render(facts))


def test_lists_that_share_nothing_have_a_lower_limit(tmp_path: Path) -> None:
    lists = {f"score_{number}": np.arange(300, dtype=np.int64) + 300 * number for number in range(3)}
    facts = made(tmp_path, lists, errors=False)
    text = words(render(facts))
    assert f"At 95 % n is more than {facts['joint']['pairs']['within95'][0]:,}" in text
    assert "Errors of the reconstructions" not in text


def test_groups_that_share_a_plate_are_named(tmp_path: Path) -> None:
    plate = np.where(np.arange(ROWS) < 150, 266, np.arange(ROWS) % 20)
    rng = np.random.default_rng(2)
    lists = {"pca": np.arange(300, dtype=np.int64), "forest": rng.permutation(ROWS)[:300].astype(np.int64)}
    facts = made(tmp_path, lists, plate=plate)
    text = words(render(facts))
    assert "plate 266" in text and "pca 150 (15)" in text
    assert content(facts).more == 0


def test_what_a_name_holds_is_escaped(tmp_path: Path) -> None:
    lists = {"<script>": np.arange(300, dtype=np.int64), "b": np.arange(100, 400, dtype=np.int64)}
    facts = made(tmp_path, lists)
    group = {"columns": ["file"], "label": "file <b>&", "spectra": 9, "members": 5, "p": 1e-9}
    facts["groups"]["found"] = [group | {"lists": [{"score": "b", "members": 5, "expected": 0.9, "p": 1e-9}]}]
    page = render(facts)
    assert "<script>" not in page and "<b>&" not in page
    assert "file &lt;b&gt;&amp;" in page and "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((10_173, 15_637), "10,200 to 15,600"), ((20_800, None), "more than 20,800"), (None, None), ((7, 7), "7 to 7")],
)
def test_intervals_in_words(interval: tuple[int, int | None] | None, expected: str | None) -> None:
    assert between(interval) == expected
