"""What is imported is declared: in the dependencies, or in an extra whose name the import tells."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from distspec.errors import ConfigError, extra

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def plain(name: str) -> str:
    return re.split(r"[\[<>=!~; ]", name)[0].lower().replace("_", "-")


def imported() -> Iterator[tuple[str, str, str]]:
    """Give file, package, and the extra whose `with` block the import stands in, of every import there is."""
    for file in sorted((ROOT / "distspec").rglob("*.py")):
        tree = ast.parse(file.read_text("utf-8"))
        extras = {
            id(inner): node.items[0].context_expr.args[0].value
            for node in ast.walk(tree)
            if isinstance(node, ast.With) and "extra(" in ast.unparse(node.items[0])
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for name in {name.split(".")[0] for name in names} - {"distspec", *sys.stdlib_module_names}:
                yield file.name, name, extras.get(id(node), "")


def test_every_import_is_declared_and_every_declaration_used() -> None:
    declared = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    declared = {name: {plain(one) for one in packages} for name, packages in declared.items()}
    packages = packages_distributions()
    used = set()
    for file, name, wanted in imported():
        distributions = {plain(one) for one in packages[name]}
        assert distributions & declared[wanted], f"{file} imports {name}; [{wanted}] does not declare it"
        used |= distributions
    # PostgreSQL's driver is imported by MLflow, by its address.
    others = set(declared) - {"", "test", "postgres"}
    assert set().union(declared[""], *(declared[name] for name in others)) <= used


def test_an_extra_that_is_not_installed_is_named() -> None:
    with pytest.raises(ConfigError, match=r"needs no_such_package.*pip install 'distspec\[slic\]'"), extra("slic"):
        import no_such_package  # noqa: F401
