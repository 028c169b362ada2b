"""Detectors that are fitted without a network: on a sample, then by looks over the whole survey.

- `pca`: principal components, and how odd what they leave is, region by region.
- `principal_components`: components from sums that add up, and projection of masked spectra.
- `regions`: wavelength regions, and how rare a value is in each.
- `forest`: unsupervised random forest.
- `isolation`: isolation forest on the ranks of fluxes.
- `trees`: decision trees as flat arrays.
- `features`: what trees see of a spectrum.
- `fisher`: Fisher vector of a Gaussian mixture.
- `saved`: a fitted detector on disk.
"""

from collections.abc import Sequence

from distspec.config import AnyDetector, Fisher, Forest, Isolation, Pca
from distspec.detectors import Arrays, ClassicalDetector
from distspec.spectra import WaveGrid

__all__ = ["build", "class_of"]


def class_of(settings: AnyDetector) -> type[ClassicalDetector]:
    """Give the class that fits the pieces of a detector and reads it again."""
    # Imported here: scikit-learn takes a second in every worker, and principal components do without.
    match settings:
        case Pca():
            from distspec.detectors.classical.pca import PcaDetector

            return PcaDetector
        case Forest():
            from distspec.detectors.classical.forest import UnsupervisedForest

            return UnsupervisedForest
        case Isolation():
            from distspec.detectors.classical.isolation import IsolationDetector

            return IsolationDetector
        case Fisher():
            from distspec.detectors.classical.fisher import FisherDetector

            return FisherDetector


def build(settings: AnyDetector, grid: WaveGrid, parts: Sequence[Arrays]) -> ClassicalDetector:
    """Make a detector of the pieces that were fitted on the sample, in their order; it may still ask for looks."""
    return class_of(settings).assemble(settings, grid, parts)
