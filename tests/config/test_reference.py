"""`distspec config --explain` says of every setting what it means, what it may be and what it is by default."""

import pkgutil
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
from pydantic import TypeAdapter

from distspec import cli, config
from distspec.config import Experiment, Settings, load, load_fetch
from distspec.config.fetch import Fetch
from distspec.config.reference import Section, describe, meaning, sections
from distspec.errors import ConfigError


def every_class() -> set[type[Settings]]:
    """Find all settings classes of the room."""
    for module in pkgutil.iter_modules(config.__path__, "distspec.config."):
        import_module(module.name)
    found = [Settings]
    for one in found:
        found += [inner for inner in one.__subclasses__() if inner.__module__.startswith("distspec.")]
    return set(found[1:])


def blocks(text: str) -> dict[str, dict[str, str]]:
    """Part a page into the settings of each heading, in one line each."""
    found: dict[str, dict[str, str]] = {}
    for block in text.split("\n\n"):
        heading, *lines = block.splitlines()
        settings = found.setdefault(heading, {})
        name = ""
        for line in lines:
            if new := re.match(r"  ([a-z]\w*) (\(.*)", line):
                name = new.group(1)
                settings[name] = new.group(2)
            elif name:
                settings[name] += " " + line.strip()
    return found


def limits(schema: Any) -> Iterator[str]:
    """Give every bound, choice and pattern of a JSON schema, without those of tables inside."""
    if isinstance(schema, list):
        for inner in schema:
            yield from limits(inner)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            if key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "minLength") and value != 1:
                yield f"{value:g}" if abs(value) < 1e5 else str(value)
            elif key == "enum":
                yield from (f'"{one}"' for one in value)
            elif key == "pattern":
                yield value.strip("^$")
            elif key in ("anyOf", "items", "prefixItems", "additionalProperties"):
                yield from limits(value)


# --- all of them ------------------------------------------------------------------------------------------------------


def test_every_class_and_every_setting_has_words() -> None:
    silent = [one.__name__ for one in every_class() if not meaning(one)]
    silent += [f"{one.__name__}.{name}" for one in every_class() for name in one.model_fields if not meaning(one, name)]
    assert silent == []
    assert len(every_class()) > 70


def test_every_class_that_can_be_set_is_a_section() -> None:
    shown = {section.settings for section in sections()}
    # What kinds share is shown with each of them.
    shared = {one for one in every_class() if one.__subclasses__()} - shown
    assert every_class() - shared == shown
    assert {one.__name__ for one in shared} == {"Classical", "Density", "Method"}


def test_a_page_has_every_setting_of_every_section_once_and_in_order() -> None:
    page = blocks(describe([], 4000).split("\n\n", 1)[1])
    assert list(page) == [section.title for section in sections()]
    for section in sections():
        expected = [name for name in section.settings.model_fields if name != "kind"]
        assert list(page[section.title]) == expected


def test_every_bound_and_choice_is_stated() -> None:
    page = blocks(describe([], 4000).split("\n\n", 1)[1])
    whole = Experiment.model_json_schema()
    schemas = {**whole["$defs"], **TypeAdapter(Fetch).json_schema()["$defs"], "Experiment": whole}
    counted = 0
    for section in sections():
        schema = schemas[section.settings.__name__]
        for name, text in page[section.title].items():
            for limit in limits(schema["properties"][name]):
                counted += 1
                assert limit in text, (section.title, name, limit)
    assert counted > 200


def test_defaults_are_those_that_a_run_takes() -> None:
    page = blocks(describe([], 4000).split("\n\n", 1)[1])
    settings = load(None, ["train.second={}", "train.density={kind='spline'}"])
    for name, value in (
        ("train", settings.train),
        ("train.second", settings.train.second),
        ("train.density.fit (in train.density.spline)", settings.train.density.fit),
        ("cluster", settings.cluster),
        ("fetch.transfer (in fetch.sparcl)", load_fetch("sparcl", ["to=x", "ids=y"]).transfer),
        ("fetch.transfer (in fetch.sdss or fetch.desi)", load_fetch("desi", ["to=x", "ids=y"]).transfer),
    ):
        numbers = {key: one for key, one in value.model_dump().items() if type(one) in (int, float)}
        assert len(numbers) > 2
        for key, number in numbers.items():
            assert f"; default {number})" in page[name][key], (name, key)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("train.epochs", "epochs (integer ≥ 1; default 40)"),
        ("train.validation", "validation (number > 0 and < 1; default 0.1)"),
        ("train.gpu", "gpu (true or false; default false)"),
        ("train.loss", 'loss ("chi2" or "mse"; default "chi2")'),
        ("train.clip", "clip (number > 0, or false for none; default none)"),
        ("train.second", "train.second"),
        ("train.density", 'train.density, kind "sliced"'),
        ("train.density.regularization", "(pair of numbers from 0 to 1, or false for none; default [0.5, 0.99])"),
        ("ingest.prepare.sky.windows", "windows (list of pairs of numbers > 0; default [[5565.0, 5590.0]])"),
        ("ingest.source.pixels", "pixels (integer from 16 to 1000000; required)"),
        ("ingest.source.wanted.where.one_of", "one_of (list of text or integer; default none)"),
        ("score.trim_percentage", "(number > 0 and ≤ 100; default 97.0)"),
        ("explain.methods.windows", "(list of integers ≥ 1, at least 1 of them; default [1, 4, 16, 64, 256])"),
        ("explain.scores", "(list of text of the form [a-z][a-z0-9_]*, at least 1 of them; default"),
        (
            "output",
            'output (text; default "distspec-output")\n      Folder that receives everything, or an address in a',
        ),
        ("fetch.where", "where (table of lists of text, integer or number; default {})"),
        ("ingest", 'source (section ingest.source, of kind "simulate", "sdss", "desi",'),
        ("ingest", 'default kind "simulate")\n      Where spectra come from.'),
        ("ingest", "prepare (section ingest.prepare)\n"),
        ("ingest", "values (tables [[ingest.values]]; default [])"),
        ("explain", "ascent (section explain.ascent, or false for none; on by default)"),
        ("explain", 'default [{ kind = "lime" }])'),
    ],
)
def test_what_a_setting_may_be_is_said_in_words(place: str, says: str) -> None:
    assert says in describe([place], 120 if place != "ingest" else 200)


@pytest.mark.parametrize(
    ("place", "there", "absent"),
    [
        ("train", {"train", 'train.model, kind "dense"', "train.second"}, {"tune", "experiment"}),
        ("experiment", {"experiment"}, {"train"}),
        ("train.density.sliced", {'train.density, kind "sliced"'}, {'train.density, kind "spline"', "train"}),
        ("train.density.spline", {"train.density.fit (in train.density.spline)"}, {'train.density, kind "sliced"'}),
        ("fetch.sdss", {'fetch, kind "sdss"', "fetch.transfer (in fetch.sdss or fetch.desi)"}, {'fetch, kind "desi"'}),
        ("fetch", {'fetch, kind "sparcl"', "fetch.transfer (in fetch.sparcl)"}, {"train"}),
        ("ingest.source.path", {'ingest.source, kind "sdss"'}, {'ingest.source, kind "simulate"', "ingest"}),
    ],
)
def test_a_section_is_shown_with_all_below_it(place: str, there: set[str], absent: set[str]) -> None:
    headings = set(blocks(describe([place], 200)))
    assert there <= headings
    assert not absent & headings


def test_several_sections_are_shown_as_they_are_asked_for() -> None:
    assert list(blocks(describe(["tune", "cluster"]))) == ["tune", "cluster"]


@pytest.mark.parametrize("width", [60, 80, 132])
def test_lines_keep_to_the_width(width: int) -> None:
    lines = describe([], width).splitlines()
    assert max(map(len, lines)) <= width
    assert max(map(len, lines)) > width - 5


def test_a_section_that_is_not_there_is_refused_with_all_that_are() -> None:
    for place in ("trian", "train.modle", "train.density.dense", "epochs", "train.", ""):
        with pytest.raises(ConfigError, match=f"no section '{place}'; there are experiment, ingest, ") as one:
            describe([place])
        assert "\n" not in str(one.value)


def test_a_section_of_several_kinds_is_titled_by_kind() -> None:
    assert Section("a", Experiment, {}, "b", ("c.d", "c.e")).title == 'a, kind "b" (in c.d or c.e)'


# --- on the command line ----------------------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["distspec", *words])
    try:
        cli.main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def test_config_explains_all_or_a_section(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert call(monkeypatch, "config", "--explain") == 0
    assert capsys.readouterr().out == describe([], 70) + "\n"
    for words in (("--explain", "train.density"), ("train.density", "--explain")):
        assert call(monkeypatch, "config", *words) == 0
        assert capsys.readouterr().out == describe(["train.density"], 70) + "\n"
    assert call(monkeypatch, "config", "--explain", "score", "fetch.sdss") == 0
    assert capsys.readouterr().out == describe(["score", "fetch.sdss"], 70) + "\n"


def test_config_refuses_a_section_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "config", "--explain", "trian") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("distspec: no section 'trian'; there are experiment, ingest,")
    assert said.err.count("\n") == 1
