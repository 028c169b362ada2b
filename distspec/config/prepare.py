"""Settings of the recipe that turns observed spectra into comparable ones."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distspec.config.base import Count, Fraction, Location, Off, Positive, Settings

__all__ = [
    "AtWavelength",
    "Cuts",
    "Distance",
    "DustColumn",
    "DustMap",
    "Grid",
    "Mean",
    "Median",
    "NoDust",
    "NoScale",
    "Prepare",
    "Sample",
    "Sky",
]


class Grid(Settings):
    """Wavelength grid of the store: first and last pixel centre, Å vacuum."""

    scale: Literal["log", "linear"] = "log"
    """Pixels of equal width in log wavelength, or in wavelength."""
    first: Positive = 3388.0
    """Centre of the first pixel, Å vacuum, in the recipe's frame."""
    last: Positive = 8318.0
    """Centre of the last pixel, Å vacuum; larger than `first`."""
    pixels: Annotated[int, Field(ge=16, le=1_000_000)] = 1000
    """Number of pixels."""

    @model_validator(mode="after")
    def _order(self) -> "Grid":
        if self.last <= self.first:
            raise ValueError("last must be larger than first")
        return self


class Sky(Settings):
    """What to do with observed-frame windows that hold strong sky lines."""

    mode: Literal["mask", "patch", "none"] = "mask"
    """`patch` writes the mean of the two neighbouring windows over the flux, as Ortiz & Boquien do; it can copy a
    strong line into the window. `mask` sets ivar = 0."""
    windows: tuple[tuple[Positive, Positive], ...] = ((5565.0, 5590.0),)
    """Windows [low, high] around sky lines, Å vacuum, observed frame."""


class NoDust(Settings):
    """The flux is left as it is: already corrected, or not to be."""

    kind: Literal["none"] = "none"


class DustColumn(Settings):
    """Correct by the source's own E(B-V) column; a spectrum without a value is set aside."""

    kind: Literal["column"] = "column"
    scale: Positive = 0.86
    """Factor on the column: surveys give the SFD map's own value, to which 0.86 applies as for the map."""
    law: Literal["F99", "CCM89", "O94", "G23"] = "F99"
    """Extinction law: Fitzpatrick (1999), Cardelli, Clayton & Mathis (1989), O'Donnell (1994), Gordon et al. (2023)."""
    r_v: Positive = 3.1
    """R_V, total over selective extinction; each law has a range of its own."""


class DustMap(Settings):
    """Correct by the SFD dust map in a folder that the `dustmaps` package filled."""

    kind: Literal["sfd"] = "sfd"
    path: Location
    """Folder with `SFD_dust_4096_ngp.fits` and `SFD_dust_4096_sgp.fits`, or one whose folder `sfd` holds them."""
    scale: Positive = 0.86
    """Factor on the map's E(B-V); 0.86 is the recalibration of Schlafly & Finkbeiner (2011)."""
    law: Literal["F99", "CCM89", "O94", "G23"] = "F99"
    """Extinction law: Fitzpatrick (1999), Cardelli, Clayton & Mathis (1989), O'Donnell (1994), Gordon et al. (2023)."""
    r_v: Positive = 3.1
    """R_V, total over selective extinction; each law has a range of its own."""


class Median(Settings):
    """Divide each spectrum by the median of its good pixels."""

    kind: Literal["median"] = "median"


class Mean(Settings):
    """Divide each spectrum by the mean of its good pixels."""

    kind: Literal["mean"] = "mean"


class AtWavelength(Settings):
    """Divide each spectrum by its median flux in a window around one wavelength."""

    kind: Literal["wavelength"] = "wavelength"
    wave: Positive
    """Centre of the window, Å vacuum, in the recipe's frame."""
    width: Positive = 10.0
    """Full width of the window, Å."""


class Distance(Settings):
    """Scale the amplitude to a common luminosity distance in the Planck 2018 cosmology: f (D_L(z) / D_L(z0))²."""

    kind: Literal["distance"] = "distance"
    redshift: Positive = 0.1
    """z0, whose luminosity distance all amplitudes are brought to."""


class NoScale(Settings):
    """Keep the survey's flux unit."""

    kind: Literal["none"] = "none"


class Cuts(Settings):
    """Quality limits; a spectrum outside any of them keeps its row and is set aside."""

    z_min: Annotated[float | None, Off] = None
    """Smallest redshift; none sets no limit."""
    z_max: Annotated[float | None, Off] = None
    """Largest redshift; none sets no limit."""
    snr_min: Annotated[float, Field(ge=0)] = 0.0
    """Smallest median signal-to-noise ratio per pixel of the grid."""
    total_snr_min: Annotated[float, Field(ge=0)] = 0.0
    """Smallest cumulative signal-to-noise ratio, sqrt(Σ (f/σ)²)."""
    coverage_min: Fraction = 0.6
    """Smallest share of good pixels on the grid."""
    span_min: Fraction = 0.0
    """Smallest share of the grid between a spectrum's first and last good pixel; gaps inside do not count."""
    classes: tuple[str, ...] = ()
    """Classes by the survey's pipeline, such as "GALAXY"; empty takes all."""
    zwarn: bool = True
    """Set aside what the redshift pipeline warns about."""
    duplicates: bool = True
    """Set aside a spectrum whose id stands in an earlier row."""


class Sample(Settings):
    """Steps that need statistics of the whole sample.

    They are taken over the usable spectra once, frozen into the store, and applied to every spectrum that is read from
    it, those that are added later included.
    """

    missing_max: Annotated[Fraction | None, Off] = None
    """Pixels that are masked in at least this share of the spectra are masked in all, and the spectra that were
    normalised by their median or mean are normalised again without them (Ortiz & Boquien: 0.1)."""
    impute: bool = False
    """Give masked pixels the sample's median at that wavelength and the sample's scatter as their error."""
    divide_by_mean: bool = False
    """Divide flux and error by the sample's mean spectrum (Böhm, Kim & Juneau)."""
    snr_quantile: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Set aside the spectra below this quantile of the median signal-to-noise ratio."""
    snr_highest: Annotated[Count | None, Off] = None
    """Set aside all but about this many spectra of highest median signal-to-noise ratio."""
    store: Annotated[Location | None, Off] = None
    """Take the statistics from this store, in place of this sample's own."""


class Prepare(Settings):
    """The recipe that turns observed spectra into comparable ones."""

    frame: Literal["rest", "observed"] = "rest"
    """Bring spectra to the rest frame by their redshift, or leave them as observed."""
    grid: Grid = Grid()
    sky: Sky = Sky()
    dust: Annotated[NoDust | DustColumn | DustMap, Field(discriminator="kind")] = NoDust()
    """Correction for Galactic extinction; survey files are refused until it is chosen."""
    normalize: Annotated[Median | Mean | AtWavelength | Distance | NoScale, Field(discriminator="kind")] = Median()
    """What the amplitude of each spectrum is brought to."""
    rebin: Literal["conserve", "average", "linear"] = "conserve"
    """`conserve`: mean over the bin weighted by overlap, errors propagated; `average`: plain mean of the pixels whose
    centre falls in the bin (Böhm, Kim & Juneau); `linear`: interpolation of flux and variance (Ortiz & Boquien)."""
    flux_factor: bool = False
    """Multiply the rest-frame flux density by 1 + z; the papers do not."""
    min_pixel_snr: Annotated[Annotated[float, Field(ge=0)] | None, Off] = None
    """Mask observed pixels whose signal-to-noise ratio is smaller (Ortiz & Boquien: 1)."""
    max_pixel_snr: Annotated[Positive | None, Off] = 50.0
    """Noise floor: σ is raised so that no pixel has a larger signal-to-noise ratio; `false` for none."""
    cuts: Cuts = Cuts()
    sample: Sample = Sample()
