"""A folder of facts is there when its JSON is, and says what is wrong with it."""

import math
import os
from pathlib import Path
from typing import Any

import pytest

from distspec.errors import CheckpointError, StoreError
from distspec.results.facts import Facts, find, write

CONTENT = {"schema": 2, "share": 0.1, "edges": (1, 2), "none": None}


def test_what_is_written_is_found_equal(tmp_path: Path) -> None:
    made = write(tmp_path / "a", "facts.json", CONTENT, {"table.csv": "row\n", "array.bin": b"\x00"})
    assert made == find(tmp_path / "a", "facts.json", 2, "cluster")
    assert made == Facts(tmp_path / "a", CONTENT | {"edges": [1, 2]})
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir() if path.name != "facts.json"} == {
        "table.csv": b"row\n",
        "array.bin": b"\x00",
    }


def test_the_form_on_disk(tmp_path: Path) -> None:
    write(tmp_path, "one.json", {"a": [1], "b": "é"})
    assert (tmp_path / "one.json").read_bytes() == b'{\n "a": [\n  1\n ],\n "b": "\\u00e9"\n}\n'
    write(tmp_path, "two.json", {"a": [1]}, indent=None)
    assert (tmp_path / "two.json").read_bytes() == b'{"a": [1]}\n'


def test_without_its_json_a_folder_holds_nothing(tmp_path: Path) -> None:
    assert find(tmp_path / "none", "facts.json", 2, "cluster") is None
    (tmp_path / "table.csv").write_text("row\n")
    assert find(tmp_path, "facts.json", 2, "cluster") is None


def test_the_json_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    rename = os.replace

    def spy(source: Any, target: Any) -> None:
        written.append(Path(target).name)
        if written[-1] == "b.csv":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", spy)
    with pytest.raises(StoreError, match=r"cannot write .*b\.csv: No space left"):
        write(tmp_path, "facts.json", CONTENT, {"a.csv": "", "b.csv": ""})
    assert written == ["a.csv", "b.csv"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_what_stood_there_stays_until_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "part-0.npz").write_bytes(b"1")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path, "facts.json", {"n": math.inf}, {"a.csv": ""})
    assert [path.name for path in tmp_path.iterdir()] == ["part-0.npz"]
    write(tmp_path, "facts.json", {"n": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.json", "part-0.npz"]


def test_another_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "facts.json", CONTENT)
    with pytest.raises(CheckpointError, match=r"has schema 2, expected 3; remove it and evaluate again"):
        find(tmp_path, "facts.json", 3, "evaluate")
    write(tmp_path, "facts.json", {"g": 3})
    with pytest.raises(CheckpointError, match="has schema None, expected 3"):
        find(tmp_path, "facts.json", 3, "evaluate")
    assert find(tmp_path, "facts.json", None, "compare") == Facts(tmp_path, {"g": 3})


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_damaged_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "facts.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"facts\.json"):
        find(tmp_path, "facts.json", None, "compare")
