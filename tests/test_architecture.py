"""The house rules that a reader relies on: what stands where, how large it may be, which names agree."""

import ast
import builtins
import re
import subprocess
import symtable
import tomllib
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import distspec
from distspec import config
from distspec.stages.order import STAGES

ROOT = Path(__file__).parents[1]

OTHERS = {
    "test_architecture": "the house itself",
    "test_declared": "pyproject.toml",
    "runtime/test_faults": "faults that cost workers, in whole stages",
    "runtime/test_nodes": "nodes that are lost and that join",
    "test_bucket_only": "nodes that share nothing but a bucket",
    "test_demo": "the preset `demo`, end to end",
    "test_frozen_names": "names on disk, on the page and in the terminal",
    "test_processes": "tests/support/processes.py",
    "config/test_front_door": "config/__init__.py",
    "config/test_presets": "all of config/presets/",
    "explainers/test_known_oddities": "all explainers on spectra whose oddity is known",
    "prepare/test_faults": "the recipe on damaged spectra",
    "stages/test_laws": "what every stage promises",
    "stages/test_workers": "what starts in every worker",
    "stages/evaluate/test_injection_places": "where injected anomalies lie",
    "stages/ingest/test_growth": "a store that grows",
    "stages/ingest/test_real": "real survey files",
    "stages/train/test_kinds": "each kind of network",
    "store/test_extension": "a store that grows",
    "store/test_object_store": "a store in a bucket",
}
"""Tests of something else than one module of their name."""


class Module(NamedTuple):
    """A file of the package."""

    path: str
    name: str
    tree: ast.Module


def tracked(folder: str) -> set[str]:
    """Name the files of the checkout under a folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", folder], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return {line for line in listed.stdout.splitlines() if (ROOT / line).is_file()}


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    """All files of the package, parsed."""
    paths = sorted(path for path in tracked("distspec") if path.endswith(".py"))
    dotted = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths]
    texts = [(ROOT / path).read_text("utf-8") for path in paths]
    return [Module(path, name, ast.parse(text)) for path, name, text in zip(paths, dotted, texts, strict=True)]


def functions(modules: list[Module]) -> Iterator[tuple[Module, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield module, node


def imported(module: Module) -> Iterator[tuple[str, str]]:
    """Give each name that a module takes from the package, and where from, in full."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "distspec":
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("distspec."):
                    yield alias.asname or alias.name, alias.name


def assert_none(offenders: Iterable[str]) -> None:
    listed = sorted(offenders)
    assert not listed, "\n".join(["", *listed])


def test_no_file_holds_more_than_one_idea() -> None:
    lines = {path: len((ROOT / path).read_text("utf-8").splitlines()) for path in tracked("distspec")}
    assert_none(f"{path} has {count} lines" for path, count in lines.items() if count > 500)


def test_no_function_is_longer_than_a_screen(modules: list[Module]) -> None:
    every = [(module.path, node, (node.end_lineno or 0) - node.lineno + 1) for module, node in functions(modules)]
    assert len(every) > 1000
    assert_none(f"{path}:{node.lineno} {node.name} has {lines} lines" for path, node, lines in every if lines > 60)


def test_no_signature_has_more_than_eight_arguments(modules: list[Module]) -> None:
    def count(arguments: ast.arguments) -> int:
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        names = [argument.arg for argument in every if argument is not None]
        return len(names) - (names[:1] in (["self"], ["cls"]))

    every = [(module.path, node, count(node.args)) for module, node in functions(modules)]
    assert_none(f"{path}:{node.lineno} {node.name} takes {number}" for path, node, number in every if number > 8)


def test_classes_of_ours_stand_at_most_one_above_another(modules: list[Module]) -> None:
    """Protocols, what all settings share and errors do not count."""
    taken = {module.name: dict(imported(module)) for module in modules}
    bases: dict[str, list[str]] = {}
    for module in modules:
        classes = [node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
        known = taken[module.name] | {node.name: f"{module.name}.{node.name}" for node in classes}
        for node in classes:
            names = [ast.unparse(base).split("[")[0] for base in node.bases]
            bases[known[node.name]] = [known.get(name, name) for name in names]

    def resolved(name: str) -> str:
        """Follow a name through front doors to where its class is."""
        module, _, last = name.rpartition(".")
        while name not in bases and last in taken.get(module, {}):
            name = taken[module][last]
            module, _, last = name.rpartition(".")
        return name

    def above(name: str) -> int:
        own = [resolved(base) for base in bases[name]]
        ours = [base for base in own if base in bases and base != "distspec.config.base.Settings"]
        return max((above(base) + ("Protocol" not in bases[base]) for base in ours), default=0)

    assert len(bases) > 300
    assert_none(f"{name} stands on {above(name)} of ours" for name in bases if above(name) > 1 and "Error" not in name)


def test_rooms_stand_on_eight_floors_at_most_and_in_no_circle(modules: list[Module]) -> None:
    rooms = {module.name.split(".")[1] for module in modules if "." in module.name}
    below: dict[str, set[str]] = {room: set() for room in rooms}
    for module in modules:
        for _, name in imported(module):
            room = name.split(".")[1]
            if "." in module.name and room in rooms:
                below[module.name.split(".")[1]] |= {room} - {module.name.split(".")[1]}
    floors: dict[str, int] = {}
    for room in TopologicalSorter(below).static_order():
        floors[room] = 1 + max((floors[other] for other in below[room]), default=0)
    assert floors["errors"] == 1
    assert floors["cli"] <= 8


def test_the_import_contract_knows_every_room_and_every_verb() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    rows = [row for contract in contracts if contract["type"] == "layers" for row in contract["layers"]]
    named = {name.strip() for row in rows for name in row.split("|")}
    places = [path.removesuffix(".py").split("/") for path in tracked("distspec") if path.endswith(".py")]
    rooms = {f"distspec.{place[1]}" for place in places} - {"distspec.__init__", "distspec.stages"}
    verbs = {f"distspec.stages.{place[2]}" for place in places if place[1] == "stages"} - {"distspec.stages.__init__"}
    assert named == rooms | verbs
    assert_none(contract["name"] for contract in contracts if contract["type"] == "layers" and len(contract) > 3)


def test_the_tree_in_the_readme_is_the_real_one() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    tree = re.search(r"```text\ndistspec/\n(.*?)```", readme, re.DOTALL)
    assert tree, "the README has no annotated tree"
    # A line may name two files that belong together; lines that go on with an explanation are indented further.
    lines = re.findall(r"^ {2,4}([\w.]+/?(?:, [\w.]+/?)*)(?= {2}|$)", tree.group(1), re.MULTILINE)
    named = {name for line in lines for name in line.split(", ")}
    inside = {Path(path).parts[1:] for path in tracked("distspec")}
    real = {parts[0] + ("/" if len(parts) > 1 else "") for parts in inside}
    assert_none(f"{name} is in one alone" for name in named ^ (real - {"__init__.py", "py.typed"}))


def test_every_name_is_known(modules: list[Module]) -> None:
    # The axis names of jaxtyping stand in strings, for which ruff and mypy had to be told not to look.
    def used(table: symtable.SymbolTable) -> Iterator[str]:
        top = table.get_type() == "module"
        for symbol in table.get_symbols():
            bound = symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
            if symbol.is_referenced() and not bound if top else symbol.is_global():
                yield symbol.get_name()
        for inner in table.get_children():
            yield from used(inner)

    wrong = []
    for module in modules:
        table = symtable.symtable((ROOT / module.path).read_text("utf-8"), module.path, "exec")
        known = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
        known |= {*dir(builtins), "__file__", "__path__"}
        wrong += [f"{module.path}: {name}" for name in used(table) if name not in known]
    assert_none(wrong)


def test_every_front_door_names_its_files(modules: list[Module]) -> None:
    files = {Path(path) for path in tracked("distspec")}
    wrong = []
    doors = [module for module in modules if module.path.endswith("/__init__.py") and module.name != "distspec"]
    for module in doors:
        folder = Path(module.path).parent
        inside = [path.relative_to(folder) for path in files if path.is_relative_to(folder)]
        real = {path.parts[0] + "/" if len(path.parts) > 1 else path.name.removesuffix(".py") for path in inside}
        real -= {"__init__"}
        told = re.findall(r"^- (`[^`]+`(?:, `[^`]+`)*): ", ast.get_docstring(module.tree) or "", re.MULTILINE)
        named = {name for line in told for name in re.findall("`([^`]+)`", line)}
        wrong += [f"{module.path} does not name {name}" for name in real - named]
        wrong += [f"{module.path} names {name}, which is not there" for name in named - real]
    assert len(doors) > 30
    assert_none(wrong)


def test_a_verb_its_stage_its_settings_and_its_test_share_a_name() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    verbs = [stage.name for stage in STAGES]
    folders = {path.split("/")[2] for path in tracked("distspec/stages") if path.count("/") > 2}
    assert set(verbs) == folders
    assert len(verbs) == len(folders)
    for verb in verbs:
        assert (ROOT / f"distspec/stages/{verb}/stage.py").is_file()
        assert (ROOT / f"tests/stages/{verb}/test_stage.py").is_file()
        assert hasattr(config, verb.title())
        assert verb in config.Experiment.model_fields
    assert (ROOT / "distspec/stages/fetch.py").is_file()
    assert (ROOT / "tests/stages/test_fetch.py").is_file()
    assert hasattr(config, "FetchSdss")
    assert_none(verb for verb in [*verbs, "fetch"] if f"`distspec {verb}`" not in readme)


def test_tests_stand_where_their_modules_stand() -> None:
    tests = {Path(path).relative_to("tests") for path in tracked("tests") if Path(path).name.startswith("test_")}
    astray = set()
    for path in tests:
        subject = ROOT / "distspec" / path.parent / path.stem.removeprefix("test_")
        if not (subject.is_dir() or subject.with_suffix(".py").is_file()):
            astray.add(str(path.with_suffix("")))
    assert_none(astray - set(OTHERS))


def test_ci_begins_with_the_test_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    command = re.search(r"^(pip install -e .*pytest)$", readme, re.MULTILINE)
    assert command, "the README names no test command"
    calls = [line for line in (ROOT / ".ci/run").read_text("utf-8").splitlines() if "pytest" in line]
    assert calls[0] == command.group(1).replace(" && ", " --quiet && ")


def test_the_changelog_and_the_version_agree() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", distspec.__version__)
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
