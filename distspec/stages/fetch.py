"""`distspec fetch`: a list of ids or a query -> survey files in a folder, each whole and verified.

What is wanted stands in a table (CSV, ECSV, FITS, Parquet), named by `ids`, or in a question to the archive:

    distspec fetch sdss to=spectra ids=list.csv
    distspec fetch sdss to=spectra query='select plate, mjd, fiberid, run2d
                                          from SpecObj where z > 0.3'
    distspec fetch desi to=spectra ids=targets.fits catalog=zall-pix-iron.fits
    distspec fetch sparcl to=tables where.redshift='[0.1, 0.3]'

Columns of the table, by archive:

    sdss    plate, mjd, fiberid and, if known, run2d
    desi    survey, program, healpix; or tileid, night, petal; or targetid
            with catalog=, which says in which healpix a target lies
    sparcl  sparcl_id, specid or targetid

Settings that one would change first: `release` (dr17 of SDSS, dr1 of DESI, DESI-DR1 of SPARCL), `spectra=full` (SDSS
files with their single exposures), `plates=true` (whole SDSS plates), `limit` (most spectra that constraints of
SPARCL may find), `transfer.connections` and `transfer.per_second`.

Files come over few connections at a bounded rate, are resumed where they broke off, are verified by the archive's
checksums (by length and structure where it publishes none), and appear only when they are whole. `fetch.csv` in the
folder lists them, `failed.csv` says what did not come and why. The last line that is printed says which settings of
`distspec ingest` read the folder.

The same command goes on after an interruption and asks for nothing twice; `check=true` reads again what is there and
replaces what is no longer what was fetched. Exit status: 0 all there, 3 some failed, 2 refused.

In the code: each archive lists its work (`sources/archives/sdss.py`, `desi.py`, `sparcl.py`), this file spreads it
over threads, `download.py` there brings one file and `manifest.py` remembers what came. A folder serves one run at a
time.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distspec.config import FetchDesi, FetchSdss, FetchSparcl
from distspec.errors import ConfigError
from distspec.runtime.progress import progress
from distspec.sources.archives.desi import list_desi
from distspec.sources.archives.download import Checksums, Downloads, Outcome
from distspec.sources.archives.manifest import Failure, Manifest
from distspec.sources.archives.sdss import list_sdss
from distspec.sources.archives.transfer import Client

__all__ = ["Fetched", "fetch"]

Work = Callable[[Any], Outcome]


@dataclass(frozen=True)
class Fetched:
    """What a run left in its folder.

    Arguments:
        folder: where the files lie.
        unit: what is counted: files or spectra.
        fetched: came in this run.
        there: were there before.
        failed: did not come; `failed.csv` in the folder says why.
        source: the kind of `ingest.source` that reads the folder.
    """

    folder: Path
    unit: str
    fetched: int
    there: int
    failed: tuple[Failure, ...]
    source: str


def fetch(settings: FetchSdss | FetchDesi | FetchSparcl) -> Fetched:
    """Bring what is wanted into a folder, or finish doing so.

    Raises:
        ConfigError: the list or the query cannot be used, or another run uses the folder.
        SourceError: the catalogue service does not answer, or the folder cannot be written.
    """
    folder = Path(settings.to)
    tables = settings.kind == "sparcl"
    with _locked(folder):
        manifest = Manifest(folder)
        client = Client(settings.transfer)
        work, items, known = _plan(settings, folder, manifest, client)
        outcome = known
        try:
            with closing(_spread(work, items, client, settings.transfer.connections)) as outcomes:
                for result in progress(outcomes, len(items), "fetch", "table" if tables else "file"):
                    outcome += result
        finally:
            manifest.failed(outcome.failed)
    return Fetched(
        folder,
        "spectra" if tables else "files",
        outcome.fetched,
        outcome.there,
        tuple(sorted(outcome.failed, key=lambda failure: failure.name)),
        "table" if tables else settings.kind,
    )


def _plan(
    settings: FetchSdss | FetchDesi | FetchSparcl, folder: Path, manifest: Manifest, client: Client
) -> tuple[Work, list[Any], Outcome]:
    """Give the work, the items that it is to be done for, and what is known without it."""
    match settings:
        case FetchSparcl():
            # Imported here: the other archives need no Parquet.
            from distspec.sources.archives.sparcl import Batches, list_sparcl

            batches = Batches(client, settings.url.rstrip("/"), settings.release, folder, manifest, settings.check)
            return batches, *list_sparcl(settings, batches)
        case FetchDesi():
            files, missing = list_desi(settings)
            known, given = Outcome(failed=tuple(missing)), None
        case FetchSdss():
            files, known, given = list_sdss(settings, client), Outcome(), settings.checksums
    base = settings.url.rstrip("/")
    return Downloads(client, base, folder, manifest, Checksums(client, base, given), settings.check), files, known


def _spread(work: Work, items: Iterable[Any], client: Client, connections: int) -> Generator[Outcome, None, None]:
    """Do the work in threads, a few items ahead of what is done; the first fatal error ends it."""
    ahead = iter(items)
    pool = ThreadPoolExecutor(connections, thread_name_prefix="fetch")
    try:
        running: set[Future[Outcome]] = {pool.submit(work, item) for item in islice(ahead, 2 * connections)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
            running |= {pool.submit(work, item) for item in islice(ahead, len(done))}
    finally:
        # An interrupt must neither wait for slow answers nor leave threads that still write.
        if running:
            client.stop()
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep a second run off it.

    Raises:
        ConfigError: it cannot be written or another run uses it.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ConfigError(f"another run is at work in {folder}; wait for it or choose another folder") from None
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    try:
        yield
    finally:
        lock.release()
