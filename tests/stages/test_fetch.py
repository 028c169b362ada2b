"""`distspec fetch` against a real server on this machine, in good order and misbehaving."""

import csv
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import Table
from filelock import FileLock

from distspec import sources
from distspec.config import Sdss, Transfer, load_fetch
from distspec.config import Table as TableSource
from distspec.errors import ConfigError, SourceError
from distspec.sources.archives.desi import list_desi
from distspec.sources.archives.sdss import list_sdss, spec_paths
from distspec.sources.archives.transfer import Client
from distspec.stages.fetch import Fetched, fetch
from tests.support.archive_server import HTML, ArchiveServer, Fault, SparclService
from tests.support.processes import PATIENCE, started
from tests.test_cli import call

QUICK = ("transfer.per_second=500", "transfer.backoff=0.01", "transfer.stall_timeout=0.5", "transfer.attempts=4")
SPECTRA = [(266, 51602, fiber, "26") for fiber in range(1, 7)]
PIXEL = "dr1/spectro/redux/iron/healpix/main/dark/100/10016"
PAIR = (f"{PIXEL}/redrock-main-dark-10016.fits", f"{PIXEL}/coadd-main-dark-10016.fits")
LISTING = f"{PIXEL}/redux_iron_healpix_main_dark_100_10016.sha256sum"


def image(seed: int, pixels: int = 20_000) -> bytes:
    """Make a FITS file, about four bytes a pixel."""
    data = np.random.default_rng(seed).normal(size=pixels).astype(">f4")
    return fits.PrimaryHDU(data).header.tostring().encode() + pad(data.tobytes())


def pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 2880)


def paths_of(spectra: list[tuple[int, int, int, str]], release: str = "dr17") -> list[str]:
    return [spec_paths(release, *spectrum)[0] for spectrum in spectra]


@pytest.fixture
def server() -> Iterator[ArchiveServer]:
    with ArchiveServer().running() as running:
        yield running


@pytest.fixture
def sdss(server: ArchiveServer) -> ArchiveServer:
    server.files = {path: image(seed) for seed, path in enumerate(paths_of(SPECTRA))}
    return server


@pytest.fixture
def desi(server: ArchiveServer) -> ArchiveServer:
    server.files = {path: image(seed) for seed, path in enumerate(PAIR)}
    sums = [f"{hashlib.sha256(server.files[path]).hexdigest()}  {Path(path).name}\n" for path in PAIR]
    server.files[LISTING] = "".join(sums).encode()
    return server


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.csv"
    lines = ["plate,mjd,fiberID,run2d"] + [",".join(map(str, spectrum)) for spectrum in SPECTRA]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    path = tmp_path / "pixels.csv"
    path.write_text("SURVEY,PROGRAM,HEALPIX\nmain,dark,10016\nmain,dark,10016\n")
    return path


def go(kind: str, server: ArchiveServer, tmp_path: Path, *words: str) -> Fetched:
    return fetch(load_fetch(kind, [f"to={tmp_path / 'got'}", f"url={server.url}", *QUICK, *words]))


def counts(made: Fetched) -> tuple[int, int, int]:
    return made.fetched, made.there, len(made.failed)


def same(made: Fetched, server: ArchiveServer, paths: list[str] | tuple[str, ...]) -> None:
    """Require that files have come whole and that nothing else is left beside them."""
    for path in paths:
        assert (made.folder / path).read_bytes() == server.files[path]
    assert {str(p.relative_to(made.folder)) for p in made.folder.rglob("*.fits")} == set(paths)
    assert not list(made.folder.rglob(".*.partial*"))


def manifest(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "fetch.csv").open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_files_come_whole_and_are_not_asked_for_again(sdss: ArchiveServer, ids: Path, tmp_path: Path) -> None:
    made = go("sdss", sdss, tmp_path, f"ids={ids}")
    assert counts(made) == (6, 0, 0)
    same(made, sdss, paths_of(SPECTRA))
    rows = manifest(made.folder)
    for path in paths_of(SPECTRA):
        assert rows[path]["sha256"] == hashlib.sha256(sdss.files[path]).hexdigest()
        assert rows[path]["url"] == f"{sdss.url}/{path}"
        assert rows[path]["checksum"] == "none"
        assert rows[path]["time"].endswith("+00:00")
    assert all(one.headers["User-Agent"].startswith("distspec/") for one in sdss.asked)
    sdss.behave()
    assert counts(go("sdss", sdss, tmp_path, f"ids={ids}")) == (0, 6, 0)
    assert sdss.asked == []


def test_fetched_files_are_read_by_the_source_of_their_survey(
    server: ArchiveServer, tmp_path: Path, real_data: Path
) -> None:
    found = sorted((real_data / "sdss").glob("spec-0266-51602-*.fits"))
    spectra = [(266, 51602, int(path.stem[-4:]), "26") for path in found]
    server.files = dict(zip(paths_of(spectra), (path.read_bytes() for path in found), strict=True))
    ids = tmp_path / "ids.parquet"
    columns = zip(("plate", "mjd", "fiberid", "run2d"), zip(*spectra, strict=True), strict=True)
    pq.write_table(pa.table({name: list(values) for name, values in columns}), ids)
    made = go("sdss", server, tmp_path, f"ids={ids}")
    same(made, server, paths_of(spectra))
    source = sources.build(Sdss(path=str(made.folder)), 0, tmp_path)
    assert len(source.files()) == len(found) == 3


def test_an_archive_is_asked_with_few_connections_and_at_a_bounded_rate(
    sdss: ArchiveServer, ids: Path, tmp_path: Path
) -> None:
    for path in paths_of(SPECTRA):
        sdss.misbehave(path, forever=Fault(pieces=40_000, delay=0.05))
    go("sdss", sdss, tmp_path, f"ids={ids}", "transfer.connections=3", "transfer.per_second=50")
    assert 2 <= sdss.peak <= 3
    times = [one.time for one in sdss.asked]
    assert times[-1] - times[0] >= (len(times) - 1) / 50 * 0.9


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ([Fault(503), Fault(503)], 3),
        ([Fault(429, {"Retry-After": "0"})], 2),
        ([Fault(500), Fault(502), Fault(504)], 4),
        ([Fault(send=30_000)], 2),
        ([Fault(send=30_000, then="reset")], 2),
        ([Fault(send=0, then="reset")], 2),
        ([Fault(send=30_000, then="stall")], 2),
        ([Fault(pieces=20_000, delay=0.02)], 1),
        ([Fault(length=False)], 1),
        ([Fault(send=30_000), Fault(ranges=False)], 2),
        ([Fault(send=30_000, validators=False), Fault(validators=False)], 2),
        ([Fault(send=0, corrupt=True)], 2),
    ],
    ids=lambda value: str(len(value)) if isinstance(value, list) else None,
)
def test_a_passing_fault_costs_no_file(
    faults: list[Fault], requests: int, sdss: ArchiveServer, ids: Path, tmp_path: Path
) -> None:
    path = paths_of(SPECTRA)[2]
    sdss.misbehave(path, *faults)
    made = go("sdss", sdss, tmp_path, f"ids={ids}")
    assert counts(made) == (6, 0, 0)
    same(made, sdss, paths_of(SPECTRA))
    assert sdss.paths().count(path) == requests


def test_a_file_that_breaks_off_is_resumed_and_not_begun_anew(sdss: ArchiveServer, ids: Path, tmp_path: Path) -> None:
    path = paths_of(SPECTRA)[0]
    sdss.misbehave(path, Fault(send=50_000), Fault(send=20_000))
    go("sdss", sdss, tmp_path, f"ids={ids}")
    ranges = [one.headers.get("Range") for one in sdss.asked if one.path == path]
    assert ranges == [None, "bytes=50000-", "bytes=70000-"]
    assert all("If-Range" in one.headers for one in sdss.asked if one.headers.get("Range"))


@pytest.mark.parametrize("honest", [True, False])
def test_a_file_that_changes_between_its_parts_is_begun_anew(
    honest: bool, sdss: ArchiveServer, ids: Path, tmp_path: Path
) -> None:
    path = paths_of(SPECTRA)[0]
    new = image(99)

    sdss.misbehave(path, Fault(send=40_000), Fault(honest=honest))
    original = sdss.next_fault

    def next_fault(asked: str) -> Fault:
        fault = original(asked)
        if asked == path and fault.send is None:
            sdss.files[path] = new
        return fault

    sdss.next_fault = next_fault  # type: ignore[method-assign]
    made = go("sdss", sdss, tmp_path, f"ids={ids}")
    assert counts(made) == (6, 0, 0)
    assert (made.folder / path).read_bytes() == new


@pytest.mark.parametrize(
    ("fault", "says", "most"),
    [
        (Fault(404), "404", 1),
        (Fault(403, {}, b"<h1>members only</h1>"), "members only", 1),
        (Fault(500), "4 attempts", 4),
        (HTML, "web page", 1),
        (Fault(headers={"Content-Type": "text/html"}), "web page", 1),
        (Fault(send=0, then="reset"), "attempts", 4),
        (Fault(302, {"Location": "ftp://127.0.0.1/file.fits"}), "neither http nor https", 1),
        (Fault(302, {"Location": "file:///etc/hostname"}), "neither http nor https", 1),
        (Fault(headers={"Content-Encoding": "gzip"}), "compressed", 1),
    ],
)
def test_what_cannot_be_had_is_written_down_and_the_rest_comes(
    fault: Fault, says: str, most: int, sdss: ArchiveServer, ids: Path, tmp_path: Path
) -> None:
    path = paths_of(SPECTRA)[1]
    sdss.misbehave(path, forever=fault)
    made = go("sdss", sdss, tmp_path, f"ids={ids}")
    assert counts(made) == (5, 0, 1)
    assert made.failed[0].name == path
    assert says in made.failed[0].reason
    assert (made.folder / "failed.csv").read_text().splitlines()[1].startswith(f"{path},")
    assert not (made.folder / path).exists()
    assert sdss.paths().count(path) <= most
    sdss.behave()
    assert counts(go("sdss", sdss, tmp_path, f"ids={ids}")) == (1, 5, 0)
    assert not (made.folder / "failed.csv").exists()
    assert set(sdss.paths()) == {path}


def test_a_page_in_place_of_a_file_is_told_by_its_content_too(sdss: ArchiveServer, ids: Path, tmp_path: Path) -> None:
    path = paths_of(SPECTRA)[1]
    sdss.files[path] = b"\n<html><body>Your session has expired</body></html>"
    assert "web page" in go("sdss", sdss, tmp_path, f"ids={ids}").failed[0].reason
    sdss.files[path] = image(1)[:40_000]
    assert "truncated" in go("sdss", sdss, tmp_path, f"ids={ids}").failed[0].reason


def test_retry_after_holds_all_connections_back(sdss: ArchiveServer, ids: Path, tmp_path: Path) -> None:
    sdss.misbehave(paths_of(SPECTRA)[0], Fault(429, {"Retry-After": "1"}))
    made = go("sdss", sdss, tmp_path, f"ids={ids}", "transfer.connections=1")
    assert counts(made) == (6, 0, 0)
    assert sdss.asked[1].time - sdss.asked[0].time >= 0.95


def test_an_archive_that_wants_to_be_left_alone_is(sdss: ArchiveServer, ids: Path, tmp_path: Path) -> None:
    sdss.misbehave(paths_of(SPECTRA)[0], forever=Fault(503, {"Retry-After": "7200"}))
    made = go("sdss", sdss, tmp_path, f"ids={ids}", "transfer.connections=1")
    assert counts(made) == (0, 0, 6)
    assert len(sdss.asked) == 1
    assert "asks to wait 7200 s" in made.failed[-1].reason


def test_an_archive_that_is_down_is_not_stormed(sdss: ArchiveServer, tmp_path: Path) -> None:
    ids = tmp_path / "many.csv"
    ids.write_text("plate,mjd,fiberid,run2d\n" + "".join(f"266,51602,{fiber},26\n" for fiber in range(1, 301)))
    for fiber in range(1, 301):
        sdss.misbehave(paths_of([(266, 51602, fiber, "26")])[0], forever=Fault(500, {}, b"<p>database is down</p>"))
    made = go("sdss", sdss, tmp_path, f"ids={ids}", "transfer.give_up=3", "transfer.attempts=2")
    assert counts(made) == (0, 0, 300)
    assert len(sdss.asked) < 20
    assert any("not tried: 3 in a row failed" in one.reason and "database is down" in one.reason for one in made.failed)


def test_checksums_are_asked_for_once_and_verified(desi: ArchiveServer, pixels: Path, tmp_path: Path) -> None:
    made = go("desi", desi, tmp_path, f"ids={pixels}")
    assert counts(made) == (2, 0, 0)
    same(made, desi, PAIR)
    assert desi.paths().count(LISTING) == 1
    assert {row["checksum"] for row in manifest(made.folder).values()} == {"sha256"}


def test_a_file_that_disagrees_with_its_checksum_is_never_put_in_place(
    desi: ArchiveServer, pixels: Path, tmp_path: Path
) -> None:
    desi.misbehave(PAIR[1], forever=Fault(corrupt=True))
    made = go("desi", desi, tmp_path, f"ids={pixels}")
    assert counts(made) == (1, 0, 1)
    assert "sha256" in made.failed[0].reason
    # Once more in case the line was to blame, and no more than that.
    assert desi.paths().count(PAIR[1]) == 2
    same(made, desi, PAIR[:1])
    desi.behave()
    desi.misbehave(PAIR[1], Fault(corrupt=True))
    assert counts(go("desi", desi, tmp_path, f"ids={pixels}")) == (1, 1, 0)


@pytest.mark.parametrize(("fault", "says"), [(Fault(500), "list of checksums"), (HTML, "expected a list of checksums")])
def test_without_the_list_of_checksums_nothing_is_taken_on_trust(
    fault: Fault, says: str, desi: ArchiveServer, pixels: Path, tmp_path: Path
) -> None:
    desi.misbehave(LISTING, forever=fault)
    made = go("desi", desi, tmp_path, f"ids={pixels}")
    assert counts(made) == (0, 0, 2)
    assert says in made.failed[0].reason
    desi.behave()
    del desi.files[LISTING]
    made = go("desi", desi, tmp_path, f"ids={pixels}")
    assert counts(made) == (2, 0, 0)
    assert {row["checksum"] for row in manifest(made.folder).values()} == {"none"}


def test_a_list_of_checksums_of_ones_own_serves_where_there_is_none(
    sdss: ArchiveServer, ids: Path, tmp_path: Path
) -> None:
    listing = tmp_path / "spec.sha1sum"
    sums = {path: hashlib.sha1(content).hexdigest() for path, content in sdss.files.items()}
    sums[paths_of(SPECTRA)[3]] = "0" * 40
    listing.write_text("".join(f"{digest} *{path}\n" for path, digest in sums.items()))
    made = go("sdss", sdss, tmp_path, f"ids={ids}", f"checksums={listing}")
    assert counts(made) == (5, 0, 1)
    assert "its sha1 is" in made.failed[0].reason
    assert {row["checksum"] for row in manifest(made.folder).values()} == {"sha1"}


def test_files_that_came_in_another_way_are_adopted_or_left_alone(
    desi: ArchiveServer, pixels: Path, tmp_path: Path
) -> None:
    for path, content in ((PAIR[0], desi.files[PAIR[0]]), (PAIR[1], b"my own notes")):
        (tmp_path / "got" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / path).write_bytes(content)
    made = go("desi", desi, tmp_path, f"ids={pixels}")
    assert counts(made) == (0, 1, 1)
    assert "move it away" in made.failed[0].reason
    assert (made.folder / PAIR[1]).read_bytes() == b"my own notes"
    assert set(desi.paths()) == {LISTING}


def test_files_without_checksums_are_adopted_by_their_length(sdss: ArchiveServer, ids: Path, tmp_path: Path) -> None:
    first, second = paths_of(SPECTRA)[:2]
    (tmp_path / "got" / first).parent.mkdir(parents=True)
    (tmp_path / "got" / first).write_bytes(sdss.files[first])
    (tmp_path / "got" / second).write_bytes(sdss.files[second][:-2880])
    made = go("sdss", sdss, tmp_path, f"ids={ids}")
    assert counts(made) == (4, 1, 1)
    assert "the archive's has" in made.failed[0].reason
    assert sdss.paths("HEAD") == [first, second] or sdss.paths("HEAD") == [second, first]


def test_local_damage_is_mended_and_a_changed_archive_is_reported(
    sdss: ArchiveServer, ids: Path, tmp_path: Path
) -> None:
    made = go("sdss", sdss, tmp_path, f"ids={ids}")
    first, second, third = paths_of(SPECTRA)[:3]
    (made.folder / first).write_bytes(b"short")
    content = bytearray(sdss.files[second])
    content[9000] ^= 1
    (made.folder / second).write_bytes(content)
    assert counts(go("sdss", sdss, tmp_path, f"ids={ids}")) == (1, 5, 0)
    assert counts(go("sdss", sdss, tmp_path, f"ids={ids}", "check=true")) == (1, 5, 0)
    same(made, sdss, paths_of(SPECTRA))
    (made.folder / third).unlink()
    sdss.files[third] = image(77)
    again = go("sdss", sdss, tmp_path, f"ids={ids}")
    assert counts(again) == (0, 5, 1)
    assert "another one than on" in again.failed[0].reason
    assert not (made.folder / third).exists()


def test_a_torn_line_of_the_manifest_costs_one_file(sdss: ArchiveServer, ids: Path, tmp_path: Path) -> None:
    made = go("sdss", sdss, tmp_path, f"ids={ids}")
    path = made.folder / "fetch.csv"
    path.write_bytes(path.read_bytes()[:-20])
    sdss.behave()
    assert counts(go("sdss", sdss, tmp_path, f"ids={ids}")) == (0, 6, 0)
    assert len(sdss.asked) == 1  # one HEAD, by which the file is adopted
    assert len(manifest(made.folder)) == 6
    path.write_text("this is,something else\n")
    with pytest.raises(SourceError, match="move it away"):
        go("sdss", sdss, tmp_path, f"ids={ids}")


def test_a_folder_serves_one_run_at_a_time(sdss: ArchiveServer, ids: Path, tmp_path: Path) -> None:
    (tmp_path / "got").mkdir()
    with FileLock(tmp_path / "got" / ".lock"), pytest.raises(ConfigError, match="another run is at work"):
        go("sdss", sdss, tmp_path, f"ids={ids}")
    assert sdss.asked == []


def test_a_link_in_the_folder_leads_no_file_out_of_it(sdss: ArchiveServer, ids: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "got").mkdir()
    (tmp_path / "got" / "dr17").symlink_to(tmp_path / "elsewhere")
    assert counts(go("sdss", sdss, tmp_path, f"ids={ids}")) == (0, 0, 6)
    assert list((tmp_path / "elsewhere").iterdir()) == []


# What lists may say -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("sdss", "plate,mjd,fiberid\n../../x,51602,1\n", "expected a whole number"),
        ("sdss", "plate,mjd,fiberid\n266.0,51602,1\n", "expected a whole number"),
        ("sdss", "plate,mjd,fiberid\n266,51602,\n", "expected a whole number"),
        ("sdss", "plate,mjd,fiberid\n-1,51602,1\n", "expected 1 to 99999"),
        ("sdss", "plate,mjd,fiberid,run2d\n266,51602,1,../../../etc\n", "run2d is"),
        ("sdss", "plate,mjd\n266,51602\n", "expected plate+mjd+fiberid"),
        ("sdss", "plate,mjd,fiberid\n", "no row"),
        ("sdss", "plate,mjd,fiberid\n266,51602\n", "expected 3 values"),
        ("sdss", "", "expected plate+mjd+fiberid"),
        ("desi", "survey,program,healpix\n../main,dark,1\n", "survey is '../main'"),
        ("desi", "survey,program,healpix\nmain,dark/..,1\n", "program is 'dark/..'"),
        ("desi", "survey,program,healpix\nmain,dark,49152\n", "expected 0 to 49151"),
        ("desi", "tileid,night,petal\n80605,20210205,10\n", "petal is 10"),
        ("desi", "targetid\n39627652595714901\n", "catalog=FILE"),
    ],
)
def test_lists_that_make_no_sense_are_refused_before_anything_is_asked(
    kind: str, text: str, says: str, server: ArchiveServer, tmp_path: Path
) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        go(kind, server, tmp_path, f"ids={path}")
    assert says in str(refusal.value)
    assert server.asked == []


@pytest.mark.parametrize("suffix", ["csv", "ecsv", "fits", "parquet"])
def test_every_kind_of_table_names_the_same_files(suffix: str, tmp_path: Path) -> None:
    big = 39627652595714901 + (1 << 61)  # beyond the whole numbers that a float holds
    catalog = Table(
        {
            "TARGETID": np.array([big, big + 1, big + 1, -7]),
            "SURVEY": ["main", "sv3", "main", "main"],
            "PROGRAM": ["dark", "bright", "dark", "dark"],
            "HEALPIX": np.array([10016, 9, 27247, 4], np.int32),
            "ZCAT_PRIMARY": [True, True, False, True],
        }
    )
    wanted = Table({"TARGETID": np.array([big, big + 1, big + 2, -7])})
    paths = [tmp_path / f"{name}.{suffix}" for name in ("catalog", "ids")]
    for table, path in zip((catalog, wanted), paths, strict=True):
        table.write(path, format={"csv": "ascii.csv", "ecsv": "ascii.ecsv"}.get(suffix))
    settings = load_fetch("desi", ["to=x", f"ids={paths[1]}", f"catalog={paths[0]}"])
    files, missing = list_desi(settings)  # type: ignore[arg-type]
    assert [one.paths[0].removeprefix("dr1/spectro/redux/iron/healpix/") for one in files] == [
        "main/dark/100/10016/redrock-main-dark-10016.fits",
        "main/dark/100/10016/coadd-main-dark-10016.fits",
        "main/dark/0/4/redrock-main-dark-4.fits",
        "main/dark/0/4/coadd-main-dark-4.fits",
        "sv3/bright/0/9/redrock-sv3-bright-9.fits",
        "sv3/bright/0/9/coadd-sv3-bright-9.fits",
    ]
    assert [one.name for one in missing] == [f"targetid {big + 2}"]
    every = load_fetch("desi", ["to=x", f"ids={paths[1]}", f"catalog={paths[0]}", "primary=false"])
    assert len(list_desi(every)[0]) == 8  # type: ignore[arg-type]


def test_shifted_numbers_of_fits_tables_are_what_they_mean(tmp_path: Path) -> None:
    path = tmp_path / "specObj.fits"
    columns = [
        fits.Column("PLATE", "I", array=np.array([266, 40_000], np.uint16), bzero=32768),
        fits.Column("MJD", "J", array=np.array([51602, 56000])),
        fits.Column("FIBERID", "J", array=np.array([1, 2])),
        fits.Column("RUN2D", "7A", array=["26", "v5_13_2"]),
    ]
    fits.BinTableHDU.from_columns(columns).writeto(path)
    settings = load_fetch("sdss", ["to=x", f"ids={path}"])
    found = list_sdss(settings, Client(Transfer()))  # type: ignore[arg-type]
    assert [one.paths[0].rpartition("/")[2] for one in found] == [
        "spec-0266-51602-0001.fits",
        "spec-40000-56000-0002.fits",
    ]


def test_tiles_lie_where_desi_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "tiles.csv"
    path.write_text("tileid,night,petal\n80605,20210205,3\n")
    settings = load_fetch("desi", ["to=x", f"ids={path}", "release=edr"])
    files, _ = list_desi(settings)  # type: ignore[arg-type]
    folder = "edr/spectro/redux/fuji/tiles/cumulative/80605/20210205"
    assert [one.paths for one in files] == [
        (f"{folder}/redrock-3-80605-thru20210205.fits",),
        (f"{folder}/coadd-3-80605-thru20210205.fits",),
    ]
    assert {one.checksums for one in files} == {f"{folder}/redux_fuji_tiles_cumulative_80605_20210205.sha256sum"}


@pytest.mark.parametrize(
    ("release", "spectrum", "spectra", "path"),
    [
        # Addresses that public programs and SDSS's own pages use.
        ("dr17", (3586, 55181, 890, "v5_13_2"), "full", "eboss/spectro/redux/v5_13_2/spectra/full/3586"),
        ("dr17", (10235, 58127, 6, "v5_13_2"), "lite", "eboss/spectro/redux/v5_13_2/spectra/lite/10235"),
        ("dr17", (2345, 53757, 2, "26"), "full", "sdss/spectro/redux/26/spectra/2345"),
        ("dr16", (4055, 55359, 1, ""), "lite", "eboss/spectro/redux/v5_13_0/spectra/lite/4055"),
        ("dr14", (7000, 56800, 1, ""), "full", "eboss/spectro/redux/v5_10_0/spectra/7000"),
        ("dr10", (3586, 55181, 16, ""), "full", "boss/spectro/redux/v5_5_12/spectra/3586"),
        ("dr10", (266, 51602, 1, ""), "lite", "sdss/spectro/redux/26/spectra/lite/0266"),
    ],
)
def test_spectra_lie_where_sdss_keeps_them(
    release: str, spectrum: tuple[int, int, int, str], spectra: str, path: str
) -> None:
    plate, mjd, fiber, _ = spectrum
    name = f"spec-{plate:04d}-{mjd}-{fiber:04d}.fits"
    assert spec_paths(release, *spectrum, spectra)[0] == f"{release}/{path}/{name}"


def test_a_spectrum_of_unknown_reduction_is_looked_for(sdss: ArchiveServer, tmp_path: Path) -> None:
    path = spec_paths("dr17", 2800, 54326, 5, "104")[0]
    sdss.files = {path: image(5)}
    ids = tmp_path / "one.csv"
    ids.write_text("plate,mjd,fiberid\n2800,54326,5\n2800,54326,6\n")
    made = go("sdss", sdss, tmp_path, f"ids={ids}", "transfer.connections=1")
    assert counts(made) == (1, 0, 1)
    assert sdss.paths()[:2] == [path.replace("/104/", "/26/"), path]
    assert len(sdss.asked) == 2 + 3


def test_plates_come_with_their_redshifts(server: ArchiveServer, tmp_path: Path) -> None:
    legacy = "dr17/sdss/spectro/redux/26/0266"
    eboss = "dr17/eboss/spectro/redux/v5_13_2/7338"
    paths = [f"{legacy}/spPlate-0266-51602.fits", f"{legacy}/spZbest-0266-51602.fits"]
    paths += [f"{eboss}/spPlate-7338-56660.fits", f"{eboss}/v5_13_2/spZbest-7338-56660.fits"]
    server.files = {path: image(seed, 3000) for seed, path in enumerate(paths)}
    ids = tmp_path / "plates.csv"
    ids.write_text("plate,mjd\n266,51602\n7338,56660\n266,51602\n")
    made = go("sdss", server, tmp_path, f"ids={ids}", "plates=true")
    assert counts(made) == (4, 0, 0)
    same(made, server, paths)


# SkyServer ----------------------------------------------------------------------------------------------------------

SQL_PAGE = "dr17/en/tools/search/x_results.aspx"


def query(sdss: ArchiveServer, tmp_path: Path, body: str, *words: str) -> Fetched:
    sdss.pages[SQL_PAGE] = lambda asked: (200, {"Content-Type": "text/csv"}, body.encode())
    sql = "select plate,mjd,fiberID,run2d from SpecObj -- all\nwhere class = 'QSO'"
    return go("sdss", sdss, tmp_path, f"query={json.dumps(sql)}", f"skyserver={sdss.url}", *words)


def test_a_query_names_the_files(sdss: ArchiveServer, tmp_path: Path) -> None:
    rows = "\n".join(",".join(map(str, spectrum)) for spectrum in SPECTRA)
    made = query(sdss, tmp_path, f"#Table1\nplate,mjd,fiberID,run2d\n{rows}\n")
    assert counts(made) == (6, 0, 0)
    assert sdss.asked[0].query == {
        "cmd": "select plate,mjd,fiberID,run2d from SpecObj  where class = 'QSO'",
        "format": "csv",
        "searchtool": "SQL",
    }
    # The same question as astroquery asks, at the same address.
    astroquery = pytest.importorskip("astroquery.sdss")
    oracle = astroquery.SDSSClass()
    assert oracle._get_query_url(17).endswith(SQL_PAGE)
    payload = oracle.query_sql(sdss.asked[0].query["cmd"], data_release=17, get_query_payload=True)
    assert {key: value.strip() for key, value in payload.items()} == sdss.asked[0].query


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("#Table1\nplate,mjd,fiberID\n" + "266,51602,1\n" * 20, "cuts an answer off"),
        ("#Table1\nplate,mjd,fiberID\n", "finds nothing"),
        ("#Table1\nra,dec\n1,2\n", "expected the columns"),
        ("<html><b>Incorrect syntax</b> near 'FORM'</html>", "Incorrect syntax near 'FORM'"),
        ("", "expected the columns"),
    ],
)
def test_an_answer_that_is_cut_off_or_none_is_refused(
    body: str, says: str, sdss: ArchiveServer, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refusal:
        query(sdss, tmp_path, body, "rows_max=20")
    assert says in str(refusal.value)
    assert len(sdss.asked) == 1


# SPARCL -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sparcl(server: ArchiveServer) -> SparclService:
    rng = np.random.default_rng(4)
    wave = [3600.0 + 0.8 * i for i in range(900)]
    records = [
        {
            "sparcl_id": str(uuid.UUID(int=int(rng.integers(1 << 62)) << 64 | i)),
            "specid": 39627652595714901 + i + (1 << 61),
            "targetid": 39627652595714901 + i + (1 << 61),
            "ra": 10.0 + i,
            "dec": -3.5,
            "redshift": 0.05 * i,
            "redshift_warning": 4 * (i % 2),
            "spectype": "QSO" if i % 3 == 0 else "GALAXY",
            "subtype": None,
            "data_release": "DESI-DR1",
            "flux": [*rng.normal(5, 1, 899).round(4).tolist(), None],
            "ivar": [*np.ones(899).tolist(), 0.0],
            "mask": [*[0] * 899, 1],
            "wavelength": wave,
        }
        for i in range(20)
    ]
    service = SparclService(records)
    service.attach(server)
    return service


def test_spectra_of_sparcl_become_tables(sparcl: SparclService, server: ArchiveServer, tmp_path: Path) -> None:
    words = ("where.redshift=[0.1, 0.6]", "where.spectype=['GALAXY']", "batch=3")
    made = go("sparcl", server, tmp_path, *words)
    wanted = [one for one in sparcl.records if 0.1 <= one["redshift"] <= 0.6 and one["spectype"] == "GALAXY"]
    assert (made.unit, *counts(made)) == ("spectra", len(wanted), 0, 0)
    table = pa.concat_tables([pq.read_table(path) for path in sorted(made.folder.glob("*.parquet"))])
    rows = {row["sparcl_id"]: row for row in table.to_pylist()}
    assert rows.keys() == {one["sparcl_id"] for one in wanted}
    for one in wanted:
        row = rows[one["sparcl_id"]]
        assert row["object_id"] == row["targetid"] == one["specid"]
        assert (row["z"], row["zwarn"], row["class"]) == (one["redshift"], one["redshift_warning"], one["spectype"])
        assert row["wavelength"] == one["wavelength"]
        np.testing.assert_array_equal(row["flux"][:-1], np.array(one["flux"][:-1], np.float32))
        assert np.isnan(row["flux"][-1])
    server.behave()
    assert counts(go("sparcl", server, tmp_path, *words)) == (0, len(wanted), 0)
    assert "api/spectras/" not in server.paths("POST")


def test_tables_of_sparcl_are_read_by_their_source(
    sparcl: SparclService, server: ArchiveServer, tmp_path: Path
) -> None:
    made = go("sparcl", server, tmp_path, "where.redshift=[0, 9]", "batch=20")
    source = sources.build(TableSource(path=str(made.folder)), 0, tmp_path)
    assert [entry.name for entry in source.files()] == [path.name for path in made.folder.glob("*.parquet")]
    assert source.grid.pixels == 900


def test_a_damaged_table_is_put_aside_and_its_spectra_come_again(
    sparcl: SparclService, server: ArchiveServer, tmp_path: Path
) -> None:
    made = go("sparcl", server, tmp_path, "where.redshift=[0, 9]", "batch=5")
    first, second = sorted(made.folder.glob("*.parquet"))[:2]
    first.write_bytes(first.read_bytes()[:-10])
    content = bytearray(second.read_bytes())
    content[100] ^= 1
    second.write_bytes(content)
    assert counts(go("sparcl", server, tmp_path, "where.redshift=[0, 9]", "check=true")) == (10, 10, 0)
    table = pa.concat_tables([pq.read_table(path) for path in made.folder.glob("*.parquet")])
    assert sorted(table["sparcl_id"].to_pylist()) == sorted(one["sparcl_id"] for one in sparcl.records)


@pytest.mark.parametrize("name", ["sparcl_id", "specid", "targetid"])
def test_a_list_names_spectra_of_sparcl(
    name: str, sparcl: SparclService, server: ArchiveServer, tmp_path: Path
) -> None:
    wanted = [one[name] for one in sparcl.records[:7]]
    absent = str(uuid.UUID(int=1)) if name == "sparcl_id" else 12
    ids = tmp_path / "ids.csv"
    ids.write_text("\n".join([name, *map(str, [*wanted, absent])]) + "\n")
    made = go("sparcl", server, tmp_path, f"ids={ids}", "batch=4")
    assert counts(made) == (7, 0, 1)
    assert str(absent) in made.failed[0].name


def test_flawed_records_are_written_down(sparcl: SparclService, server: ArchiveServer, tmp_path: Path) -> None:
    def damage(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        first, second, third, *rest = [dict(record) for record in records]
        del first["ivar"]
        second["flux"] = second["flux"][:-1]
        third["specid"] = 1 << 70
        return [first, second, third, *rest[1:]]

    sparcl.damage = damage
    made = go("sparcl", server, tmp_path, "where.redshift=[0, 9]", "batch=20")
    assert counts(made) == (16, 0, 4)
    reasons = " ".join(one.reason for one in made.failed)
    for said in ("comes without ivar", "expected equal ones", "expected a whole number", "not in the service's answer"):
        assert said in reasons
    sparcl.damage = lambda records: records
    assert counts(go("sparcl", server, tmp_path, "where.redshift=[0, 9]")) == (4, 16, 0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("where.redshift=[0, 9]", "limit=19"), "more than 19 spectra"),
        (("where.colour=['red']",), "where.colour is no field"),
        (("where.redshift=[0, 9]", "release=DESI-DR9"), "expected one of DESI-DR1"),
        ((), "give either ids"),
    ],
)
def test_requests_that_sparcl_cannot_serve_whole_are_refused(
    words: tuple[str, ...], says: str, sparcl: SparclService, server: ArchiveServer, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refusal:
        go("sparcl", server, tmp_path, *words)
    assert says in str(refusal.value)


def test_a_pickle_in_place_of_json_is_never_opened(
    sparcl: SparclService, server: ArchiveServer, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    server.pages["api/spectras/"] = lambda asked: (200, {}, f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    made = go("sparcl", server, tmp_path, "where.redshift=[0, 9]")
    assert "expected JSON" in made.failed[0].reason
    assert not canary.exists()


def test_the_service_is_asked_as_its_own_client_asks(
    sparcl: SparclService, server: ArchiveServer, tmp_path: Path
) -> None:
    theirs = pytest.importorskip("sparcl.client")
    client = theirs.SparclClient(url=server.url, announcement=False)
    found = client.find(
        outfields=["sparcl_id"], constraints={"data_release": ["DESI-DR1"], "redshift": [0.1, 0.6]}, limit=100_001
    )
    asked = server.asked[-1]
    server.behave()
    made = go("sparcl", server, tmp_path, "where.redshift=[0.1, 0.6]")
    ours = next(one for one in server.asked if one.path == "api/find/")
    assert (ours.path, ours.query, json.loads(ours.body)) == (asked.path, asked.query, json.loads(asked.body))
    assert made.fetched == len(found.ids)


# The command --------------------------------------------------------------------------------------------------------


def command(server: ArchiveServer, to: Path, ids: Path, *words: str) -> list[str]:
    prefix = [sys.executable, "-m", "distspec", "fetch", "sdss"]
    return [*prefix, f"to={to}", f"ids={ids}", f"url={server.url}", *QUICK, *words]


def test_the_command_says_what_came_and_what_did_not(
    sdss: ArchiveServer,
    ids: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command(sdss, tmp_path / "got", ids)[3:]
    sdss.misbehave(paths_of(SPECTRA)[0], forever=Fault(404))
    assert call(monkeypatch, *words) == 3
    said = capsys.readouterr()
    assert "5 fetched, 0 there already, 1 failed" in said.out
    assert f"ingest.source.path={tmp_path / 'got'}" in said.out
    assert said.err.count("\n") == 1
    assert "failed.csv" in said.err
    sdss.behave()
    assert call(monkeypatch, *words) == 0
    assert "1 fetched, 5 there already, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("fetch", "hubble"), "hubble"),
        (("fetch", "sdss", "to=x"), "give either ids"),
        (("fetch", "sdss", "to=x", "ids=a.csv", "query=select 1"), "give either ids"),
        (("fetch", "sdss", "to=x", "ids=nowhere.csv"), "no file 'nowhere.csv'"),
        (("fetch", "sdss", "to=x", "ids=a.csv", "url=file:///etc"), "url"),
        (("fetch", "sdss", "to=x", "ids=a.csv", "relase=dr17"), "did you mean 'release'"),
        (("fetch", "sdss", "to=x", "ids=a.csv", "transfer.connections=99"), "transfer.connections"),
        (("fetch", "desi", "ids=a.csv"), "to"),
        (("fetch", "desi", "to=/proc/nowhere", "ids=a.csv"), "cannot write to /proc/nowhere"),
    ],
)
def test_words_that_make_no_sense_are_refused(
    words: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert says in said.err


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE)
@pytest.mark.parametrize(("kill", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_run_that_is_ended_goes_on_where_it_stopped(
    kill: signal.Signals, status: int, sdss: ArchiveServer, ids: Path, tmp_path: Path
) -> None:
    slow = paths_of(SPECTRA)[4:]
    for path in slow:
        sdss.misbehave(path, forever=Fault(send=30_000, then="stall"))
    # So long that a run which waited for an answer would never end.
    sdss.stall = 2 * PATIENCE
    to = tmp_path / "got"
    words = command(sdss, to, ids, f"transfer.stall_timeout={2 * PATIENCE}")
    partials = [to / Path(path).with_name(f".{Path(path).name}.partial") for path in slow]
    with started(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        deadline = time.monotonic() + PATIENCE
        while len(manifest(to) if (to / "fetch.csv").exists() else {}) < 4 or not all(map(_stalled, partials)):
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.02)
        run.send_signal(kill)
        _, said = run.communicate(timeout=PATIENCE)
    assert run.returncode == status
    assert "Traceback" not in said
    if kill == signal.SIGINT:
        assert "goes on where it stopped" in said
    sdss.behave()
    made = go("sdss", sdss, tmp_path, f"ids={ids}")
    assert counts(made) == (2, 4, 0)
    same(made, sdss, paths_of(SPECTRA))
    assert set(sdss.paths()) == set(slow)
    if kill == signal.SIGINT:
        assert {one.headers.get("Range") for one in sdss.asked} == {"bytes=30000-"}


def _stalled(partial: Path) -> bool:
    return partial.exists() and partial.stat().st_size == 30_000


def test_a_full_disk_is_one_clear_line(sdss: ArchiveServer, ids: Path, tmp_path: Path) -> None:
    # A limit on the size of files stands for the disk: the kernel refuses the write in the same way.
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    to = tmp_path / "got"
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    said = subprocess.run(
        command(sdss, to, ids), capture_output=True, text=True, preexec_fn=limit, env=environment, check=False
    )
    assert said.returncode == 2
    assert said.stderr.count("\n") == 1, said.stderr
    assert f"cannot write to {to}" in said.stderr
    assert not list(to.rglob("spec-*.fits"))
    assert counts(go("sdss", sdss, tmp_path, f"ids={ids}")) == (6, 0, 0)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_files(server: ArchiveServer, tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process's own memory is read from /proc")
    path = PAIR[0]
    probe = (
        "import re, sys\n"
        "from distspec.config import load_fetch\n"
        "from distspec.stages.fetch import fetch\n"
        "fetch(load_fetch('desi', sys.argv[1:]))\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    peaks = []
    ids = tmp_path / "ids.csv"
    ids.write_text("survey,program,healpix\nmain,dark,10016\n")
    for size in (1 << 18, 24 << 20):
        header = fits.PrimaryHDU(np.zeros(size, ">f4")).header.tostring().encode()
        server.files = dict.fromkeys(PAIR, header + pad(bytes(4 * size)))
        words = [f"to={tmp_path / str(size)}", f"ids={ids}", f"url={server.url}"]
        said = subprocess.run([sys.executable, "-c", probe, *words], capture_output=True, text=True, check=True)
        peaks.append(int(said.stdout) / 1024)
        assert (tmp_path / str(size) / path).stat().st_size > 4 * size
    assert peaks[1] - peaks[0] < 24, peaks


def test_the_gate_lets_no_more_through_than_it_should() -> None:
    gate = Client(Transfer(per_second=50.0)).gate
    start = time.monotonic()
    for _ in range(6):
        gate.wait()
    assert time.monotonic() - start >= 5 / 50
