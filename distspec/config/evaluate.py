"""Settings of `evaluate`: which anomalies are planted, how strong, in how many spectra."""

from typing import Annotated, Literal

from pydantic import Field

from distspec.config.base import Count, Settings

__all__ = ["Evaluate", "PlantedKind"]

PlantedKind = Literal[
    "e+a",
    "double-peaked",
    "wrong-redshift",
    "two-galaxies",
    "m-star-overlap",
    "sn-ia",
    "featureless-blue",
    "extreme-lines",
    "blueshifted-na-d",
    "arm-step",
    "sky-residual",
    "cosmic-ray",
    "red-runaway",
    "blend",
    "redshift-error",
    "calibration-step",
]
"""What can be planted; a test compares it with what the stage knows, which settings cannot import."""


class Evaluate(Settings):
    """Store with planted anomalies -> how good each detector and explainer is."""

    hosts: Annotated[int, Field(ge=0)] = 400
    """Spectra of the validation set that every anomaly is planted in; 0 leaves the evaluation out of `run`."""
    kinds: tuple[PlantedKind, ...] = ()
    """Kinds to plant; none takes all that leave a trace on the store's grid."""
    strengths: Annotated[tuple[Annotated[float, Field(gt=0, le=100)], ...], Field(min_length=1)] = (
        0.1,
        0.25,
        0.5,
        1.0,
        2.0,
    )
    """Strengths that every anomaly is planted in; 1 is a clear case, as the simulator plants it."""
    levels: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (0.001, 0.01, 0.05)
    """Shares of the survey, of highest score, that are looked at."""
    explained: Annotated[int, Field(ge=0)] = 20
    """Hosts, at strength 1, whose planted spectra are explained."""
    strata: Count = 3
    """Parts of equal number that hosts are divided into by S/N, and by redshift."""
    bootstrap: Annotated[int, Field(ge=2)] = 500
    """Draws of hosts, with replacement, from which intervals are taken."""
