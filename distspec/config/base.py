"""What all settings classes share: they are frozen, strictly checked, and refuse unknown keys."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["Count", "Fraction", "Off", "Positive", "ScoreName", "Settings"]

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
ScoreName = Literal[
    "mse",
    "mse_filtered",
    "mse_trimmed",
    "mse_filtered_trimmed",
    "relative",
    "relative_filtered",
    "relative_trimmed",
    "relative_filtered_trimmed",
    "chi2",
    "density",
]
"""Eight scores of Ortiz & Boquien, the masked chi-squared per good pixel (detectors/reconstruction.py), and with
`train.density` -log p of the latents (models/density.py)."""


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
