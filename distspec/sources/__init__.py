"""Survey files, archives and simulations -> batches of observed-frame spectra with their catalogue columns.

One small file per survey. A source neither rebins nor cuts: it joins, masks by the survey's own bits, and says what the
catalogue says. `prepare` does the rest. Wavelengths are vacuum; a file that says otherwise is refused.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from distspec.config import Desi, Sdss, Simulate
from distspec.spectra import Columns, Spectra, WaveGrid

__all__ = ["Piece", "Source", "open_source"]


@dataclass(frozen=True)
class Piece:
    """A run of spectra that one reader takes at once: spectra `start` to `stop` of the file (or block) `name`."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@runtime_checkable
class Source(Protocol):
    """Where spectra come from. Small and picklable: workers get a copy and read for themselves."""

    @property
    def grid(self) -> WaveGrid:
        """Observed-frame grid that all spectra of this source are delivered on."""
        ...

    def pieces(self) -> list[Piece]:
        """List what there is, in a fixed order, without reading flux.

        A file that cannot even be counted is one piece of length 1, whose `read` raises.

        Raises:
            SourceError: the path does not exist or holds nothing of this survey.
        """
        ...

    def read(self, piece: Piece) -> tuple[Spectra, Columns]:
        """Read one piece, in the observed frame; `Spectra.rows` counts from `piece.start`.

        Columns that every source gives: `id` (int64 or str, exact), `ra`, `dec` (deg, float64), `z` (float64, NaN
        where unknown), `zwarn` (int64), `class`, `subclass` (str, SDSS's names), `ebv` (float32, NaN where
        unknown), `status` (int32, bits of `Status`).

        Raises:
            SourceError: the file is damaged or is not what it should be.
        """
        ...


def open_source(settings: Simulate | Sdss | Desi, seed: int) -> Source:
    """Build the source that the settings describe; `seed` is used by simulations only."""
    # Imported here so that reading one survey does not import the others' libraries.
    match settings:
        case Simulate():
            from distspec.sources.simulate import SimulatedSurvey

            return SimulatedSurvey(settings, seed)
        case Sdss():
            from distspec.sources.sdss import SdssSpectra

            return SdssSpectra(settings)
        case Desi():
            from distspec.sources.desi import DesiCoadds

            return DesiCoadds(settings)
