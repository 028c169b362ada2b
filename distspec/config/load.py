"""Settings read from TOML and written as TOML, compared, and named by their digest."""

import difflib
import hashlib
import json
import tomllib
from typing import Any

import tomli_w
from pydantic import BaseModel, TypeAdapter, ValidationError

from distspec.addresses import address_of
from distspec.config.base import NUMBER, TABLE, Settings
from distspec.config.experiment import Experiment
from distspec.config.fetch import Fetch, FetchDesi, FetchSdss, FetchSparcl
from distspec.config.presets import presets
from distspec.errors import BucketError, ConfigError

__all__ = ["differences", "digest", "dump", "load", "load_fetch"]


def load(name: str | None, overrides: list[str] | tuple[str, ...] = ()) -> Experiment:
    """Read an experiment's settings.

    Arguments:
        name: a TOML file, the name of a preset, or None for the defaults. A file may name a preset to start from in
            a top-level key `preset`.
        overrides: TOML assignments such as `train.epochs=40`; a bare word is taken as a string.

    Raises:
        ConfigError: no such file or preset, no valid TOML, or a key or value that is refused.

    Example:
        >>> load("demo", ["train.epochs=3"]).train.epochs
        3
    """
    tree = _read(name) if name is not None else {}
    for override in overrides:
        tree = _merge(tree, _assignment(override))
    base = tree.pop("preset", None)
    if base is not None:
        known = presets()
        if base not in known:
            raise ConfigError(f"no preset {base!r}; expected one of {', '.join(sorted(known))}")
        tree = _merge(tomllib.loads(known[base]), tree)
    try:
        return Experiment.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise ConfigError(_explain_refusal(error, tree)) from None


def load_fetch(kind: str, overrides: list[str] | tuple[str, ...] = ()) -> FetchSdss | FetchDesi | FetchSparcl:
    """Read the settings of `distspec fetch`.

    Arguments:
        kind: the archive: "sdss", "desi" or "sparcl".
        overrides: TOML assignments such as `to=spectra`; a bare word is taken as a string.

    Raises:
        ConfigError: a key or value is refused.

    Example:
        >>> load_fetch("desi", ["to=spectra", "ids=pixels.csv"]).release
        'dr1'
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        tree = _merge(tree, _assignment(override))
    tree["kind"] = kind
    adapter: TypeAdapter[FetchSdss | FetchDesi | FetchSparcl] = TypeAdapter(Fetch)
    try:
        return adapter.validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise ConfigError(_explain_refusal(error, tree)) from None


def _read(name: str) -> dict[str, Any]:
    path = address_of(name)
    if not path.is_file():
        known = presets()
        if name in known:
            return tomllib.loads(known[name])
        raise ConfigError(f"no settings file {name!r}; give a TOML file or a preset: {', '.join(sorted(known))}")
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from None
    except BucketError:
        raise
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from None


def _assignment(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r} is not an assignment; write it as key=value, for example train.epochs=40")
    try:
        return tomllib.loads(f"{key} = {value}")
    except tomllib.TOMLDecodeError:
        # The shell eats quotes; a bare word or path is meant as a string.
        try:
            return tomllib.loads(f"{key} = {json.dumps(value.strip())}")
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"override {text!r} is not valid TOML: {error}") from None


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Lay one tree over another; a table that names another `kind` replaces the old one whole."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _explain_refusal(error: ValidationError, tree: dict[str, Any]) -> str:
    """Say in one line which setting was refused and what to write instead."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    # In a union the location holds the kind that was tried, which is no key of the file.
    shown, node = [], tree
    for part in place:
        if isinstance(node, dict) and part not in node and node.get("kind", _unnamed(part)) == part:
            continue
        if part == "[key]" or (part in (NUMBER, TABLE) and not (isinstance(node, dict) and part in node)):
            continue
        shown.append(part)
        node = node.get(part, {}) if isinstance(node, dict) else {}
    key = ".".join(shown)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(shown[-1], sorted(_keys()), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; see `distspec config`"
        return f"unknown setting {key!r}{hint}{more}"
    if first["type"] == "union_tag_not_found":
        return f"setting '{key}.kind' is missing: say which kind of {shown[-1]} you mean{more}"
    if first["type"] == "union_tag_invalid":
        tag, known = (str(first["ctx"][part]) for part in ("tag", "expected_tags"))
        return f"setting '{key}.kind': got {tag!r}; expected one of {known}{more}"
    message = first["msg"].removeprefix("Value error, ")
    found = "" if first["type"] == "missing" or isinstance(first["input"], dict) else f", got {first['input']!r}"
    return f"setting {key!r}: {message}{found}{more}" if key else f"{message}{more}"


def _keys() -> set[str]:
    """Collect the names of all settings, however deep."""
    models = [Settings]
    for model in models:
        models += model.__subclasses__()
    return {name for model in models for name in model.model_fields}


def _unnamed(part: str) -> str | None:
    """Tell whether a part of a place is the kind that is taken where none is named."""
    return part if part in ("dense", "sliced") else None


def dump(settings: Settings) -> str:
    """Write settings as TOML that `load` turns back into equal ones.

    A value that is unset by default is left out; one that was unset against its default is written as `false`.
    """
    return tomli_w.dumps(_plain(settings))


def _plain(settings: Settings) -> dict[str, Any]:
    tree = settings.model_dump(mode="json", exclude_none=True)
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Settings):
            tree[name] = _plain(value)
        elif value is None and field.get_default() is not None:
            tree[name] = False
    return tree


def digest(*parts: Any) -> str:
    """Name a result by what made it: 12 hexadecimal digits of the SHA-256 of the parts' canonical JSON.

    Example:
        >>> digest({"a": 1}, "x") == digest({"a": 1}, "x")
        True
    """
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Say which settings differ between two plain trees, one short text each.

    Example:
        >>> differences({"grid": {"pixels": 500}}, {"grid": {"pixels": 1000}})
        ['grid.pixels was 500, is now 1000']
    """
    before, now = _leaves(old), _leaves(new)
    return [
        f"{key} was {before.get(key, 'unset')}, is now {now.get(key, 'unset')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return {key: value for key, value in leaves.items() if value is not None}
