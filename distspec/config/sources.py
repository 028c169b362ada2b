"""Settings of the sources: which survey, where its files lie, which of its spectra are wanted."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distspec.config.base import Count, Fraction, Location, Nearby, Positive, Settings

__all__ = ["Condition", "Desi", "Lamost", "Sdss", "Simulate", "Source", "Specutils", "Table", "Wanted"]


class Condition(Settings):
    """One condition on one column of a catalogue; all that are stated must hold, and a missing value fails."""

    column: str
    """Name of the column, in upper or lower case."""
    min: float | None = None
    """Lower limit, itself included, in the unit of the column."""
    max: float | None = None
    """Upper limit, itself included."""
    above: float | None = None
    """Lower limit, itself excluded."""
    below: float | None = None
    """Upper limit, itself excluded."""
    one_of: tuple[str | int, ...] | None = None
    """Values, compared without regard to padding; text with regard to case."""
    any_bits: tuple[Annotated[int, Field(ge=0, le=63)], ...] | None = None
    """Numbers of bits, 0 the lowest, of which at least one must be set."""
    no_bits: tuple[Annotated[int, Field(ge=0, le=63)], ...] | None = None
    """Numbers of bits of which none may be set."""


class Wanted(Settings):
    """Which rows of a catalogue are wanted."""

    where: tuple[Condition, ...] = ()
    """Tables, each with a condition; all of them must hold."""
    highest: str | None = None
    """Column (such as SN_MEDIAN_ALL) whose `limit` highest values are taken."""
    limit: Count | None = None
    """How many rows of highest `highest` are taken."""

    @model_validator(mode="after")
    def _pair(self) -> "Wanted":
        if (self.highest is None) != (self.limit is None):
            raise ValueError("highest and limit belong together")
        return self


class Simulate(Settings):
    """A simulated survey with truth."""

    kind: Literal["simulate"] = "simulate"
    spectra: Count = 20_000
    """Spectra of the survey."""
    galaxies: Fraction = 0.85
    """Share of galaxies; with `quasars` and `stars` it makes 1."""
    quasars: Fraction = 0.08
    """Share of quasars."""
    stars: Fraction = 0.07
    """Share of stars."""
    anomalies: Fraction = 0.01
    """Share of the spectra that carry a planted anomaly, all kinds in equal number."""
    z_max: Positive = 0.4
    """Largest galaxy redshift; quasars and stars have their own ranges."""
    snr: Positive = 20.0
    """Median over the survey of the median signal-to-noise ratio per observed pixel."""

    @model_validator(mode="after")
    def _shares(self) -> "Simulate":
        if abs(self.galaxies + self.quasars + self.stars - 1) > 1e-6:
            raise ValueError("galaxies + quasars + stars must be 1")
        return self


class Sdss(Settings):
    """SDSS, BOSS and eBOSS spectra, as `spec` files or as plates."""

    kind: Literal["sdss"] = "sdss"
    path: Location
    """A file, a folder that is searched, a list (`*.txt`) of files, a `.tar` or `.zip`, or a bucket (`s3://...`)."""
    layout: Literal["auto", "spec", "plate"] = "auto"
    """`spec`: one file a spectrum, lite or full; `plate`: `spPlate` files with `spZbest`; `auto`: what is there."""
    catalog: Nearby | None = None
    """A `specObj` or `spAll` file; only what it lists and `wanted` selects is taken."""
    wanted: Wanted = Wanted()

    @model_validator(mode="after")
    def _needs_catalog(self) -> "Sdss":
        if self.wanted != Wanted() and self.catalog is None:
            raise ValueError("wanted needs a catalog")
        return self


class Desi(Settings):
    """DESI `coadd` or `spectra` files with their `redrock` files, by healpix or by tile."""

    kind: Literal["desi"] = "desi"
    path: Location
    """A file, a folder that is searched, a list (`*.txt`) of files, a `.tar` or `.zip`, or a bucket (`s3://...`)."""
    catalog: Nearby | None = None
    """A table with TARGETID and Z, such as `zall-pix-*.fits`: redshifts of spectra that have no redrock file."""
    wanted: Wanted | None = None
    """Rows of the catalogue to which the ingest is limited; none takes every spectrum of the files."""
    targets: tuple[str, ...] = ()
    """Target classes, such as "BGS_ANY", "LRG", "ELG", "QSO", "MWS_ANY": spectra of any of them; empty takes all."""

    @model_validator(mode="after")
    def _needs_catalog(self) -> "Desi":
        if self.wanted is not None and self.catalog is None:
            raise ValueError("wanted needs a catalog")
        return self


class Lamost(Settings):
    """LAMOST low-resolution spectra in the layouts of DR1, DR8 and DR10."""

    kind: Literal["lamost"] = "lamost"
    path: Location
    """A file, a folder that is searched, a list (`*.txt`) of files, a `.tar` or `.zip`, or a bucket (`s3://...`)."""
    catalog: Nearby | None = None
    """A catalogue file (FITS or CSV) with OBSID; only what it lists and `wanted` selects is taken."""
    wanted: Wanted = Wanted()


class Table(Settings):
    """Parquet tables with one spectrum a row: flat columns, HATS, or Multimodal Universe."""

    kind: Literal["table"] = "table"
    path: Location
    """A file, a folder that is searched (a HATS catalogue is one), or a bucket (`s3://...`)."""
    spectrum: str | None = None
    """Struct column that holds the arrays; none takes "spectrum" if it is there, else columns of the table itself."""
    flux: str = "flux"
    """Array of flux densities, 1e-17 erg/s/cm2/Å or relative."""
    wave: str | None = None
    """Array of wavelengths in vacuum; none takes the first of lambda, wavelength, wave, loglam."""
    wave_unit: Literal["Angstrom", "nm", "micron", "log10(Angstrom)"] | None = None
    """Unit of `wave`; none takes Å, or log10(Å) for a name that begins with "log", where the values allow no other."""
    first: Positive | None = None
    """First wavelength of the grid, Å vacuum; none takes the range of the first spectra of the first file."""
    last: Positive | None = None
    """Last wavelength of the grid, Å vacuum; none takes it as for `first`."""
    ivar: str | None = None
    """Array of inverse variances; none takes "ivar"."""
    error: str | None = None
    """Array of standard deviations, in place of `ivar`."""
    id: str | None = None
    """Column of ids; none takes the first of object_id, targetid, specobjid, obsid, id."""
    zwarn_true: Literal["bad", "good"] | None = None
    """What `true` says of a redshift in a boolean ZWARN column; tables with either meaning have been published."""


class Specutils(Settings):
    """Any format that `specutils` reads, brought to one grid; slower than the others."""

    kind: Literal["specutils"] = "specutils"
    path: Location
    """A file or a folder that is searched."""
    format: str | None = None
    """Name of the specutils loader; none lets specutils find it."""
    vacuum: bool = False
    """State that wavelengths are in vacuum where a file does not say; one that says air is refused all the same."""
    scale: Literal["log", "linear"] = "linear"
    """Pixels of equal width in log wavelength, or in wavelength."""
    first: Positive
    """First pixel of the observed-frame grid that all spectra are brought to, Å vacuum."""
    last: Positive
    """Last pixel of that grid, Å vacuum."""
    pixels: Annotated[int, Field(ge=16, le=1_000_000)]
    """Number of pixels of that grid."""
    catalog: Nearby | None = None
    """A table (CSV, ECSV, FITS, Parquet) with file, id and z, for redshifts that the files do not hold."""


Source = Annotated[Simulate | Sdss | Desi | Lamost | Table | Specutils, Field(discriminator="kind")]
