"""The tree of DESI's public releases: coadds and redshifts by healpix, or by tile.

Every folder holds a list of checksums that is named by the folder's own path, such as
`redux_iron_healpix_main_dark_100_10000.sha256sum`.

References:
    https://data.desi.lbl.gov/doc/organization
    https://github.com/desihub/desida (desi_checksum_specprod.sh names the lists of checksums)
"""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Final

import numpy as np

from distspec.config import FetchDesi
from distspec.errors import ConfigError
from distspec.sources.archives.download import Remote
from distspec.sources.archives.ids import Rows, integers, read_rows
from distspec.sources.archives.manifest import Failure

__all__ = ["list_desi"]

PRODUCTIONS: Final = {"edr": "fuji", "dr1": "iron"}

SURVEYS: Final = frozenset({"cmx", "main", "special", "sv1", "sv2", "sv3"})

PROGRAMS: Final = frozenset({"backup", "bright", "dark", "other"})

PIXELS: Final = 12 * 64**2

HEALPIX: Final = ("survey", "program", "healpix")

TILES: Final = ("tileid", "night", "petal")

TARGETS: Final = ("targetid",)

Group = tuple[str, str, int] | tuple[int, int, int]
"""Survey, program and healpix, or tile, night and petal."""


def list_desi(settings: FetchDesi) -> tuple[list[Remote], list[Failure]]:
    """List the pairs of files that are wanted, each once, and the targets that the catalogue does not hold.

    Raises:
        ConfigError: the list or the catalogue cannot be used, or names what cannot be.
    """
    groups: set[Group] = set()
    targets: set[int] = set()
    for rows in read_rows(settings.ids, [HEALPIX, TILES, TARGETS]):
        if "targetid" in rows:
            targets.update(integers(rows, "targetid", -(1 << 63), (1 << 63) - 1, settings.ids))
        else:
            groups.update(_groups(rows, settings.ids))
    missing: list[Failure] = []
    if targets:
        groups, missing = _find(targets, settings)
    files = [remote for group in sorted(groups, key=str) for remote in _remotes(group, settings.release)]
    return files, missing


def _groups(rows: Rows, place: str) -> Iterator[Group]:
    if "healpix" not in rows:
        tiles = integers(rows, "tileid", 1, 999_999, place)
        nights = integers(rows, "night", 20_190_101, 20_991_231, place)
        yield from zip(tiles, nights, integers(rows, "petal", 0, 9, place), strict=True)
        return
    pixels = integers(rows, "healpix", 0, PIXELS - 1, place)
    words: list[list[str]] = []
    for name, known in (("survey", SURVEYS), ("program", PROGRAMS)):
        found = [str(word).strip().lower() for word in rows[name].tolist()]
        # The words become folders: nothing but DESI's own gets there.
        wrong = sorted(set(found) - known)
        if wrong:
            raise ConfigError(f"{place}: {name} is {wrong[0]!r}; expected one of {', '.join(sorted(known))}")
        words.append(found)
    yield from zip(words[0], words[1], pixels, strict=True)


def _find(targets: set[int], settings: FetchDesi) -> tuple[set[Group], list[Failure]]:
    """Look up the healpix of targets in a catalogue, in pieces."""
    if settings.catalog is None:
        raise ConfigError(
            f"{settings.ids} names targets; say in which healpix they lie: catalog=FILE, such as zall-pix-iron.fits"
        )
    ordered = np.array(sorted(targets), np.int64)
    found = np.zeros(len(ordered), bool)
    groups: set[Group] = set()
    for rows in read_rows(settings.catalog, [("targetid", *HEALPIX)], ("zcat_primary",)):
        ids = np.array(integers(rows, "targetid", -(1 << 63), (1 << 63) - 1, settings.catalog), np.int64)
        place = np.minimum(np.searchsorted(ordered, ids), len(ordered) - 1)
        wanted = ordered[place] == ids
        if settings.primary and "zcat_primary" in rows:
            wanted &= np.isin(rows["zcat_primary"].astype(str), ["T", "True", "true", "1"])
        found[place[wanted]] = True
        groups.update(_groups({name: rows[name][wanted] for name in HEALPIX}, settings.catalog))
    missing = [Failure(f"targetid {target}", "not in the catalogue") for target in ordered[~found].tolist()]
    return groups, missing


def _remotes(group: Group, release: str) -> Iterator[Remote]:
    root = f"{release}/spectro"
    first, second, third = group
    if isinstance(first, str):
        inner = f"healpix/{first}/{second}/{third // 100}/{third}"
        names = [f"{kind}-{first}-{second}-{third}.fits" for kind in ("redrock", "coadd")]
    else:
        inner = f"tiles/cumulative/{first}/{second}"
        names = [f"{kind}-{third}-{first}-thru{second}.fits" for kind in ("redrock", "coadd")]
    folder = PurePosixPath("redux", PRODUCTIONS[release], inner)
    listing = f"{root}/{folder}/{'_'.join(folder.parts)}.sha256sum"
    # The redshifts first: a reader that finds a coadd then finds them too.
    for name in names:
        yield Remote((f"{root}/{folder}/{name}",), listing)
