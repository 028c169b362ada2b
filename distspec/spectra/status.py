"""Why a spectrum is set aside: bits, and the words for them."""

from enum import IntFlag

import numpy as np
from jaxtyping import Shaped

__all__ = ["Status", "first_reasons"]


class Status(IntFlag):
    """Why a spectrum is set aside: one bit a reason, 0 for a spectrum that is used."""

    OK = 0
    UNREADABLE = 1
    DEAD = 2
    NO_REDSHIFT = 4
    REDSHIFT_WARNING = 8
    REDSHIFT_RANGE = 16
    LOW_COVERAGE = 32
    LOW_SNR = 64
    NO_SCALE = 128
    NO_EXTINCTION = 256
    FIBER = 512
    NOT_A_TARGET = 1024
    CLASS = 2048
    SPAN = 4096
    DUPLICATE = 8192
    UNUSABLE = UNREADABLE | DEAD | NO_REDSHIFT | NO_SCALE | NO_EXTINCTION
    """Not one reason but any of those that leave a spectrum without pixels on the store's grid."""

    @property
    def reasons(self) -> list[str]:
        """One sentence for each bit that is set."""
        return [_REASONS[bit] for bit in Status if bit in self]


_REASONS = {
    Status.UNREADABLE: "the file could not be read",
    Status.DEAD: "no pixel has a positive, finite inverse variance",
    Status.NO_REDSHIFT: "no finite redshift is known",
    Status.REDSHIFT_WARNING: "the redshift pipeline raised a warning",
    Status.REDSHIFT_RANGE: "the redshift is outside the recipe's range",
    Status.LOW_COVERAGE: "too few good pixels on the recipe's wavelength grid",
    Status.LOW_SNR: "the signal-to-noise ratio is below the recipe's limit",
    Status.NO_SCALE: "the flux that the normalisation divides by is not positive",
    Status.NO_EXTINCTION: "no Galactic E(B-V) is known for this position",
    Status.FIBER: "the survey flagged the fibre as bad",
    Status.NOT_A_TARGET: "a sky or calibration fibre, not a science target",
    Status.CLASS: "the survey's pipeline gives a class that the recipe does not take",
    Status.SPAN: "the good pixels do not reach from end to end of the recipe's wavelength grid",
    Status.DUPLICATE: "an earlier row holds the same spectrum",
}


def first_reasons(status: Shaped[np.ndarray, "n"]) -> dict[str, int]:
    """Count the spectra set aside by the first reason that applied; the counts add up to their number."""
    lowest = status & -status
    bits, counts = np.unique(lowest[lowest != 0], return_counts=True)
    return {str(Status(int(bit)).name): int(count) for bit, count in zip(bits, counts, strict=True)}
