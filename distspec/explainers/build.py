"""Settings -> explainers: the one place that knows which class each kind of method is."""

from distspec.config import Ablation, AnyMethod, Imo, Lime, Occlusion
from distspec.explainers import Explainer
from distspec.explainers.gradients import GradientExplainer
from distspec.explainers.lime import LimeExplainer
from distspec.explainers.occlusion import AblationExplainer, ImoExplainer
from distspec.spectra import WaveGrid

__all__ = ["build_explainer"]


def build_explainer(settings: AnyMethod, grid: WaveGrid, seed: int, *, rest: bool) -> Explainer:
    """Make a method for spectra on a grid.

    Arguments:
        settings: of the method.
        grid: of the spectra.
        seed: of whatever it draws.
        rest: whether the grid is at rest.
    """
    match settings:
        case Lime():
            return LimeExplainer(settings, grid, seed, rest=rest)
        case Imo():
            return ImoExplainer(settings, grid)
        case Ablation() | Occlusion():
            return AblationExplainer(settings, grid)
        case _:
            return GradientExplainer(settings, grid)
