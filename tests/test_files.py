"""What is written appears whole or not at all, and tables say the same to every reader."""

import csv
import hashlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from distspec.errors import CheckpointError, SourceError, StoreError
from distspec.files import (
    csv_text,
    in_place,
    read_json,
    read_tensors,
    replacing,
    write_csv,
    write_file,
    write_folder,
)

FORMULAS = (
    *("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1"),
    *("-", "+", "-5.3 km/s", "-0x1F", "-1_0"),
)

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


# --- whole or not at all ---------------------------------------------------------------------------------------------


def test_a_file_is_replaced_by_its_new_content(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_file(path, "é\r\n")
    assert path.read_bytes() == "é\r\n".encode()
    write_file(path, b"\x00\n")
    assert path.read_bytes() == b"\x00\n"
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    write_file(tmp_path / "a", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, broken, full)
        with pytest.raises(StoreError, match=r"cannot write .*a: No space left on device; make room or choose another"):
            write_file(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_place_that_cannot_be_is_named_with_the_advice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*; choose another by export\.to"):
        write_file(tmp_path / "file" / "a", "", "choose another by export.to")


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", {"a": b"1", "b": b"2"})
    write_folder(tmp_path / "model", {"b": b"3"})
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["b"]
    assert (tmp_path / "model" / "b").read_bytes() == b"3"


def test_a_failed_rename_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "model", {"a": b"1"})
    rename = os.replace

    def refuse_new(source: Any, target: Any) -> None:
        if Path(source).joinpath("b").exists():
            full()
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse_new)
    with pytest.raises(StoreError, match="No space left"):
        write_folder(tmp_path / "model", {"b": b"2"})
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["a"]


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", {"a": b"1"})
    with pytest.raises(StoreError, match="cannot write"):
        write_file(tmp_path / "model", "text")
    assert names(tmp_path / "model") == ["a"]


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), in_place(tmp_path / "a") as partial:
        partial.write_text("half")
        assert names(tmp_path) == [partial.name]
        assert partial.name.startswith(".a.") and partial.name.endswith(".partial")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_errors_of_the_content_keep_their_words(tmp_path: Path) -> None:
    # A SourceError is an OSError too, and tells of another place than the one that is written.
    with pytest.raises(SourceError, match="no survey here"), in_place(tmp_path / "a"):
        raise SourceError("no survey here")
    with pytest.raises(PermissionError), replacing(tmp_path / "a"):
        raise PermissionError(13, "Permission denied")


# --- JSON and safetensors --------------------------------------------------------------------------------------------


def test_json_is_an_object_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(CheckpointError, match="No such file.*; run it again"):
        read_json(path, "run it again")
    path.write_text(json.dumps({"a": [1, None]}))
    assert read_json(path) == {"a": [1, None]}
    for text, said in (("[]", "is not a checkpoint's description"), ("{", "is not valid JSON"), ("[" * 10**5, "valid")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=said):
            read_json(path)
    with path.open("wb") as stream:
        stream.truncate((1 << 24) + 1)
    with pytest.raises(CheckpointError, match="far too large"):
        read_json(path)


def test_tensors_are_those_of_the_checksum(tmp_path: Path) -> None:
    path, content = tmp_path / "a.safetensors", save({"w": torch.arange(3.0)})
    sha256 = hashlib.sha256(content).hexdigest()
    with pytest.raises(CheckpointError, match="no weights at"):
        read_tensors(path, sha256)
    write_file(path, content)
    assert read_tensors(path, sha256)["w"].tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(CheckpointError, match="damaged or was changed"):
        read_tensors(path, "0" * 64)
    write_file(path, b"no tensors")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        read_tensors(path, hashlib.sha256(b"no tensors").hexdigest())


def test_tables_need_no_torch() -> None:
    code = "import sys, distspec.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- tables ----------------------------------------------------------------------------------------------------------


def test_text_is_quoted_and_numbers_are_not() -> None:
    rows = [("12", 12, 1.5, True), ('say "no"', np.int64(7), np.float64(0.1), np.bool_(False))]
    assert csv_text(("id", "row", "z", "flag"), rows) == (
        '"id","row","z","flag"\n"12",12,1.5,True\n"say ""no""",7,0.1,False\n'
    )
    assert csv_text(("id", "row"), [("12", 12), ("a,b", 1)], quoted=False, end="\r\n") == (
        'id,row\r\n12,12\r\n"a,b",1\r\n'
    )
    assert csv_text("a", [("x\ry",), ("x\ny",)], quoted=False) == 'a\n"x\ry"\n"x\ny"\n'


def test_what_is_unknown_is_an_empty_cell() -> None:
    unknown = (None, math.nan, math.inf, np.float32("nan"), np.float64("-inf"))
    assert csv_text("abcde", [unknown], quoted=False) == "a,b,c,d,e\n,,,,\n"
    assert csv_text("a", [(None,)]) == '"a"\n""\n'


def test_a_float32_has_its_own_digits() -> None:
    values = np.array([0.1, 1e-9, 16777216.0, -3.4e38], np.float32)
    text = csv_text("a", [(value,) for value in values])
    assert text.splitlines()[1:] == ["0.1", "1e-09", "16777216.0", "-3.4e+38"]
    assert csv_text("a", [(float(values[0]),)]).splitlines()[1] == "0.10000000149011612"


@pytest.mark.parametrize("quoted", [True, False])
@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_made_harmless(text: str, quoted: bool) -> None:
    ((found,),) = list(csv.reader(io.StringIO(csv_text("a", [(text,)], quoted=quoted), newline="")))[1:]
    assert found == f"'{text}"
    ((found,),) = list(csv.reader(io.StringIO(csv_text((text,), (), quoted=quoted), newline="")))
    assert found == f"'{text}"


@pytest.mark.parametrize("text", ["-5.3", "+5", "-.5", "-5.", "+1e-9", "-1E+09", "J1200-0100", "a=b", "", " x", "'=1"])
def test_other_text_stays(text: str) -> None:
    ((found,),) = list(csv.reader(io.StringIO(csv_text("a", [(text,)]), newline="")))[1:]
    assert found == text


def test_negative_numbers_are_numbers() -> None:
    assert csv_text("abc", [(-1, -0.5, np.float32(-0.1))]).splitlines()[1] == "-1,-0.5,-0.1"


@given(st.lists(st.tuples(TEXT, st.floats(allow_nan=False, allow_infinity=False))))
def test_a_table_is_read_back(rows: list[tuple[str, float]]) -> None:
    stream = io.StringIO(csv_text(("name", "value"), rows), newline="")
    found = list(csv.reader(stream, quoting=csv.QUOTE_NONNUMERIC))[1:]
    assert [value for _, value in found] == [value for _, value in rows]
    sparing = list(csv.reader(io.StringIO(csv_text(("name", "value"), rows, quoted=False), newline="")))[1:]
    assert [(cell, float(value)) for cell, value in sparing] == [tuple(cells) for cells in found]
    assert all(cell in (name, f"'{name}") for (cell, _), (name, _) in zip(found, rows, strict=True))


def test_a_written_table_is_the_text(tmp_path: Path) -> None:
    rows = [("é\r\n", 1), ("=1", 2)]
    write_csv(tmp_path / "a.csv", ("id", "row"), iter(rows))
    assert (tmp_path / "a.csv").read_bytes() == csv_text(("id", "row"), rows).encode()

    def broken() -> Any:
        yield "a", 1
        full()

    with pytest.raises(StoreError, match="No space left"):
        write_csv(tmp_path / "a.csv", ("id", "row"), broken())
    assert names(tmp_path) == ["a.csv"]
    assert (tmp_path / "a.csv").read_bytes() == csv_text(("id", "row"), rows).encode()
