import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distspec import cli
from distspec.config import Experiment, dump
from distspec.models.checkpoint import Checkpoint
from distspec.pipeline import Products
from distspec.sources.simulation.survey import SimulatedSurvey
from distspec.stages.order import STAGES
from distspec.stages.train.accuracy import as_text
from tests.support.processes import finished
from tests.support.small import small
from tests.support.survey_files import write_sdss


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command line in this process and give its exit status."""
    monkeypatch.setattr(sys, "argv", ["distspec", *words])
    try:
        cli.main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run something that must be refused: one line on stderr, nothing on stdout, exit status 2."""
    assert call(monkeypatch, *words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("distspec: ")
    return said.err


def test_a_run_ends_by_naming_what_it_made(
    done: tuple[Experiment, Products],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    experiment, made = done
    file = tmp_path / "small.toml"
    file.write_text(dump(experiment), "utf-8")
    assert call(monkeypatch, "run", str(file)) == 0
    said = capsys.readouterr().out
    for named in (made.store.path, made.checkpoint.folder, "report.html", "anomalies.csv", f"distspec ui {file}"):
        assert named in said
    assert "700 spectra" in said
    assert call(monkeypatch, "config", str(file)) == 0
    assert capsys.readouterr().out == dump(experiment)


def test_train_prints_the_table_of_errors(
    whole: tuple[Experiment, Products],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    experiment, made = whole
    file = tmp_path / "whole.toml"
    file.write_text(dump(experiment), "utf-8")
    assert call(monkeypatch, "train", str(file)) == 0
    said = capsys.readouterr().out
    assert said.endswith(as_text(made.checkpoint.facts["accuracy"]) + "\n")
    assert "distspec ui" in said
    assert call(monkeypatch, "explain", str(file)) == 0
    said = capsys.readouterr().out
    assert f"layers/{made.ascents.name}" in said
    assert "RMSE" not in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "demo", "train.epoch=3"), "unknown setting 'train.epoch'"),
        (("run", "nowhere.toml"), "no settings file 'nowhere.toml'"),
        (("plan", "demo", "train.epoch=3"), "unknown setting 'train.epoch'"),
        (("plan", "nowhere.toml"), "no settings file 'nowhere.toml'"),
        (("run",), "distspec --help"),
        (("frobnicate",), "frobnicate"),
        (("run", "demo", "--fast"), "--fast"),
        (("ui", "demo", "output=/nowhere/at/all"), "no runs in /nowhere/at/all yet"),
        (("score", "demo", "output=nothing-here"), "no store at"),
    ],
)
def test_words_that_make_no_sense_are_refused(
    words: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refused(monkeypatch, capsys, *words)


@pytest.mark.parametrize(
    ("kind", "make", "says"),
    [
        ("sdss", "nothing", "no"),
        ("sdss", "empty folder", "no"),
        ("sdss", "truncated", "truncated"),
        ("sdss", "html", "not FITS but a web page"),
        ("sdss", "zero bytes", "empty"),
        ("desi", "nothing", "no"),
        ("desi", "empty folder", "no"),
        ("desi", "truncated", "truncated"),
        ("desi", "html", "not FITS but a web page"),
    ],
)
def test_bad_survey_files_are_refused_and_leave_no_store(
    kind: str,
    make: str,
    says: str,
    ray_session: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "coadd-main-dark-1.fits" if kind == "desi" else "spec-0266-51602-0001.fits"
    target = tmp_path / "files" / name
    target.parent.mkdir()
    match make:
        case "nothing":
            target = tmp_path / "none"
        case "empty folder":
            target = target.parent
        case "truncated":
            written = write_sdss(SimulatedSurvey(small(tmp_path).ingest.source, 5), tmp_path / "whole", range(1))
            target.write_bytes(written[0].read_bytes()[:20_000])
        case "html":
            target.write_text("<!DOCTYPE html><html>Service unavailable</html>")
        case "zero bytes":
            target.write_bytes(b"")
    output = tmp_path / "out"
    words = ("demo", f"ingest.source={{kind='{kind}', path='{target}'}}", "ingest.prepare.dust.kind=none")
    said = refused(monkeypatch, capsys, "run", *words, f"output={output}")
    assert says in said
    assert str(target if make != "empty folder" else target.name) in said
    assert not (output / "store.zarr").exists()
    assert not (output / "report.html").exists()


def test_a_model_of_another_grid_is_refused_naming_both(
    done: tuple[Experiment, Products],
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    experiment, _ = done
    file = tmp_path / "small.toml"
    file.write_text(dump(experiment), "utf-8")
    said = refused(monkeypatch, capsys, "score", str(file), f"score.checkpoint={checkpoint.folder}")
    assert "300 pixels" in said
    assert "240 pixels" in said


@pytest.mark.parametrize("where", ["/proc/nowhere/out", "file/out"])
def test_an_output_that_cannot_be_written_is_refused(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    assert "cannot write to the output" in refused(monkeypatch, capsys, "run", "demo", f"output={where}")


@pytest.mark.parametrize("verb", ["fetch", *(stage.name for stage in STAGES)])
def test_the_help_of_a_verb_is_what_its_stage_says_of_itself(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert call(monkeypatch, verb, "--help") == 0
    said = capsys.readouterr().out
    place = "distspec.stages.fetch" if verb == "fetch" else f"distspec.stages.{verb}.stage"
    assert " ".join(str(importlib.import_module(place).__doc__).split()) in " ".join(said.split())
    assert f"distspec config --explain {verb}" in said
    assert max(len(line) for line in said.splitlines()) <= 80


def test_help_wraps_text_and_lists_and_leaves_examples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    assert cli._wrapped("one two three four\nfive six seven") == "one two three four five\nsix seven"
    assert cli._wrapped("- one two three four five six\n- seven") == "- one two three four\n  five six\n- seven"
    example = "    [train]\n    epochs = 40   # of all of them"
    assert cli._wrapped(example) == example


def test_help_answers_without_heavy_imports() -> None:
    probe = (
        "import sys; sys.argv = ['distspec', '--help']\n"
        "from distspec.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'ray', 'torch', 'mlflow', 'zarr', 'astropy', 'bokeh', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    verbs = re.findall(r"^[│ ]*([a-z]+) {2,}\w", said.stdout, re.MULTILINE)
    assert verbs == ["demo", "run", "plan", "fetch", *(stage.name for stage in STAGES), "config", "ui"]


@pytest.mark.slow
def test_a_refusal_is_one_line_in_a_real_process_too(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "distspec", "run", "demo", "ingest.source={kind='sdss', path='none'}"]
    words += ["ingest.prepare.dust.kind=none", f"output={tmp_path / 'out'}"]
    said = finished(words)
    assert said.returncode == 2
    assert said.stderr.count("\n") == 1, said.stderr
    assert "Traceback" not in said.stderr
