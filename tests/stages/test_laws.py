"""What every stage promises, asked of all that are in the list."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from markupsafe import Markup

from distspec.cli import main
from distspec.config import Experiment, dump
from distspec.models.checkpoint import Checkpoint
from distspec.pipeline import Products, plan, run, told
from distspec.results.facts import Facts
from distspec.stages.order import STAGES
from distspec.stages.report.page import render_section
from distspec.stages.stage import Comparison, Job, Section, Stage, State
from distspec.store import Layer, SpectraStore

NAMES = [stage.name for stage in STAGES]
IN_RUN = [stage for stage in STAGES if stage.in_run]


def found(experiment: Experiment) -> Iterator[tuple[Stage, Job]]:
    """Give each stage of a run with what those before it left."""
    job = Job(experiment, stages=STAGES)
    for stage in IN_RUN:
        yield stage, job
        job = replace(job, have=stage.find(job))
    yield IN_RUN[-1], job


def states(experiment: Experiment) -> dict[str, State]:
    return {stage.name: stage.state(job) for stage, job in found(experiment)}


def identity(product: Any) -> Any:
    """Give what tells a product from another: names, digests and facts, and nothing that is new each time."""
    match product:
        case SpectraStore():
            return product.path, product.digest, product.rows, product.layers()
        case Layer():
            return product.name, product.pending(), dict(product.fields), dict(product.attributes)
        case Checkpoint():
            return product.folder, product.sha256, json.dumps(product.facts, sort_keys=True)
        case Comparison():
            return product.folder, json.dumps(product.content, sort_keys=True), identity(product.ensembles)
        case Facts():
            return product.folder, json.dumps(product.content, sort_keys=True)
        case Mapping():
            return {name: identity(value) for name, value in product.items()}
    return product


def print_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Give digest and time of all files and folders."""
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "", path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def finished(whole: tuple[Experiment, Products]) -> tuple[Experiment, Products, Job]:
    """Everything, made; and opened again."""
    experiment, made = whole
    return experiment, made, list(found(experiment))[-1][1]


@pytest.fixture(scope="module")
def sections(finished: tuple[Experiment, Products, Job]) -> list[Section]:
    """The sections of all stages, in their order."""
    return [section for stage in STAGES for section in stage.sections(finished[2])]


@pytest.fixture
def copied(whole: tuple[Experiment, Products], tmp_path: Path) -> Experiment:
    """The whole experiment in a place where it may be spoilt."""
    shutil.copytree(whole[0].output, tmp_path / "out", ignore=shutil.ignore_patterns("mlflow.db*", "mlartifacts"))
    return whole[0].model_copy(update={"output": str(tmp_path / "out")})


def test_a_stage_opens_only_what_stands_before_it() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for place, stage in enumerate(STAGES):
        assert set(stage.uses) <= set(NAMES[:place]), stage.name


def test_what_is_made_is_found_again(finished: tuple[Experiment, Products, Job]) -> None:
    _, made, job = finished
    # Of these there is nothing to open for a stage.
    ends = {"report", "table", "tuned", "exported"}
    names = [field.name for field in fields(Products) if field.name not in ends]
    assert all(getattr(made, name) for name in names)
    assert {name: identity(getattr(job.have, name)) for name in names} == {
        name: identity(getattr(made, name)) for name in names
    }


def test_what_is_made_is_done(whole: tuple[Experiment, Products]) -> None:
    after = states(whole[0])
    assert set(after) == {stage.name for stage in IN_RUN}
    for name, state in after.items():
        assert state.finished, (name, state)
        assert state.total > 0
        assert not state.why


def test_looking_writes_nothing_and_asks_for_no_lock(whole: tuple[Experiment, Products]) -> None:
    experiment, _ = whole
    output = Path(experiment.output)
    with FileLock(output / ".lock", timeout=0):
        before = print_of(output)
        planned = list(plan(experiment))
        assert states(experiment)
        assert print_of(output) == before
    assert [one.stage for one in planned] == NAMES
    assert {one.stage for one in planned if one.state and one.state.finished} == {stage.name for stage in IN_RUN}
    assert not any(one.after or one.off for one in planned)


def test_every_told_path_is_there(finished: tuple[Experiment, Products, Job]) -> None:
    _, made, job = finished
    for products in (made, job.have):
        lines = [(label, text) for label, text in told(products) if label]
        assert {label for label, _ in lines} >= {
            "store",
            "model",
            "scores",
            "compared",
            "reasons",
            "clusters",
            "measured",
        }
        for label, text in lines:
            assert Path(text.split(": ")[0]).exists(), (label, text)


def test_sections_have_an_anchor_for_each_title_and_figures_of_their_own(sections: list[Section]) -> None:
    pairs = {(section.anchor, section.title) for section in sections}
    assert len({anchor for anchor, _ in pairs}) == len({title for _, title in pairs}) == len(pairs)
    assert all(re.fullmatch(r"[a-z-]+", anchor) for anchor, _ in pairs)
    keys = [key for section in sections for key in section.figures]
    assert len(set(keys)) == len(keys)


def test_a_section_asks_for_its_own_figures_and_nothing_else(sections: list[Section]) -> None:
    class Places(dict[str, Markup]):
        def __missing__(self, key: str) -> Markup:
            self[key] = Markup("<figure></figure>")
            return self[key]

    shown = {section.template.split("/")[0] for section in sections}
    assert shown == {"train", "score", "compare", "explain", "cluster", "evaluate", "report"}
    for section in sections:
        places = Places()
        assert render_section(section, places).strip()
        assert set(places) == set(section.figures), section.template


@pytest.mark.slow
def test_a_run_says_what_is_done_already_and_makes_the_rest(
    whole: tuple[Experiment, Products], copied: Experiment
) -> None:
    said: list[str] = []
    made = run(copied, say=said.append)
    earlier = [stage.name for stage in IN_RUN if stage.name != "report"]
    assert said == [f"already done: {', '.join(earlier)}"]
    content = made.clusters.content
    shutil.rmtree(made.clusters.folder)
    assert states(copied)["cluster"] == State(0, 1, "clusterings", "these explanations are not clustered")
    said.clear()
    again = run(copied, say=said.append)
    before = earlier[: earlier.index("cluster")]
    assert said == [f"already done: {', '.join(before)}", "already done: evaluate"]
    assert again.clusters.content == content == whole[1].clusters.content


def test_a_plan_of_what_is_half_done_counts_it(whole: tuple[Experiment, Products], copied: Experiment) -> None:
    layers = Path(copied.output) / "store.zarr/layers"
    (layers / whole[1].scores.name / "commits/c/0").unlink()
    planned = {one.stage: one for one in plan(copied)}
    assert planned["score"].state == State(0, 1, "shards", "not scored by this model")
    assert planned["train"].state.finished
    assert planned["detect"].state.finished
    assert {name for name, one in planned.items() if one.after == "score"} == {
        "compare", "explain", "cluster", "evaluate", "report",
    }  # fmt: skip


def test_a_plan_prints_a_line_a_stage(
    whole: tuple[Experiment, Products],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "whole.toml").write_text(dump(whole[0]), "utf-8")
    monkeypatch.setattr(sys, "argv", ["distspec", "plan", str(tmp_path / "whole.toml")])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert lines[0].split()[1:] == ["done", "1", "of", "1", "shards"]
    assert lines[NAMES.index("tune")].endswith("no search yet (by name: distspec tune)")


@pytest.mark.slow
def test_a_plan_starts_no_ray_and_writes_nothing(whole: tuple[Experiment, Products], tmp_path: Path) -> None:
    (tmp_path / "whole.toml").write_text(dump(whole[0]), "utf-8")
    probe = (
        "import sys; sys.argv = ['distspec', 'plan', 'whole.toml']\n"
        "from distspec.cli import main\n"
        "main()\n"
        "import ray\n"
        "assert not ray.is_initialized()\n"
        "assert 'mlflow' not in sys.modules\n"
    )
    said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (said.returncode, said.stderr) == (0, "")
    assert len(said.stdout.splitlines()) == len(NAMES)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.toml"}
