"""The house rules that a reader relies on: the tree in the README is the real one, a verb's names agree."""

import re
import subprocess
from pathlib import Path

import pytest

import distspec
from distspec import config
from distspec.pipeline import EXTRA, STAGES

ROOT = Path(__file__).parents[1]


def tracked(folder: str) -> set[str]:
    """Name the files of the checkout under a folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", folder], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return {line for line in listed.stdout.splitlines() if (ROOT / line).is_file()}


def test_the_tree_in_the_readme_is_the_real_one() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    tree = re.search(r"```text\ndistspec/\n(.*?)```", readme, re.DOTALL)
    assert tree, "the README has no annotated tree"
    named: set[str] = set()
    folder = ""
    for line in tree.group(1).splitlines():
        found = re.match(r"( +)(\S+)  ", line + "  ")
        if not found:
            continue
        depth, name = len(found.group(1)) // 2, found.group(2)
        folder = f"{name}" if name.endswith("/") else folder if depth > 1 else ""
        if not name.endswith("/"):
            named.add(f"distspec/{folder}{name}")
    real = {path for path in tracked("distspec") if not path.endswith(("__init__.py", "py.typed"))}
    assert named == real


def test_a_verb_its_stage_its_settings_and_its_test_share_a_name() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    for stage in (*STAGES, *EXTRA, "fetch"):
        assert (ROOT / f"distspec/stages/{stage}.py").is_file()
        assert (ROOT / f"tests/stages/test_{stage}.py").is_file()
        assert hasattr(config, stage.title())
        assert f"`distspec {stage}`" in readme


def test_ci_calls_the_test_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    command = re.search(r"^(pip install -e .*pytest)$", readme, re.MULTILINE)
    assert command, "the README names no test command"
    assert command.group(1).replace(" && ", " --quiet && ") in (ROOT / ".ci/run").read_text()


def test_files_stay_small_enough_to_hold_one_idea() -> None:
    long = {
        path
        for path in tracked("distspec")
        if path.endswith(".py") and len((ROOT / path).read_text().splitlines()) > 500
    }
    assert long == set()


def test_the_changelog_and_the_version_agree() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", distspec.__version__)
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
