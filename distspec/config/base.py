"""What all settings classes share: they are frozen, strictly checked, and refuse unknown keys."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, model_validator

from distspec.addresses import absolute

__all__ = [
    "ENSEMBLES",
    "METRICS",
    "NUMBER",
    "RECONSTRUCTION",
    "TABLE",
    "Count",
    "Either",
    "Fraction",
    "Location",
    "Nearby",
    "Off",
    "Positive",
    "ScoreName",
    "Settings",
    "Span",
    "anchored",
    "metric_scores",
]

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class _Where:
    """Marks settings that name a place.

    Arguments:
        beside: it may lie in the folder of the spectra, too, and a relative one is looked for here first.
    """

    beside: bool = False


Location = Annotated[str, _Where()]
"""Path or URL; a relative path means the folder in which the run is started, for its workers, too (`anchored`)."""
Nearby = Annotated[str, _Where(beside=True)]
"""Likewise, but what is not there is looked for beside the spectra."""
ScoreName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
"""One of `RECONSTRUCTION`, of another metric's eight, `density`, a classical detector's name, or an ensemble."""

VARIANTS = ("", "_filtered", "_trimmed", "_filtered_trimmed")
"""Of every reconstruction score: all pixels, without windows around emission lines, without the largest residuals."""

RECONSTRUCTION = (*(f"mse{name}" for name in VARIANTS), *(f"relative{name}" for name in VARIANTS), "chi2")
"""Eight scores of Ortiz & Boquien, and the masked chi-squared per good pixel."""

METRICS = {"mad": 1.0, "lp": 0.33}
"""Other exponents of the residuals, by the name of the score."""

ENSEMBLES = ("rank_mean", "rank_union")
"""Scores that `distspec compare` makes of all that it compares."""


def metric_scores(metric: str) -> tuple[str, ...]:
    """Name the eight scores of one of `METRICS`: `mad`, `mad_filtered`, ..., `mad_relative_filtered_trimmed`."""
    return tuple(f"{metric}{weight}{name}" for weight in ("", "_relative") for name in VARIANTS)


def _unset(value: Any) -> Any:
    return None if value is False else _tupled(value)


def _tupled(value: Any) -> Any:
    """Turn lists into tuples, however deep: what a validator has touched no longer counts as JSON, which has none."""
    if isinstance(value, dict):
        return {key: _tupled(inner) for key, inner in value.items()}
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


Off = BeforeValidator(_unset)
"""On a setting that may be None: TOML has no null, so `false` unsets it, against a default or a preset."""


class Settings(BaseModel):
    """Base of all settings classes: frozen, no unknown keys, no silent conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def anchored(value: Any) -> Any:
    """Give arguments of a worker with all that names a place made absolute: workers are in other folders.

    Arguments:
        value: settings, paths, and tuples, lists and dicts of them; all else stays as it is.
    """
    match value:
        case Settings():
            changed = {}
            for name, field in type(value).model_fields.items():
                inner = getattr(value, name)
                where = next((one for one in field.metadata if isinstance(one, _Where)), _where(field.annotation))
                changed[name] = anchored(inner) if where is None or inner is None else _anchored(inner, where)
            return value.model_copy(update=changed)
        case Path():
            return value.resolve()
        case dict():
            return {key: anchored(inner) for key, inner in value.items()}
        case list() | tuple() if type(value) in (list, tuple):
            return type(value)(map(anchored, value))
    return value


def _anchored(text: str, where: _Where) -> str:
    return text if where.beside and not Path(text).exists() else absolute(text)


def _where(annotation: Any) -> _Where | None:
    """Find the mark of a place in a type such as `Location | None`."""
    for part in get_args(annotation):
        found = part if isinstance(part, _Where) else _where(part)
        if found is not None:
            return found
    return None


class Span(Settings):
    """From how many to how many."""

    min: Count = 1
    """Fewest; with fewer it is said what is waited for."""
    max: Count
    """Most."""

    @model_validator(mode="after")
    def _ordered(self) -> "Span":
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is more than max = {self.max}")
        return self


NUMBER: Final = "number"
TABLE: Final = "table"
"""Names of the two shapes that a setting with `Either` has; they stand in places of pydantic's, and in no file."""

Either = Discriminator(lambda value: TABLE if isinstance(value, dict | Settings) else NUMBER)
"""On a setting that is a number or a table: a refusal speaks of the one that was meant.

    workers: Annotated[Annotated[int, Tag(NUMBER)] | Annotated[Span, Tag(TABLE)], Either] = 0
"""
