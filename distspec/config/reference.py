"""What each setting means, what it may be and what it is by default: text for a terminal, from the classes themselves.

The words are the docstrings under the settings, read from the source. Imported only where they are asked for.
"""

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic_core import PydanticUndefined

from distspec.config.base import Off, Settings
from distspec.config.experiment import Experiment
from distspec.config.fetch import Fetch
from distspec.errors import ConfigError

__all__ = ["Section", "describe", "meaning", "sections"]

_TOP = "experiment"
"""What the settings outside of all sections are asked for by."""

_START = """
A settings file (TOML) states what differs from the defaults, by section: `epochs = 80` under `[train]`; on the command
line that is `train.epochs=80`. Where a section is of one of several kinds, its setting `kind` says which. "none" is
what holds where nothing is stated.
"""

_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_PLURALS = {"integer": "integers", "number": "numbers", "pair": "pairs", "list": "lists"}
_SIZES = {2: "pair", 3: "triple"}


@dataclass(frozen=True)
class Section:
    """Settings that stand in one table of the file.

    Arguments:
        name: the table, dotted; empty for what stands outside of all.
        settings: their class.
        defaults: by name; what is missing must be given.
        kind: that the class is taken for, where the table is one of several kinds.
        of: kinds of a table around it in which there is this one, such as `explain.methods.lime`; empty if in all.
    """

    name: str
    settings: type[Settings]
    defaults: Mapping[str, Any]
    kind: str = ""
    of: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The table's name, its kind, and where there is one."""
        kind = f", kind {_toml(self.kind)}" if self.kind else ""
        of = f" (in {_either(self.of)})" if self.of else ""
        return f"{self.name or _TOP}{kind}{of}"

    def within(self, place: str) -> bool:
        """Tell whether this is the section of a name, or one below it; `train.density.sliced` is one of its kinds."""
        own = f"{self.name}.{self.kind}" if self.kind else self.name or _TOP
        return place in (self.name or _TOP, own, *self.of) or self.name.startswith(f"{place}.")


def describe(places: Sequence[str], width: int = 80) -> str:
    """Write what settings mean.

    Arguments:
        places: sections (`train`, with all below it), kinds (`train.density.sliced`) or single settings
            (`train.epochs`); none takes all sections.
        width: of a line, characters.

    Raises:
        ConfigError: there is no such section.

    Example:
        >>> print(describe(["train.batch"]))
        train
          batch (integer ≥ 1; default 512)
              Rows in a step, over all workers together.
    """
    known, lines = sections(), []
    for place in places:
        lines += list(_part(place, known, width))
    if not places:
        lines += [*_wrapped(_START, width, "", ""), ""]
        for section in known:
            lines += [*_whole(section, width), ""]
    return "\n".join(lines).rstrip()


def sections() -> list[Section]:
    """List all sections, in the order of the stages; those of `distspec fetch` come last."""
    found = list(_below(Section("", Experiment, _defaults(Experiment, None))))
    found += [inner for archive in _parts(Fetch) for inner in _below(_section("fetch", archive, None, (), kinds=True))]
    merged: list[Section] = []
    for section in found:
        same = next((other for other in merged if replace(other, of=section.of) == section), None)
        if same is None:
            merged.append(section)
        else:
            merged[merged.index(same)] = replace(same, of=tuple(dict.fromkeys([*same.of, *section.of])))
    return merged


def meaning(settings: type[Settings], name: str = "") -> str:
    """Give what is written under a setting; of a class's own where no name is given, or where that is a section.

    Example:
        >>> meaning(Experiment, "seed")
        'Seed of everything that is drawn at random.'
    """
    for one in settings.__mro__:
        if issubclass(one, Settings) and (found := _written(one.__module__).get((one.__qualname__, name))):
            return found
    parts = _parts(get_type_hints(settings, include_extras=True)[name]) if name else ()
    if name == "kind":
        return meaning(settings)
    return meaning(parts[0]) if len(parts) == 1 else ""


# --- the tree ---------------------------------------------------------------------------------------------------------


def _below(section: Section) -> Iterator[Section]:
    """Give a section and all in it; kinds stand together, before what is in them."""
    yield section
    of = (f"{section.name}.{section.kind}",) if section.kind else section.of
    for name, hint in get_type_hints(section.settings, include_extras=True).items():
        if name not in section.settings.model_fields:
            continue
        parts, place = _parts(hint), f"{section.name}.{name}".lstrip(".")
        default = section.defaults.get(name)
        inner = [_section(place, part, default, of, kinds=len(parts) > 1) for part in parts]
        yield from inner
        for part in inner:
            deeper = iter(_below(part))
            next(deeper)
            yield from deeper


def _section(name: str, part: type[Settings], default: Any, of: tuple[str, ...], *, kinds: bool) -> Section:
    kind = part.model_fields["kind"].default if kinds else ""
    return Section(name, part, _defaults(part, default), kind, of)


def _defaults(settings: type[Settings], instance: Any) -> dict[str, Any]:
    """Give defaults: a section may be another one than that of its class, as in `Transfer(per_second=2.0)`."""
    if isinstance(instance, settings):
        return {name: getattr(instance, name) for name in settings.model_fields}
    all_ = {name: field.get_default(call_default_factory=True) for name, field in settings.model_fields.items()}
    return {name: value for name, value in all_.items() if value is not PydanticUndefined}


def _parts(hint: Any) -> tuple[type[Settings], ...]:
    """Find the settings classes that a type is made of."""
    if isinstance(hint, type) and issubclass(hint, Settings):
        return (hint,)
    return tuple(part for inner in get_args(hint) for part in _parts(inner))


@cache
def _written(module: str) -> dict[tuple[str, str], str]:
    """Collect what is written under classes and their settings: by class and setting, or by class alone."""
    found: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if not isinstance(node, ast.ClassDef):
            continue
        found[node.name, ""] = ast.get_docstring(node) or ""
        for line, after in zip(node.body, node.body[1:], strict=False):
            match line, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[node.name, name] = " ".join(text.split())
    return found


# --- words ------------------------------------------------------------------------------------------------------------


def _part(place: str, known: Sequence[Section], width: int) -> Iterator[str]:
    """Write the sections of a name, or the one setting."""
    inside = [section for section in known if section.within(place)]
    for section in inside:
        yield from [*_whole(section, width), ""]
    if inside:
        return
    above, _, name = place.rpartition(".")
    holding = [section for section in known if section.name == above and name in section.settings.model_fields]
    for section in holding:
        yield from [*_wrapped(section.title, width, "", "  "), *_setting(section, name, width), ""]
    if not holding:
        there = ", ".join(dict.fromkeys(section.name or _TOP for section in known))
        raise ConfigError(f"no section {place!r}; there are {there}")


def _whole(section: Section, width: int) -> Iterator[str]:
    yield from _wrapped(section.title, width, "", "  ")
    for paragraph in meaning(section.settings).split("\n\n"):
        yield from _wrapped(paragraph, width, "  ", "  ")
    for name in section.settings.model_fields:
        # The heading has it already.
        if name != "kind":
            yield from _setting(section, name, width)


def _setting(section: Section, name: str, width: int) -> Iterator[str]:
    hint = get_type_hints(section.settings, include_extras=True)[name]
    parts = _parts(hint)
    allowed = _allowed(hint, f"{section.name}.{name}".lstrip("."))
    default = "required"
    if name in section.defaults:
        default = _default(section.defaults[name], len(parts), Off in get_args(hint))
    text = meaning(section.settings, name)
    shown = f"{allowed}; {default}" if default else allowed
    yield from _wrapped(f"{name} ({shown})", width, "  ", "      ")
    # What a section of one kind means stands under its own heading.
    if len(parts) != 1 or text != meaning(parts[0]):
        yield from _wrapped(text, width, "      ", "      ")


def _wrapped(text: str, width: int, first: str, other: str) -> list[str]:
    words = " ".join(text.split())
    return textwrap.wrap(
        words, width, initial_indent=first, subsequent_indent=other, break_long_words=False, break_on_hyphens=False
    )


def _default(value: Any, kinds: int, unset: bool) -> str:
    if isinstance(value, Settings):
        on = "on by default" if unset else ""
        return f"default kind {_toml(value.kind)}" if kinds > 1 else on  # type: ignore[attr-defined]
    return f"default {'none' if value is None else _toml(value)}"


def _toml(value: Any) -> str:
    """Write a value as in a settings file; of a table of a kind, the kind alone."""
    if isinstance(value, Settings):
        return f"{{ kind = {_toml(value.kind)} }}"  # type: ignore[attr-defined]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _either(words: Iterable[str]) -> str:
    *before, last = words
    return f"{', '.join(before)} or {last}" if before else last


def _many(words: str) -> str:
    """Put what a value may be into the plural."""
    one, space, rest = words.partition(" ")
    return f"{_PLURALS.get(one, one)}{space}{rest}"


def _allowed(hint: Any, place: str, bounds: Mapping[str, Any] | None = None) -> str:
    """Say in words what a setting may be.

    Arguments:
        hint: its type, with its limits.
        place: its dotted name, which is a section if it is made of settings.
        bounds: limits stated outside of the type.
    """
    bounds, origin = bounds or {}, get_origin(hint)
    if origin is Annotated:
        inner, *extras = get_args(hint)
        words = _allowed(inner, place, {**bounds, **_limits(extras)})
        return f"{words}, or false for none" if Off in extras else words
    if origin is Literal:
        return _either(map(_toml, get_args(hint)))
    if origin in (Union, UnionType):
        parts = _parts(hint)
        if len(parts) > 1:
            return f"section {place}, of kind {_either(_toml(part.model_fields['kind'].default) for part in parts)}"
        return _either([_allowed(one, place, bounds) for one in get_args(hint) if one is not NoneType])
    if origin is tuple:
        return _list(get_args(hint), place, bounds)
    if origin is dict:
        return f"table of {_many(_allowed(get_args(hint)[1], place))}"
    if isinstance(hint, type) and issubclass(hint, Settings):
        return f"section {place}"
    told = [{bool: "true or false", int: "integer", float: "number", str: "text"}[hint]]
    if "ge" in bounds and "le" in bounds:
        told.append(f"from {bounds['ge']} to {bounds['le']}")
    else:
        told.append(" and ".join(f"{sign} {bounds[name]}" for name, sign in _SIGNS.items() if name in bounds))
    if "pattern" in bounds:
        told.append(f"of the form {bounds['pattern'].strip('^$')}")
    return " ".join(filter(None, told))


def _list(items: Sequence[Any], place: str, bounds: Mapping[str, Any]) -> str:
    item = _allowed(items[0], place)
    if items[-1] is not Ellipsis:
        return f"{_SIZES[len(items)]} of {_many(item)}"
    least = f", at least {bounds['min_length']} of them" if "min_length" in bounds else ""
    # A table that may be repeated is a section all the same.
    tables = f"tables [[{place}]]{item.removeprefix(f'section {place}')}"
    return f"{tables if _parts(items[0]) else f'list of {_many(item)}'}{least}"


def _limits(extras: Sequence[Any]) -> dict[str, Any]:
    """Collect the limits that pydantic checks; a field holds them as metadata of its own."""
    found: dict[str, Any] = {}
    for extra in extras:
        for one in (extra, *getattr(extra, "metadata", ())):
            for name in ("ge", "gt", "le", "lt", "min_length", "pattern"):
                if getattr(one, name, None) is not None:
                    found[name] = getattr(one, name)
    return found
