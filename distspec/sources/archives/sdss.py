"""The tree of SDSS's Science Archive Server, and SkyServer's SQL.

Below a release lie up to three trees: `sdss` (the original survey, by reductions 26, 103 and 104), `boss` (to DR12) and
`eboss` (from DR13). A spectrum is a `spec` file, lite or full; a plate is an `spPlate` file with an `spZbest` file.

References:
    https://data.sdss.org/datamodel/files/BOSS_SPECTRO_REDUX/RUN2D/spectra/PLATE4/spec.html
    https://www.sdss4.org/dr17/spectro/spectro_access
"""

import re
from collections.abc import Iterable, Iterator
from typing import Final

from distspec.config import FetchSdss
from distspec.errors import ConfigError, SourceError
from distspec.sources.archives.download import Remote
from distspec.sources.archives.ids import Rows, integers, read_rows, rows_of_csv
from distspec.sources.archives.transfer import Client, RefusedError

__all__ = ["list_sdss", "spec_paths"]

COLUMNS: Final = ("plate", "mjd", "fiberid")

PLATE_COLUMNS: Final = ("plate", "mjd")

RUN2D: Final = re.compile(r"26|103|104|v\d+_\d+_\d+")

LEGACY: Final = ("26", "104", "103")
"""Reductions of the original survey: main survey, SEGUE-2, star clusters."""

FIRST_BOSS_PLATE: Final = 3510

BOSS: Final = {
    "dr8": (),
    "dr9": ("v5_4_45",),
    "dr10": ("v5_5_12",),
    "dr11": ("v5_6_5",),
    "dr12": ("v5_7_0", "v5_7_2"),
    "dr13": ("v5_9_0",),
    "dr14": ("v5_10_0",),
    "dr15": ("v5_10_0",),
    "dr16": ("v5_13_0",),
    "dr17": ("v5_13_2",),
}
"""Reductions of BOSS and eBOSS in each release."""

ANSWER_LIMIT: Final = 256 << 20

Spectrum = tuple[int, int, int, str]
"""Plate, MJD, fiber (0 for a whole plate) and reduction (empty where unknown)."""


def list_sdss(settings: FetchSdss, client: Client) -> list[Remote]:
    """List the files that are wanted, each once, in the order of plates.

    Raises:
        ConfigError: the list or the query cannot be used, or names what cannot be.
        SourceError: SkyServer does not answer.
    """
    columns = PLATE_COLUMNS if settings.plates else COLUMNS
    if settings.ids is not None:
        place = settings.ids
        pieces = read_rows(settings.ids, [columns], ("run2d",))
    else:
        place = "the query's result"
        pieces = _query(settings, client, columns, place)
    wanted = {spectrum for rows in pieces for spectrum in _spectra(rows, settings, place)}
    files: Iterable[Remote] = (remote for one in sorted(wanted) for remote in _remotes(one, settings))
    return list(files)


def _spectra(rows: Rows, settings: FetchSdss, place: str) -> Iterator[Spectrum]:
    plates = integers(rows, "plate", 1, 99_999, place)
    dates = integers(rows, "mjd", 10_000, 99_999, place)
    fibers = [0] * len(plates) if settings.plates else integers(rows, "fiberid", 1, 9_999, place)
    named = [str(name) for name in rows["run2d"].tolist()] if "run2d" in rows else [""] * len(plates)
    for plate, mjd, fiber, name in zip(plates, dates, fibers, named, strict=True):
        run2d = name or settings.run2d or ""
        if run2d and not RUN2D.fullmatch(run2d):
            raise ConfigError(f"{place}: run2d is {run2d!r}; expected 26, 103, 104 or such as v5_13_2")
        yield plate, mjd, fiber, run2d


def _remotes(spectrum: Spectrum, settings: FetchSdss) -> Iterator[Remote]:
    plate, mjd, fiber, run2d = spectrum
    if fiber:
        yield Remote(tuple(spec_paths(settings.release, plate, mjd, fiber, run2d, settings.spectra)))
        return
    folders = [
        (f"{tree}/{run}/{plate:04d}", "" if run in LEGACY else f"{run}/")
        for tree, run in _trees(settings.release, plate, run2d)
    ]
    yield Remote(tuple(f"{folder}/spPlate-{plate:04d}-{mjd:05d}.fits" for folder, _ in folders))
    yield Remote(tuple(f"{folder}/{run1d}spZbest-{plate:04d}-{mjd:05d}.fits" for folder, run1d in folders))


def spec_paths(release: str, plate: int, mjd: int, fiber: int, run2d: str = "", spectra: str = "lite") -> list[str]:
    """Give the paths below the archive's root at which a spectrum can be, the likeliest first.

    Example:
        >>> spec_paths("dr17", 266, 51602, 1, "26")
        ['dr17/sdss/spectro/redux/26/spectra/lite/0266/spec-0266-51602-0001.fits']
    """
    name = f"{plate:04d}/spec-{plate:04d}-{mjd:05d}-{fiber:04d}.fits"
    paths = []
    for tree, run in _trees(release, plate, run2d):
        folders = ["lite/"] if spectra == "lite" else [""]
        if spectra == "full" and run not in LEGACY and int(release[2:]) > 15:
            # Until DR15, and for the original survey to this day, the full files have no folder of their own.
            folders = ["full/", ""]
        paths += [f"{tree}/{run}/spectra/{folder}{name}" for folder in folders]
    return paths


def _trees(release: str, plate: int, run2d: str) -> list[tuple[str, str]]:
    """Give the trees that can hold a plate, with the reduction in each."""
    boss = BOSS[release] if plate >= FIRST_BOSS_PLATE else ()
    runs = (run2d,) if run2d else boss or LEGACY
    found = []
    for run in runs:
        if run in LEGACY:
            surveys: tuple[str, ...] = ("sdss",)
        elif int(release[2:]) < 13:
            surveys = ("boss",)
        else:
            # The last reductions of BOSS are linked below `sdss` in later releases.
            surveys = ("sdss", "eboss") if run.startswith("v5_7_") else ("eboss", "sdss")
        found += [(f"{release}/{survey}/spectro/redux", run) for survey in surveys]
    return found


def _query(settings: FetchSdss, client: Client, columns: tuple[str, ...], place: str) -> Iterator[Rows]:
    """Ask SkyServer; an answer that it has cut off is refused, since nothing says which rows are missing."""
    assert settings.query is not None
    number = int(settings.release[2:])
    page = "x_sql.asp" if number < 10 else "x_sql.aspx" if number == 10 else "x_results.aspx"
    # SkyServer takes one line without comments.
    command = " ".join(line.partition("--")[0] for line in settings.query.splitlines())
    parameters = {"cmd": command, "format": "csv"} | ({"searchtool": "SQL"} if number > 11 else {})
    try:
        url = f"{settings.skyserver.rstrip('/')}/dr{number}/en/tools/search/{page}"
        text = client.read("GET", url, ANSWER_LIMIT, params=parameters).decode("utf-8", "replace")
    except RefusedError as error:
        raise SourceError(f"SkyServer does not answer the query: {error}; mend the SQL, or give ids") from error
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    header = {name.strip().lower() for name in lines[0].split(",")} if lines else set()
    if not set(columns) <= header:
        said = " ".join(re.sub(r"<[^>]*>", " ", text).split())[:200]
        raise ConfigError(f"SkyServer answers {said!r}; expected the columns {', '.join(columns)}")
    if len(lines) == 1:
        raise ConfigError("the query finds nothing; expected at least one spectrum")
    if len(lines) - 1 >= settings.rows_max:
        raise ConfigError(
            f"the query gives {len(lines) - 1} rows, where SkyServer cuts an answer off; split it, for example by plate"
        )
    yield from rows_of_csv(lines, place, [columns], ("run2d",))
