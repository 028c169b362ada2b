"""Where files lie: a folder, a list, an archive and a bucket list and open the same."""

import gzip
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import fsspec
import pytest

from distspec.errors import SourceError
from distspec.sources.files.places import Entry, Files, Torn

CONTENT = {"a.fits": b"first", "deep/b.fits.gz": b"second", "deep/er/C.FITS": b"third"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name, content in CONTENT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "deep" / "._b.fits").write_bytes(b"a twin")
    (root / "notes.md").write_text("no spectrum")
    return root


@pytest.fixture(params=["folder", "list", "dotted.tar", "plain.tar", "zip", "memory", "ranges"])
def files(request: pytest.FixtureRequest, tree: Path) -> Files:
    kind = str(request.param)
    place = tree.parent / f"x.{kind}"
    if kind == "folder":
        return Files(str(tree), "spectra")
    if kind == "list":
        listing = tree / "some.txt"
        listing.write_text("# what I want\n\n" + "\n".join([*reversed(CONTENT), "a.fits"]))
        return Files(str(listing), "spectra")
    if kind.endswith("tar"):
        with tarfile.open(place, "w") as tar:
            tar.add(tree, "." if kind.startswith("dotted") else "", recursive=True)
        return Files(str(place), "spectra")
    if kind == "zip":
        with zipfile.ZipFile(place, "w") as archive:
            for path in sorted(tree.rglob("*")):
                archive.write(path, path.relative_to(tree))
        return Files(str(place), "spectra")
    bucket = fsspec.filesystem("memory")
    for path in tree.rglob("*"):
        if path.is_file():
            bucket.pipe(f"/{tree.parent.name}/{path.relative_to(tree)}", path.read_bytes())
    return Files(f"memory://{tree.parent.name}/", "spectra", ranges=kind == "ranges")


def test_all_places_list_and_open_the_same(files: Files) -> None:
    again = pickle.loads(pickle.dumps(files))
    for place in (files, again):
        entries = place.list()
        assert {entry.name: entry.size for entry in entries} == {k: len(v) for k, v in CONTENT.items()}
        assert [entry.name for entry in entries] == sorted(CONTENT)
        for name, content in CONTENT.items():
            with place.open(name) as file:
                assert file.read() == content
                file.seek(1)
                assert file.read(2) == content[1:3]
            assert place.has(name)
            assert name in place.place(name)
    assert not files.has("deep/gone.fits")
    assert files.beside("deep/b.fits.gz", "z.fits") == "deep/z.fits"
    assert files.beside("a.fits", "z.fits") == "z.fits"
    with pytest.raises(OSError):
        files.open("deep/gone.fits")


def test_what_is_near(files: Files) -> None:
    assert files.near("a.fits", "b.fits.gz") == ("deep/b.fits.gz",)
    assert files.near("deep/b.fits.gz", "b.fits.gz") == ("deep/b.fits.gz",)
    assert files.near("deep/b.fits.gz", "C.FITS") == ("deep/er/C.FITS",)
    assert files.near("a.fits", "C.FITS") == ()


def test_pickles_stay_small(files: Files) -> None:
    files.list()
    assert len(pickle.dumps(files)) < 500


def test_one_file(tree: Path) -> None:
    files = Files(str(tree / "a.fits"), "a spectrum")
    (entry,) = files.list()
    assert (entry.name, entry.size, entry.count) == ("a.fits", 5, None)
    assert entry.changed == (tree / "a.fits").stat().st_mtime_ns
    assert files.open("a.fits").read() == b"first"
    assert files.near("a.fits", "b.fits.gz") == ("deep/b.fits.gz",)
    fsspec.filesystem("memory").pipe("/one/deep/b.fits.gz", b"remote")
    remote = Files("memory://one/deep/b.fits.gz", "a spectrum")
    assert [entry.name for entry in remote.list()] == ["b.fits.gz"]
    assert remote.open("b.fits.gz").read() == b"remote"
    assert remote.place("b.fits.gz") == "memory://one/deep/b.fits.gz"


def test_a_link_to_nothing_and_a_name_without_a_file_are_listed(tree: Path) -> None:
    (tree / "lost.fits").symlink_to(tree / "gone")
    (tree / "some.txt").write_text("gone.fits\n/nowhere/at/all.fits\n")
    assert Entry("lost.fits", 0, 0) in Files(str(tree), "spectra").list()
    listed = Files(str(tree / "some.txt"), "spectra").list()
    assert [(entry.name, entry.size) for entry in listed] == [("/nowhere/at/all.fits", 0), ("gone.fits", 0)]


def test_paths_that_hold_nothing(tree: Path) -> None:
    for root, message in (
        ("gone", "no file or folder"),
        ("empty", "no \\*.fits or \\*.fits.gz file"),
        ("x.tar.gz", "unpack it first"),
        ("bad.tar", "cannot be listed"),
        ("bad.zip", "cannot be listed"),
    ):
        (tree / "empty").mkdir(exist_ok=True)
        for name in ("bad.tar", "bad.zip"):
            (tree / name).write_bytes(b"junk" * 300)
        with pytest.raises(SourceError, match=message) as caught:
            Files(str(tree / root), "spectra").list()
        assert "\n" not in str(caught.value)
    with pytest.raises(SourceError, match="expected spectra"):
        Files("memory://nothing-here", "spectra").list()


def test_other_endings(tree: Path) -> None:
    assert [entry.name for entry in Files(str(tree), "notes").list((".md",))] == ["notes.md"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_torn_file_claims_to_go_on_and_holds_what_it_holds(tmp_path: Path, packed: bool) -> None:
    content = os.urandom(300_000)
    stored = gzip.compress(content) if packed else content
    (tmp_path / "a.fits").write_bytes(stored[:200_000])
    file = Torn(str(tmp_path), "spectra").open("a.fits")
    assert file.seek(0, os.SEEK_END) > 1 << 60
    file.seek(100)
    assert file.read(1000) == content[100:1100]
    file.seek(199_000)
    assert file.read(2880) == b""
    file.seek(10**18)
    assert file.read(10) == b""


def test_links_to_folders_are_followed_once_and_odd_names_are_found_again(tmp_path: Path) -> None:
    (tmp_path / "tree/inner").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.fits").write_bytes(b"a")
    (tmp_path / "tree/linked").symlink_to("../elsewhere")
    (tmp_path / "tree/inner/loop").symlink_to("..")
    odd = os.fsdecode(b"bad\xff\xfe.fits")
    (tmp_path / "tree" / odd).write_bytes(b"odd")
    os.mkfifo(tmp_path / "tree/pipe.fits")
    files = Files(str(tmp_path / "tree"), "files")
    names = [entry.name for entry in files.list()]
    assert names == ["bad\\xff\\xfe.fits", "linked/a.fits", "pipe.fits"]
    assert files.open(names[0]).read() == b"odd"
    with pytest.raises(OSError, match="not a regular file"):
        files.open("pipe.fits")
