"""Fisher vector of a Gaussian mixture: how strongly a spectrum would pull at the parameters of the density."""

import warnings
from collections.abc import Sequence
from typing import Any, Final, Self

import numpy as np
from jaxtyping import Float32, Float64
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from distspec.config import AnyDetector, Fisher
from distspec.detectors import Arrays, Fields
from distspec.detectors.classical.principal_components import CoMoments, Components, Origin, blocks, single, take
from distspec.errors import ConfigError, LayoutError
from distspec.spectra import Spectra, WaveGrid

__all__ = ["FisherDetector", "Mixture"]

_NARROWEST: Final = 1e-3
"""Variance added to every Gaussian, in units of the variance along each component: none collapses on a few spectra."""

_REACH: Final = 1e3
"""Where coordinates are cut while the mixture is fitted; variances, as differences of squares, keep their digits."""

_FARTHEST: Final = 1e60
"""Coordinates are cut here: their fourth powers are then still finite in double precision."""


class Mixture:
    """Gaussians with diagonal covariances.

    Arguments:
        weights: of sum 1.
        means: of each Gaussian.
        variances: of each Gaussian along each axis.

    References:
        Perronnin & Dance 2007, CVPR, for the Fisher vector; Sánchez et al. 2013, IJCV 105, 222, appendix A, for the
        Fisher information as a diagonal.
    """

    def __init__(
        self,
        weights: Float64[np.ndarray, "K"],
        means: Float64[np.ndarray, "K D"],
        variances: Float64[np.ndarray, "K D"],
    ) -> None:
        self.weights = weights
        self.means = means
        self.variances = variances

    @classmethod
    def of(cls, points: Float64[np.ndarray, "n D"], gaussians: int, floor: float, seed: int) -> tuple["Mixture", int]:
        """Fit the mixture to points of unit variance along each axis.

        Arguments:
            points: two different ones at least.
            gaussians: as many, or as there are different points.
            floor: smallest weight; one below is raised to it, and all are divided by their sum.
            seed: of the starts.

        Returns:
            The mixture, and the number of weights that were raised.
        """
        wanted = min(gaussians, len(np.unique(points, axis=0)))
        fit = GaussianMixture(wanted, covariance_type="diag", reg_covar=_NARROWEST, n_init=2, random_state=seed % 2**32)
        with warnings.catch_warnings():
            # Repeated spectra, and groups that only many steps tell apart, are no reason to worry the reader.
            warnings.simplefilter("ignore", ConvergenceWarning)
            fit.fit(points)
        floor = min(floor, 1.0 / wanted)
        low = fit.weights_ < floor
        weights = np.maximum(fit.weights_, floor)
        return cls(weights / weights.sum(), fit.means_, fit.covariances_), int(low.sum())

    def gradients(
        self, points: Float64[np.ndarray, "n D"]
    ) -> tuple[Float64[np.ndarray, "n K"], Float64[np.ndarray, "n K D"], Float64[np.ndarray, "n K D"]]:
        """Give the Fisher vector of each point: by weights, means and standard deviations.

        With posteriors γ_k and u_kd = (x_d - μ_kd) / σ_kd, in units of the parameters' own standard errors for one
        point: (γ_k - w_k) / √w_k, γ_k u_kd / √w_k, and γ_k (u_kd² - 1) / √(2 w_k).
        """
        u, logs = self._logs(points)
        gamma = np.exp(logs - logsumexp(logs, axis=1, keepdims=True))
        root = np.sqrt(self.weights)
        scaled = (gamma / root)[:, :, None]
        return (gamma - self.weights) / root, scaled * u, scaled * (u**2 - 1.0) / np.sqrt(2.0)

    def density(self, points: Float64[np.ndarray, "n D"]) -> Float64[np.ndarray, "n"]:
        """Give log p of each point."""
        return np.asarray(logsumexp(self._logs(points)[1], axis=1))

    def _logs(
        self, points: Float64[np.ndarray, "n D"]
    ) -> tuple[Float64[np.ndarray, "n K D"], Float64[np.ndarray, "n K"]]:
        """Give u_kd, and the logarithm of each Gaussian's weighted density."""
        sigma = np.sqrt(self.variances)
        u = np.clip((points[:, None, :] - self.means) / sigma, -_FARTHEST, _FARTHEST)
        norm = np.log(self.weights) - np.log(sigma).sum(axis=1) - 0.5 * sigma.shape[1] * np.log(2 * np.pi)
        return u, norm - 0.5 * (u**2).sum(axis=2)


class FisherDetector:
    """Fisher-vector score in the space of principal components.

    A spectrum's score is gᵀF⁻¹g: g is the gradient of its log density by weights, means and standard deviations of a
    Gaussian mixture, F their Fisher information in its diagonal approximation, which holds where Gaussians are well
    apart. Spectra of the mixture itself then score K - 1 + 2KD on average. It is the squared length of the Fisher
    vector, which is therefore not normalised, as it is for pictures.

    Components and mixture are both fitted on the sample: a mixture needs spectra at hand, and a sample of thousands
    fixes ten components well. So there is no look over the survey. Coordinates are the projections divided by the
    square roots of the eigenvalues. What the components leave of a spectrum is not seen; that is what `pca` scores.

    References:
        Reis et al., section 2.4; Rotman et al. 2019, KDIR.

    Arguments:
        settings: of the detector.
        grid: of the spectra.
        components: principal components of the sample.
        mixture: Gaussians in units of each component's standard deviation.
        raised: number of weights that were raised to the floor.
    """

    def __init__(
        self, settings: Fisher, grid: WaveGrid, components: Components, mixture: Mixture, raised: int = 0
    ) -> None:
        self.settings: AnyDetector = settings
        self.grid = grid
        self.components = components
        self.mixture = mixture
        self._settings = settings
        self._raised = raised

    def __repr__(self) -> str:
        gaussians, axes = self.mixture.means.shape
        return f"FisherDetector({self._settings.name!r}, {gaussians} Gaussians in {axes} components)"

    # --- fit ----------------------------------------------------------------------------------------------------------

    @classmethod
    def parts(cls, settings: Fisher) -> int:
        """Give 1: the mixture is fitted in one piece."""
        return 1

    @classmethod
    def grow(cls, settings: Fisher, sample: Spectra, seed: int, part: int) -> Arrays:
        """Fit components and mixture on the sample.

        Raises:
            ConfigError: the spectra of the sample do not differ, so that there is no component.
        """
        origin = Origin.of(sample)
        moments = CoMoments.of(sample, origin)
        components = Components.of(moments.mean(origin), moments.covariance, settings.components)
        if not len(components.values):
            raise ConfigError(
                f"detector {settings.name!r} got a sample of {moments.rows} spectra with good pixels that do not "
                f"differ; expected two different ones at least; raise `detect.sample`"
            )
        points = np.clip(_points(components, sample)[(sample.ivar > 0).any(axis=1)], -_REACH, _REACH)
        mixture, raised = Mixture.of(points, settings.gaussians, settings.weight_floor, seed)
        return cls(settings, sample.grid, components, mixture, raised).to_arrays()

    @classmethod
    def assemble(cls, settings: Fisher, grid: WaveGrid, parts: Sequence[Arrays]) -> Self:
        """Make the detector, which is ready to score."""
        return cls.from_arrays(settings, grid, parts[0])

    @property
    def looking(self) -> bool:
        """False: all is learned from the sample."""
        return False

    def look(self, spectra: Spectra) -> Any:
        """Refuse: there is nothing to look for.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self!r} needs no look; call `score`")

    def summary(self, arrays: Arrays) -> Any:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self!r} needs no look; call `score`")

    def learn(self, summary: Any) -> Self:
        """Refuse: there is nothing to learn.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self!r} needs no look; call `score`")

    # --- use ----------------------------------------------------------------------------------------------------------

    @property
    def fields(self) -> Fields:
        """The score; -log p under the mixture; and what each Gaussian adds to the score."""
        name = self._settings.name
        return {name: ("f4", ()), f"{name}_mixture": ("f4", ()), "parts": ("f4", (len(self.mixture.weights),))}

    @property
    def facts(self) -> dict[str, Any]:
        """Numbers of components and Gaussians, the variance explained, and how many weights were raised."""
        return {
            "components": len(self.components.values),
            "explained": self.components.explained,
            "gaussians": len(self.mixture.weights),
            "raised": self._raised,
        }

    def score(self, spectra: Spectra) -> Float32[np.ndarray, "n"]:
        """Score spectra: the squared length of the Fisher vector; higher = odder. NaN without a good pixel.

        Raises:
            LayoutError: the spectra are on another grid.
        """
        return self.details(spectra)[self._settings.name]

    def details(self, spectra: Spectra) -> Arrays:
        """Give all `fields`.

        Raises:
            LayoutError: the spectra are on another grid.
        """
        if spectra.grid != self.grid:
            raise LayoutError(f"spectra on {spectra.grid}; the detector is for {self.grid}; fit it on these spectra")
        points = _points(self.components, spectra)
        gaussians, axes = self.mixture.means.shape
        parts, surprise = np.zeros((len(points), gaussians)), np.zeros(len(points))
        for rows in blocks(len(points), gaussians * axes):
            weights, means, widths = self.mixture.gradients(points[rows])
            parts[rows] = weights**2 + (means**2).sum(axis=2) + (widths**2).sum(axis=2)
            surprise[rows] = -self.mixture.density(points[rows])
        name = self._settings.name
        return {name: single(parts.sum(axis=1)), f"{name}_mixture": single(surprise), "parts": single(parts)}

    # --- as arrays ----------------------------------------------------------------------------------------------------

    def to_arrays(self) -> Arrays:
        """Give the detector as arrays: those of `Components`, and `weights`, `means`, `variances`, `raised`."""
        return {
            **self.components.to_arrays(),
            "weights": self.mixture.weights,
            "means": self.mixture.means,
            "variances": self.mixture.variances,
            "raised": np.array([self._raised], np.int64),
        }

    @classmethod
    def from_arrays(cls, settings: Fisher, grid: WaveGrid, arrays: Arrays) -> Self:
        """Make the detector of `to_arrays` again.

        Raises:
            ValueError: an array is absent, too many, of another kind or shape, not finite, or not what it claims.
        """
        components = Components.from_arrays(arrays, grid.pixels)
        weights = take(arrays, "weights", np.float64, (None,))
        shape = (len(weights), len(components.values))
        means, variances = (take(arrays, name, np.float64, shape) for name in ("means", "variances"))
        raised = int(take(arrays, "raised", np.int64, (1,))[0])
        if 0 in shape or not (weights > 0).all() or abs(weights.sum() - 1) > 1e-6:
            raise ValueError("the mixture is empty, or its weights are not positive and of sum 1")
        if not (variances > 0).all() or not 0 <= raised <= len(weights):
            raise ValueError("variances are not positive, or more weights were raised than there are")
        detector = cls(settings, grid, components, Mixture(weights, means, variances), raised)
        known = detector.to_arrays().keys()
        if arrays.keys() != known:
            raise ValueError(f"arrays {sorted(arrays)}; expected {sorted(known)}")
        return detector


def _points(components: Components, spectra: Spectra) -> Float64[np.ndarray, "n D"]:
    """Project spectra, in units of each component's standard deviation; NaN without a good pixel."""
    points = np.zeros((len(spectra), len(components.values)))
    for rows in blocks(len(spectra), spectra.grid.pixels):
        points[rows] = components.project(spectra.flux[rows], spectra.ivar[rows] > 0)[0]
    return np.asarray(points / np.sqrt(components.values))
