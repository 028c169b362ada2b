"""Survey files, archives and simulations -> batches of observed-frame spectra with their catalogue columns.

One small file per survey. A source neither rebins nor cuts: it joins, masks by the survey's own bits, and says what the
catalogue says. `prepare` does the rest. Wavelengths are vacuum; a file that says otherwise is refused. By
`ingest.source.kind`:

=========  ==========================================================================================================
sdss       `spec` files, lite or full; `spPlate` with `spZbest`; selected by a `specObj` or `spAll` catalogue
desi       `coadd` or `spectra` files with `redrock`, by healpix or tile; by target class (LRG) or catalogue
lamost     low-resolution spectra in the layouts of DR1, DR8 and DR10
table      Parquet with a spectrum a row: flat, HATS or Multimodal Universe
specutils  whatever `specutils` reads, brought to one grid
simulate   a simulated survey with planted anomalies
=========  ==========================================================================================================

- `sdss/`: SDSS, BOSS and eBOSS.
- `desi/`: DESI.
- `lamost`: LAMOST.
- `table`: Parquet tables.
- `specutils/`: what `specutils` reads, or holds in memory.
- `simulation/`: the simulated survey.
- `catalogs/`: selection from catalogues larger than memory.
- `files/`: where files lie, and careful reading of FITS, Parquet and other tables.
- `archives/`: the public archives from which files are fetched.
- `conventions`: what the files of all surveys have in common: which units are meant.
- `uniform`: the grid of spectra that come with their wavelengths.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from distspec.addresses import Place
from distspec.config import Desi, Lamost, Sdss, Simulate, Specutils, Table
from distspec.sources.files.places import Entry
from distspec.spectra import Columns, Spectra, WaveGrid

__all__ = ["Entry", "Piece", "Source", "build"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of spectra that one reader takes at once: `start` to `stop` of the wanted spectra of the file `name`.

    A file that could not be counted when it was listed is one piece of length 1 with `counted` False. It is not read:
    more may have come to light in it since than there are rows.
    """

    name: str
    start: int
    stop: int
    counted: bool = True

    def __len__(self) -> int:
        return self.stop - self.start


@runtime_checkable
class Source(Protocol):
    """Where spectra come from. Small and picklable: workers get a copy and read for themselves."""

    @property
    def grid(self) -> WaveGrid:
        """Observed-frame grid that all spectra of this source are delivered on."""
        ...

    def files(self) -> list[Entry]:
        """List what there is (files, or blocks of a simulation) in a fixed order, opening as few as possible.

        Raises:
            SourceError: the path does not exist or holds nothing of this survey, or its catalogue cannot be used.
        """
        ...

    def count(self, name: str) -> int:
        """Count the wanted spectra of one file whose `Entry.count` is None, reading no flux.

        Raises:
            SourceError: the file is damaged or is not what it should be.
        """
        ...

    def missing(self) -> list[str]:
        """Name what the catalogue wants and no file holds, as far as that is known without opening files."""
        ...

    def identify(self, piece: Piece) -> Columns:
        """Give what is known of spectra whose flux cannot be read: columns as of `read`, or none; never an error."""
        ...

    def read(self, piece: Piece) -> tuple[Spectra, Columns]:
        """Read one piece, in the observed frame; `Spectra.rows` counts from `piece.start`.

        Columns that every source gives: `id` (int64 or str, exact), `ra`, `dec` (deg, float64), `z` (float64, NaN
        where unknown), `zwarn` (int64), `class`, `subclass` (str, SDSS's names), `ebv` (float32, NaN where
        unknown), `status` (int32, bits of `Status`). Every file of a source gives the same columns.

        Raises:
            SourceError: the file is damaged or is not what it should be.
        """
        ...


def build(settings: Simulate | Sdss | Desi | Lamost | Table | Specutils, seed: int, scratch: Place) -> Source:
    """Make the source that the settings describe.

    Arguments:
        settings: one of the kinds of source.
        seed: used by simulations only.
        scratch: folder, seen by all workers, in which a source may keep what it distils from large catalogues.
    """
    # Imported here so that reading one survey does not import the others' libraries.
    match settings:
        case Simulate():
            from distspec.sources.simulation.survey import SimulatedSurvey

            return SimulatedSurvey(settings, seed)
        case Sdss():
            from distspec.sources.sdss.spec import open_sdss

            return open_sdss(settings, scratch)
        case Desi():
            from distspec.sources.desi.coadds import DesiCoadds

            return DesiCoadds(settings, scratch)
        case Lamost():
            from distspec.sources.lamost import LamostSpectra

            return LamostSpectra(settings, scratch)
        case Table():
            from distspec.sources.table import SpectrumTable

            return SpectrumTable(settings)
        case Specutils():
            from distspec.sources.specutils.files import SpecutilsFiles

            return SpecutilsFiles(settings)
