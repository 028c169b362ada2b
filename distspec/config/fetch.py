"""Settings of `distspec fetch`: which archive, which of its spectra, and how gently it is asked for them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distspec.config.base import Count, Positive, Settings

__all__ = ["Fetch", "FetchDesi", "FetchSdss", "FetchSparcl", "Transfer"]

Address = Annotated[str, Field(pattern=r"^https?://[^\s?#]+$")]
"""An archive, a mirror of it, or a server of one's own."""


class Transfer(Settings):
    """How an archive is asked: few connections, a bounded rate, and patience."""

    connections: Annotated[int, Field(ge=1, le=16)] = 4
    """Connections that are open at a time."""
    per_second: Positive = 10.0
    """Requests a second, over all connections together."""
    attempts: Count = 6
    """Attempts at one file that bring nothing; an attempt that brings a part of it does not count."""
    backoff: Positive = 1.0
    """Wait after the first failed attempt, s; it doubles with each, and a part of it is drawn at random."""
    longest_wait: Positive = 120.0
    """Longest wait between attempts, s; where the archive asks for a longer one, the run ends."""
    connect_timeout: Positive = 10.0
    """Patience for a connection, s."""
    stall_timeout: Positive = 60.0
    """Patience while no byte comes, s."""
    give_up: Count = 10
    """Files that fail one after the other, in spite of all attempts, before the archive is taken to be down."""


class FetchSdss(Settings):
    """Spectra of SDSS, BOSS and eBOSS from the Science Archive Server: `distspec fetch sdss to=FOLDER ids=TABLE`."""

    kind: Literal["sdss"] = "sdss"
    to: str
    """Folder that receives the files, in the archive's own tree."""
    ids: str | None = None
    """A table (CSV, ECSV, FITS, Parquet) with plate, mjd, fiberid and, if known, run2d."""
    query: str | None = None
    """SQL for SkyServer whose result has the columns of `ids`, in place of them."""
    release: Literal["dr8", "dr9", "dr10", "dr11", "dr12", "dr13", "dr14", "dr15", "dr16", "dr17"] = "dr17"
    """Data release whose files are fetched."""
    run2d: Annotated[str, Field(pattern=r"^(26|103|104|v\d+_\d+_\d+)$")] | None = None
    """Reduction of all spectra whose row names none; none tries those of the release in which the plate can be."""
    spectra: Literal["lite", "full"] = "lite"
    """`full` files also hold the single exposures."""
    plates: bool = False
    """Fetch whole plates (`spPlate` with `spZbest`) in place of a file for each spectrum."""
    url: Address = "https://data.sdss.org/sas"
    """Root of the archive, or of a mirror of it."""
    skyserver: Address = "https://skyserver.sdss.org"
    """Root of SkyServer, which answers `query`."""
    rows_max: Count = 500_000
    """Rows at which SkyServer cuts an answer off; a query that gives as many is refused."""
    checksums: str | None = None
    """A list by `sha1sum`, `md5sum` or `sha256sum`, for an archive that publishes none beside its files."""
    check: bool = False
    """Read again the files that are there, and replace those that are no longer what was fetched."""
    transfer: Transfer = Transfer()

    @model_validator(mode="after")
    def _one_list(self) -> "FetchSdss":
        if (self.ids is None) == (self.query is None):
            raise ValueError("give either ids (a table) or query (SQL)")
        return self


class FetchDesi(Settings):
    """DESI `coadd` and `redrock` files from the public releases: `distspec fetch desi to=FOLDER ids=TABLE`."""

    kind: Literal["desi"] = "desi"
    to: str
    """Folder that receives the files, in the archive's own tree."""
    ids: str
    """A table (CSV, ECSV, FITS, Parquet) with survey, program, healpix; or tileid, night, petal; or targetid."""
    catalog: str | None = None
    """A redshift catalogue (such as zall-pix-iron.fits) that says in which healpix a targetid lies."""
    primary: bool = True
    """Of a target's several coadds take the one that the catalogue marks as its best (ZCAT_PRIMARY)."""
    release: Literal["edr", "dr1"] = "dr1"
    """Data release whose files are fetched: the early one, or DR1."""
    url: Address = "https://data.desi.lbl.gov/public"
    """Root of the archive, or of a mirror of it."""
    check: bool = False
    """Read again the files that are there, and replace those that are no longer what was fetched."""
    transfer: Transfer = Transfer()


class FetchSparcl(Settings):
    """Spectra from the SPARCL service of NOIRLab, as Parquet tables: `distspec fetch sparcl to=FOLDER ids=TABLE`."""

    kind: Literal["sparcl"] = "sparcl"
    to: str
    """Folder that receives the tables."""
    ids: str | None = None
    """A table (CSV, ECSV, FITS, Parquet) with sparcl_id, specid or targetid."""
    where: dict[str, tuple[str | int | float, ...]] = Field(default_factory=dict)
    """Constraints in place of `ids`: values of a category, or the two ends of a range, by field:
    `{spectype = ["GALAXY"], redshift = [0.1, 0.3]}`."""
    release: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "DESI-DR1"
    """One of SPARCL's data sets, such as SDSS-DR17, BOSS-DR17, DESI-EDR."""
    limit: Count = 100_000
    """Most spectra that are taken; constraints that find more are refused."""
    batch: Annotated[int, Field(ge=1, le=500)] = 50
    """Spectra in one request and one table."""
    url: Address = "https://astrosparcl.datalab.noirlab.edu"
    """Root of the service."""
    check: bool = False
    """Read again the tables that are there, and replace those that are no longer what was fetched."""
    transfer: Transfer = Transfer(per_second=2.0)

    @model_validator(mode="after")
    def _one_choice(self) -> "FetchSparcl":
        if (self.ids is None) == (not self.where):
            raise ValueError("give either ids (a table) or where (constraints)")
        return self


Fetch = Annotated[FetchSdss | FetchDesi | FetchSparcl, Field(discriminator="kind")]
