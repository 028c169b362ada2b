"""Settings of the `detect`: the classical detectors, and what they are fitted on."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from distspec.config.base import Count, Fraction, Off, Positive, Settings

__all__ = [
    "AnyDetector",
    "Classical",
    "Detect",
    "Fisher",
    "Forest",
    "Isolation",
    "Pca",
]

Bins = Annotated[Annotated[int, Field(ge=2)] | None, Off]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Classical(Settings):
    """What every classical detector shares."""

    name: Name = ""
    """Name of its score: the kind, unless variants of one kind are to stand side by side."""


class Pca(Classical):
    """Principal components; chi-squared of what they leave, region by region (Reis et al. §2.2)."""

    kind: Literal["pca"] = "pca"
    name: Name = "pca"
    components: Count = 20
    """Principal components that are kept."""
    fit: Literal["global", "local"] = "global"
    """One set of components for whole spectra, or one for each region."""
    weight: Literal["ivar", "none"] = "ivar"
    """Residuals in units of σ, or as they are."""
    regions: tuple[tuple[Positive, Positive], ...] = ()
    """Wavelengths [low, high] of the regions, Å; none takes those of Reis et al. that lie on the grid, and windows."""
    window: Annotated[Positive | None, Off] = 100.0
    """Width of the windows that slide by half of it over the whole grid, Å; none leaves them out."""


class Forest(Classical):
    """Unsupervised random forest: real against synthetic spectra, and how few fall into the same leaves (§2.1)."""

    kind: Literal["forest"] = "forest"
    name: Name = "forest"
    synthetic: Literal["marginal", "chunks", "uniform"] = "marginal"
    """Synthetic spectra: each pixel drawn from its own distribution over the sample; each of `chunks` runs of pixels
    taken from one spectrum; or uniform between the least and the largest flux of each pixel."""
    chunks: Annotated[int, Field(ge=2)] = 10
    """Runs of pixels in a synthetic spectrum, for `synthetic = "chunks"`."""
    trees: Count = 100
    """Trees of the forest."""
    trees_per_draw: Count = 10
    """Trees that are trained on the same synthetic spectra."""
    subsample: Annotated[Count | None, Off] = 8_192
    """Spectra, real and synthetic together, that a tree is trained on; none takes all of the sample."""
    depth: Annotated[Count | None, Off] = None
    """Largest depth of a tree; none lets leaves become pure."""
    similarity: Literal["all", "pairwise", "neighbour"] = "all"
    """`all`: to all spectra of the survey, over a spectrum's own good leaves, from leaf counts. `pairwise`: mean to a
    reference sample, over the leaves that are good for both. `neighbour`: that of the k-th most similar one of them."""
    reference: Count = 2_500
    """Spectra of the reference sample, for `pairwise` and `neighbour`."""
    neighbour: Count = 10
    """k: place among the sorted distances, counted from 0, so that a spectrum of the reference counts itself."""
    bins: Bins = None
    """Pixels are averaged into so many features; none takes every pixel."""

    @model_validator(mode="after")
    def _near_enough(self) -> "Forest":
        if self.similarity == "neighbour" and self.neighbour >= self.reference:
            raise ValueError(f"neighbour = {self.neighbour} must be below reference = {self.reference}")
        return self


class Isolation(Classical):
    """Isolation forest on the ranks of fluxes among those of the sample (§2.3)."""

    kind: Literal["isolation"] = "isolation"
    name: Name = "isolation"
    trees: Count = 200
    """Trees of the forest."""
    subsample: Annotated[int, Field(ge=2)] = 256
    """Spectra that a tree isolates."""
    ranks: bool = True
    """False takes fluxes as they are, which finds extreme lines and little else."""
    bins: Bins = None
    """Pixels are averaged into so many features; none takes every pixel."""


class Fisher(Classical):
    """Fisher vector on a Gaussian mixture in the space of principal components (§2.4)."""

    kind: Literal["fisher"] = "fisher"
    name: Name = "fisher"
    components: Count = 10
    """Principal components whose space the mixture is fitted in."""
    gaussians: Count = 16
    """Gaussians of the mixture."""
    weight_floor: Fraction = 0.002
    """Smallest weight of a Gaussian; one of hardly any spectra would otherwise decide every score."""


AnyDetector = Annotated[
    Annotated[Pca, Tag("pca")]
    | Annotated[Forest, Tag("forest")]
    | Annotated[Isolation, Tag("isolation")]
    | Annotated[Fisher, Tag("fisher")],
    Discriminator("kind"),
]


class Detect(Settings):
    """Store -> classical detectors fitted, and their scores."""

    detectors: tuple[AnyDetector, ...] = ()
    """Detectors to fit, each with a name and a layer of its own."""
    sample: Annotated[int, Field(ge=2)] = 20_000
    """Spectra that trees and mixtures are fitted on, in chunks spread over the store; those of the validation set are
    not among them. What adds up (moments, leaf counts) is taken from the whole survey."""

    @model_validator(mode="after")
    def _distinct(self) -> "Detect":
        names = self.scores
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"two detectors are named {double[0]!r}; give each a name of its own")
        taken = sorted({"region", "region_chi2", "parts", "good_trees"} & set(names))
        if taken:
            raise ValueError(f"a detector cannot be named {taken[0]!r}, which tells what led to a score")
        return self

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of all scores: a Fisher detector has a second one, its mixture's own -log p."""
        return tuple(
            name
            for one in self.detectors
            for name in ((one.name, f"{one.name}_mixture") if one.kind == "fisher" else (one.name,))
        )
