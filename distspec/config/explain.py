"""Settings of the explanations: which spectra, which scores, by which methods; and the ascents of the density."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from distspec.config.base import Count, Fraction, Location, Off, Positive, ScoreName, Settings

__all__ = [
    "Ablation",
    "AnyMethod",
    "AnyPerturbation",
    "AnySegments",
    "Ascent",
    "ExpectedGradients",
    "Explain",
    "Flat",
    "Gaussians",
    "Gradient",
    "GradientInput",
    "Imo",
    "IntegratedGradients",
    "Lime",
    "LineSegments",
    "Occlusion",
    "Reconstructed",
    "SameShape",
    "Scale",
    "SegmentMean",
    "Slic",
    "Unchanged",
    "Uniform",
]

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Ascent(Settings):
    """The ascent of a spectrum's latents along the gradient of log p."""

    limit: Count = 200
    """Largest number of spectra followed per score."""
    steps: Count = 100
    """Steps of an ascent, at most."""
    length: Positive = 0.25
    """Length of a step at most; 1 is a standard deviation of the latents of ordinary spectra."""
    points: Annotated[int, Field(ge=2)] = 5
    """Places along the ascent that are decoded, start and end among them."""


# --- segments ---------------------------------------------------------------------------------------------------------


class Uniform(Settings):
    """Segments of equal width in pixels; pixels that remain form one more, so a divisor of the grid serves best."""

    kind: Literal["uniform"] = "uniform"
    count: Count = 125
    """Segments of equal width; at most the number of pixels."""


class Slic(Settings):
    """Superpixels of each spectrum: neighbours of like flux (Achanta et al. 2012; scikit-image)."""

    kind: Literal["slic"] = "slic"
    count: Count = 64
    """Segments asked for; how many there are is up to the spectrum."""
    sigma: Annotated[float, Field(ge=0)] = 3.0
    """Standard deviation of the smoothing beforehand, pixels."""
    compactness: Positive = 0.01
    """Weight of nearness against likeness of flux."""


class LineSegments(Settings):
    """A segment for each emission line, or for lines that overlap, and the continuum between them in equal pieces."""

    kind: Literal["lines"] = "lines"
    velocity: Positive = 700.0
    """Half-width of the window around a line, km/s."""
    width: Positive = 50.0
    """Largest width of a piece of continuum, Å at rest."""


AnySegments = Annotated[
    Annotated[Uniform, Tag("uniform")] | Annotated[Slic, Tag("slic")] | Annotated[LineSegments, Tag("lines")],
    Discriminator("kind"),
]


# --- what stands where a segment is switched off ----------------------------------------------------------------------


class Scale(Settings):
    """The smooth shape, drawn towards its median: (shape - median) factor + median, and the noise."""

    kind: Literal["scale"] = "scale"
    factor: float = 0.9
    """What deviations of the shape from its median are multiplied by; 1 changes nothing."""
    same_noise: bool = True
    """False scales the noise too."""


class Flat(Settings):
    """A level."""

    kind: Literal["flat"] = "flat"
    level: float = 1.0
    """Flux of the level, in the unit of the store: 1 is the norm of a normalized spectrum."""
    same_noise: bool = True
    """False puts white noise in the place of the spectrum's own."""
    sigma: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of that white noise, in the unit of the store's flux."""


class SegmentMean(Settings):
    """The mean of each segment."""

    kind: Literal["mean"] = "mean"
    same_noise: bool = True
    """Keep the spectrum's own noise; false puts white noise in its place."""
    sigma: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of that white noise, in the unit of the store's flux."""


class SameShape(Settings):
    """The smooth shape with white noise in the place of the spectrum's own."""

    kind: Literal["same_shape"] = "same_shape"
    sigma: Annotated[float, Field(ge=0)] = 0.05
    """Standard deviation of the white noise, in the unit of the store's flux."""


class Gaussians(Settings):
    """The spectrum with a Gaussian on each segment, an eighth of its width in σ."""

    kind: Literal["gaussians"] = "gaussians"
    amplitude: float = 0.1
    """Height of the Gaussians, in the unit of the store's flux; negative ones are dips."""
    same_noise: bool = True
    """Keep the spectrum's own noise; false puts white noise in its place."""
    sigma: Annotated[float, Field(ge=0)] = 0.05
    """Standard deviation of that white noise, in the unit of the store's flux."""


class Unchanged(Settings):
    """The spectrum itself: all weights should be zero, and what they are is the noise of the score."""

    kind: Literal["same"] = "same"


class Reconstructed(Settings):
    """What the model makes of the spectrum: weights tell which parts it fails to reconstruct."""

    kind: Literal["reconstruction"] = "reconstruction"
    same_noise: bool = False
    """True adds the spectrum's own noise."""


AnyPerturbation = Annotated[
    Annotated[Scale, Tag("scale")]
    | Annotated[Flat, Tag("flat")]
    | Annotated[SegmentMean, Tag("mean")]
    | Annotated[SameShape, Tag("same_shape")]
    | Annotated[Gaussians, Tag("gaussians")]
    | Annotated[Unchanged, Tag("same")]
    | Annotated[Reconstructed, Tag("reconstruction")],
    Discriminator("kind"),
]


# --- methods ----------------------------------------------------------------------------------------------------------


class Method(Settings):
    """What all methods share."""

    name: Name = ""
    """Name of the method: the kind, unless variants of one kind are to stand side by side."""


class Lime(Method):
    """Switch segments off at random, score, and fit a local linear model."""

    kind: Literal["lime"] = "lime"
    name: Name = "lime"
    segments: AnySegments = Uniform()
    """What is switched off as one: segments of equal width, of like flux, or of lines."""
    samples: Annotated[int, Field(ge=2)] = 5_000
    """Versions of a spectrum that are scored, each with about half of its segments switched off."""
    perturbation: AnyPerturbation = Reconstructed()
    """What stands where a segment is switched off; on planted anomalies `reconstruction` points best by far."""
    smoothing: Positive = 3.0
    """Standard deviation of the Gaussian that parts noise from shape, pixels."""
    kernel_width: Annotated[float, Field(ge=0.05)] = 0.25
    """Width of the kernel that weights samples by their cosine distance from the whole spectrum; below its bound hardly
    a mask but the first has any."""
    ridge: Annotated[float, Field(ge=0)] = 1.0
    """Penalty on the squares of the linear model's weights; 0 fits without one."""
    settle: Annotated[Fraction | None, Off] = None
    """Take no more samples of a spectrum when the standard errors of its weights are below this part of the heaviest
    weight; none takes all."""


class Imo(Method):
    """Inverse Multiscale Occlusion: put windows of the spectrum into ordinary ones."""

    kind: Literal["imo"] = "imo"
    name: Name = "imo"
    windows: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 4, 16, 64, 256)
    """Widths of the windows, pixels."""
    offsets: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Where the second window of each width begins, pixels; none are 0, so that all begin with the spectrum."""
    baselines: Annotated[int, Field(ge=2)] = 8
    """Ordinary spectra that windows are put into."""
    like: Literal["any", "class", "redshift"] = "any"
    """Draw them from the whole store, among those of the spectrum's class, or near its redshift."""
    weight: Literal["variance", "deviation"] = "variance"
    """Windows are combined with the inverse of their variance over baselines (the paper), or of their standard
    deviation (its public code). The other combination is kept beside it."""

    @model_validator(mode="after")
    def _pairs(self) -> "Imo":
        if self.offsets and len(self.offsets) != len(self.windows):
            raise ValueError(f"{len(self.offsets)} offsets for {len(self.windows)} windows; give one for each")
        return self


class Gradient(Method):
    """Gradient of the score with respect to flux: positive where more flux makes the spectrum odder."""

    kind: Literal["gradient"] = "gradient"
    name: Name = "gradient"


class GradientInput(Method):
    """Gradient of the score times flux."""

    kind: Literal["gradient_input"] = "gradient_input"
    name: Name = "gradient_input"


class IntegratedGradients(Method):
    """Gradient along the straight way from a baseline to the spectrum, times their difference."""

    kind: Literal["integrated_gradients"] = "integrated_gradients"
    name: Name = "integrated_gradients"
    steps: Count = 50
    """Nodes of the Gauss-Legendre rule."""
    baseline: Literal["zero", "reconstruction"] = "zero"
    """Flux 0, or what the model makes of the spectrum."""


class ExpectedGradients(Method):
    """Integrated gradients, averaged over ordinary spectra as baselines."""

    kind: Literal["expected_gradients"] = "expected_gradients"
    name: Name = "expected_gradients"
    steps: Count = 50
    """Nodes of the Gauss-Legendre rule between each baseline and the spectrum."""
    baselines: Count = 64
    """Ordinary spectra that serve as baselines."""
    like: Literal["any", "class", "redshift"] = "any"
    """Draw them from the whole store, among those of the spectrum's class, or near its redshift."""


class Ablation(Method):
    """What the score loses when a pixel becomes that of a baseline, one at a time."""

    kind: Literal["ablation"] = "ablation"
    name: Name = "ablation"
    baseline: Literal["zero", "reconstruction"] = "zero"
    """Flux 0, or what the model makes of the spectrum."""


class Occlusion(Method):
    """What the score loses when a sliding window becomes that of a baseline; where windows overlap, their mean."""

    kind: Literal["occlusion"] = "occlusion"
    name: Name = "occlusion"
    window: Count = 16
    """Width of the window, pixels."""
    stride: Count = 1
    """Pixels from one window to the next; at most the window, so that none is left out."""
    baseline: Literal["zero", "reconstruction"] = "zero"
    """Flux 0, or what the model makes of the spectrum."""

    @model_validator(mode="after")
    def _covers(self) -> "Occlusion":
        if self.stride > self.window:
            raise ValueError(f"stride = {self.stride} leaves pixels out; at most window = {self.window}")
        return self


AnyMethod = Annotated[
    Annotated[Lime, Tag("lime")]
    | Annotated[Imo, Tag("imo")]
    | Annotated[Gradient, Tag("gradient")]
    | Annotated[GradientInput, Tag("gradient_input")]
    | Annotated[IntegratedGradients, Tag("integrated_gradients")]
    | Annotated[ExpectedGradients, Tag("expected_gradients")]
    | Annotated[Ablation, Tag("ablation")]
    | Annotated[Occlusion, Tag("occlusion")],
    Discriminator("kind"),
]


class Explain(Settings):
    """Top rows and model -> weights of wavelengths, and the ascent to higher probability."""

    scores: Annotated[tuple[ScoreName, ...], Field(min_length=1)] = ("mse",)
    """Scores whose top lists are explained; each spectrum is explained for all of them."""
    methods: Annotated[tuple[AnyMethod, ...], Field(min_length=1)] = (Lime(),)
    """Methods that explain, each with a name and a layer of its own."""
    ids: Location | None = None
    """Explain these spectra in the place of the top lists: text with one id a line (.txt), or a table (CSV, FITS,
    Parquet, VOTable) with a column `id`."""
    ascent: Annotated[Ascent | None, Off] = Ascent()
    """Where the model has a density: follow the top list of the score `density`, and of the other `scores`."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the scored spectra that is explained."""
    limit: Count = 10_000
    """Largest number of spectra explained per score."""

    @model_validator(mode="after")
    def _distinct(self) -> "Explain":
        names = [one.name for one in self.methods]
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"two methods are named {double[0]!r}; give each a name of its own")
        return self
