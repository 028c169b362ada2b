"""Flows: the density of latents, and of classes among them.

- `density`: `LatentDensity`, log p(z) of any flow as an anomaly score.
- `sliced_flow`: sliced iterative normalizing flow, ready to be evaluated.
- `sliced`: its fit, layer by layer, without gradient descent.
- `directions`: along which data differ most from a Gaussian.
- `marginals`: one-dimensional maps to a Gaussian.
- `spline_flow`: neural spline flow, fitted by gradient descent.
- `spline`: monotonic rational-quadratic splines.
- `components`: groups of latents where no labels are given.
"""

from typing import TYPE_CHECKING

from distspec.config import Sliced, Spline

if TYPE_CHECKING:
    from distspec.models.flows.density import LatentDensity

__all__ = ["build"]


def build(settings: Sliced | Spline, shape: dict[str, int], names: tuple[str, ...]) -> "LatentDensity":
    """Make a density of latents that a checkpoint's weights fit into.

    Arguments:
        settings: of the flow.
        shape: `Flow.shape` of the fitted flow.
        names: of its classes.
    """
    # Imported here so that who has one flow does not import the other's libraries.
    from distspec.models.flows.density import LatentDensity

    if isinstance(settings, Sliced):
        from distspec.models.flows.sliced_flow import SlicedFlow

        return LatentDensity(SlicedFlow(**shape), names)
    from distspec.models.flows.spline_flow import SplineFlow

    return LatentDensity(SplineFlow(settings, **shape), names)
