"""What all settings classes share: they are frozen, strictly checked, and refuse unknown keys."""

from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, model_validator

__all__ = [
    "ENSEMBLES",
    "METRICS",
    "NUMBER",
    "RECONSTRUCTION",
    "TABLE",
    "Count",
    "Either",
    "Fraction",
    "Off",
    "Positive",
    "ScoreName",
    "Settings",
    "Span",
    "metric_scores",
]

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
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
