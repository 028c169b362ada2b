"""Settings of the models: autoencoders, the density of their latents, and how each is fitted."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from distspec.config.base import Count, Fraction, Off, Positive, Settings

__all__ = [
    "AnyDensity",
    "Architecture",
    "Convolutional",
    "Dense",
    "Density",
    "Fit",
    "Redshifted",
    "Sliced",
    "Spline",
    "Variational",
]

Dropout = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]


class Dense(Settings):
    """Dense autoencoder (Böhm et al.): hidden layers of the encoder, mirrored in the decoder."""

    kind: Literal["dense"] = "dense"
    hidden: tuple[Count, ...] = (800, 590)
    """Units of the encoder's hidden layers, the first next to the spectrum; the decoder mirrors them."""
    latents: Count = 10
    """Numbers that a spectrum is reduced to."""
    activation: Literal["relu", "leaky_relu"] = "leaky_relu"
    """What follows every layer but the last of encoder and decoder."""
    dropout: Dropout = 0.0
    """Share of a hidden layer's units that each training step leaves out."""
    scale: Literal["unit", "mean"] = "unit"
    """What the centred flux is divided by before the first layer: 1, or the mean spectrum of the training set."""


class Convolutional(Settings):
    """Convolutional autoencoder (Sharma et al.): each of `channels` is a convolution and a halving, mirrored."""

    kind: Literal["convolutional"] = "convolutional"
    channels: Annotated[tuple[Count, ...], Field(min_length=1)] = (32, 16, 8, 8)
    """Channels of each convolution, the first next to the spectrum; the pixels must be divisible by 2 as often. The
    latents are the last one's channels times the pixels that remain."""
    kernel: Count = 8
    """Width of a convolution, pixels."""
    scaling: Literal["maximum", "range", "none"] = "maximum"
    """What maps each spectrum into [0, 1]: division by its maximum, or its minimum and maximum."""
    output: Literal["sigmoid", "linear"] = "sigmoid"
    """What the decoder ends with; `sigmoid` keeps the reconstruction in [0, 1] before it is scaled back."""

    @model_validator(mode="after")
    def _reachable(self) -> "Convolutional":
        if self.output == "sigmoid" and self.scaling == "none":
            raise ValueError("a sigmoid output reaches only [0, 1]: set scaling, or output = 'linear'")
        return self


class Variational(Settings):
    """InfoVAE (Ortiz & Boquien): R * mean squared error + (1 - α) KL + (α + λ - 1) MMD."""

    kind: Literal["variational"] = "variational"
    hidden: tuple[Count, ...] = (256, 128, 64)
    """Units of the encoder's hidden layers, the first next to the spectrum; the decoder mirrors them."""
    latents: Count = 12
    """Numbers that a spectrum is reduced to."""
    reconstruction: Positive = 3776.0
    """R, about the number of pixels."""
    alpha: Fraction = 0.0
    """α; the weight of the Kullback-Leibler term is 1 - α."""
    lam: Annotated[float, Field(ge=1)] = 8.606942414688938
    """λ; the weight of the MMD term is α + λ - 1."""


class Redshifted(Settings):
    """Spender (Melchior et al.): attention encoder on observed wavelengths, decoder at rest, moved to each redshift."""

    kind: Literal["redshifted"] = "redshifted"
    latents: Count = 10
    """Numbers that a spectrum is reduced to."""
    hidden: tuple[Count, ...] = (64, 256, 1024)
    """Hidden layers of the decoder."""
    activation: Literal["speculator", "leaky_relu"] = "speculator"
    """What follows every hidden layer of the decoder; `speculator` has two learned numbers for each unit (Alsing et al.
    2020)."""
    z_max: Annotated[float, Field(gt=-1)] = 0.5
    """Largest redshift that the model serves: its rest frame reaches from the grid's first wavelength at this redshift
    to its last at redshift 0."""
    rest_pixels: Annotated[Count | None, Off] = None
    """Pixels of the rest-frame model, linear in wavelength; none takes the grid's number times 1 + z_max."""
    similarity: bool = True
    """Add the loss that brings spectra of equal rest-frame shape together in latent space."""
    consistency: bool = True
    """Add the loss that brings a spectrum and its copy at another redshift together in latent space."""
    similarity_amplitude: Positive = 20.0
    """Largest weight of a squared difference between two rest-frame spectra in the similarity loss."""
    similarity_width: Positive = 1000.0
    """σ of that weight along wavelength, Å: it falls as exp(-(λ - 5000 Å)² / 4σ²)."""
    consistency_variance: Positive = 1e-2
    """Variance in units of which distances between latents enter the consistency loss."""
    fit_amplitude: bool = False
    """Multiply each reconstruction by what fits its spectrum best, for spectra without a common normalisation."""


def _kind_or(default: str) -> Discriminator:
    """Tell kinds apart where the usual one need not be named."""
    return Discriminator(
        lambda value: value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", None)
    )


Architecture = Annotated[
    Annotated[Dense, Tag("dense")]
    | Annotated[Convolutional, Tag("convolutional")]
    | Annotated[Variational, Tag("variational")]
    | Annotated[Redshifted, Tag("redshifted")],
    _kind_or("dense"),
]


class Fit(Settings):
    """How a network is fitted by gradient descent."""

    epochs: Count = 40
    """Passes over the training spectra, at most."""
    batch: Count = 512
    """Rows in a step, over all workers together."""
    optimizer: Literal["adam", "rmsprop", "sgd"] = "adam"
    """Rule of the steps; `adam` is AdamW."""
    learning_rate: Positive = 1e-3
    """Learning rate at the start; of `one_cycle` the largest."""
    final_learning_rate: Positive = 1e-5
    """Learning rate at the end; of `plateau` the least. `constant` does without."""
    schedule: Literal["polynomial", "plateau", "one_cycle", "constant"] = "polynomial"
    """`polynomial`: linear fall from the first to the final rate; `plateau`: a tenth after every `plateau` epochs
    without a better validation loss; `one_cycle`: cosine up from a 25th and down again over all steps."""
    decay_steps: Annotated[Count | None, Off] = None
    """`polynomial`: steps of the fall, after which the final rate stays; none takes all steps."""
    plateau: Count = 5
    """`plateau`: epochs without a better validation loss before the rate falls to a tenth."""
    weight_decay: NotNegative = 0.0
    """Pull of all weights towards zero: its product with the learning rate is the share that each step takes off (of
    `rmsprop` and `sgd`, a penalty on the squares of weights)."""
    clip: Annotated[Positive | None, Off] = None
    """Largest norm of a gradient; none leaves it as it is."""
    patience: Count = 8
    """Epochs without a better validation loss before training stops."""
    min_delta: NotNegative = 0.0
    """A validation loss counts as better if it is lower by more than this."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` multiplies matrices in 16 bits; weights, losses and sums stay in 32."""


class Density(Settings):
    """What every density of latents shares."""

    labels: tuple[str, ...] = ()
    """Catalogue columns whose values together name a spectrum's class."""
    relabel: bool = True
    """With labels: fit, give every spectrum its likeliest class (without prior), and fit again (Böhm et al., eq. 6)."""
    whiten: bool = True
    """Begin with the linear map that gives the latents zero mean and unit covariance."""


class Sliced(Density):
    """Sliced iterative normalizing flow (SINF/GIS). What is none follows the rules of the public code."""

    kind: Literal["sliced"] = "sliced"
    layers: Count = 500
    """Layers at most; the validation set stops the fit, of latents after 10 to 50 layers with the regularization
    below."""
    patience: Count = 5
    """Layers without a better validation log p before the fit stops."""
    directions: Annotated[Count | None, Off] = None
    """Directions of a layer, K."""
    knots: Annotated[Annotated[int, Field(ge=2, le=10_000)] | None, Off] = None
    """Knots of a one-dimensional map, M."""
    bandwidth: Positive = 1.0
    """Bandwidth of the kernel density estimate, in units of Scott's rule."""
    regularization: Annotated[tuple[Fraction, Fraction] | None, Off] = (0.5, 0.99)
    """Shares of the identity mixed into a map and into the slopes of its tails, (α1, α2). None is the paper's rule,
    1 - 0.02 log10 n and 1 - 0.001 log10 n, which takes seven times the layers to the same likelihood."""
    slopes: Literal["regression", "one"] = "regression"
    """Slopes of the tails: fitted to the outermost data, or 1."""
    components: Annotated[Count | None, Off] = None
    """Without labels: Gaussians of a mixture that parts the latents into classes, each with maps of its own, since no
    single map unfolds separate groups well. None tries up to eight; 1 takes the latents as one."""
    whiten_each: bool = True
    """Whiten every class by itself, and not the pooled data."""
    balance: bool = True
    """Look for directions in which the classes differ from a Gaussian, and not the pooled data."""
    shrink_below: Annotated[int, Field(ge=0)] = 50
    """Classes of fewer objects than this lean on the pooled data, the more the smaller they are."""


class Spline(Density):
    """Neural spline flow (zuko), conditioned on the class."""

    kind: Literal["spline"] = "spline"
    transforms: Count = 5
    """Transforms, one after the other."""
    hidden: Annotated[tuple[Count, ...], Field(min_length=1)] = (128, 128)
    """Units of the hidden layers of the network that gives each transform its splines."""
    bins: Annotated[int, Field(ge=2)] = 8
    """Pieces of a spline."""
    fit: Fit = Fit(epochs=100, batch=1024, patience=10)
    """How the flow is fitted."""


AnyDensity = Annotated[
    Annotated[Sliced, Tag("sliced")] | Annotated[Spline, Tag("spline")],
    _kind_or("sliced"),
]
