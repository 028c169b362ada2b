"""Places of results, in a bucket as in a folder: a real server, started here."""

import pickle
from pathlib import Path

import pytest

from distspec.addresses import BucketPath, Place, absolute, address_of
from distspec.errors import BucketError, ConfigError, StoreError, UnreachableError
from distspec.files import (
    in_place,
    is_unfinished,
    read_json,
    remove,
    unfinished,
    write_csv,
    write_file,
    write_folder,
)
from distspec.sources.files.places import Files
from distspec.store.places import open_place


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, bucket: str, tmp_path: Path) -> Place:
    """A place of either kind in which nothing lies yet."""
    return tmp_path / "run" if request.param == "folder" else address_of(f"{bucket}/{tmp_path.name}/run/")


def test_what_is_written_is_found_again(place: Place) -> None:
    path = place / "a" / "b.json"
    assert not path.exists()
    assert not place.is_dir()
    write_file(path, '{"x": 1}')
    assert (path.is_file(), path.is_dir(), path.exists()) == (True, False, True)
    assert (place.is_file(), place.is_dir(), place.exists()) == (False, True, True)
    assert path.read_text("utf-8") == '{"x": 1}'
    assert path.stat().st_size == 8
    assert read_json(path) == {"x": 1}
    with path.open("rb") as file:
        file.seek(1)
        assert file.read(3) == b'"x"'
    write_file(path, "anew")
    assert path.read_bytes() == b"anew"
    path.unlink()
    assert not path.exists()
    path.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        path.unlink()
    with pytest.raises(FileNotFoundError):
        path.read_bytes()


def test_folders_are_replaced_and_listed_and_removed(place: Place) -> None:
    folder = place / "epoch-1"
    write_folder(folder, {"old": b"1", "x.json": b"2"})
    write_folder(folder, {"new": b"3", "x.json": b"4"})
    assert sorted(path.name for path in folder.iterdir()) == ["new", "x.json"]
    assert (folder / "x.json").read_bytes() == b"4"
    write_folder(place / "epoch-10", {"x.json": b"5"})
    write_folder(place / "other", {"x.json": b"6"})
    assert [path.name for path in sorted(place.glob("epoch-*"))] == ["epoch-1", "epoch-10"]
    remove(folder)
    assert sorted(path.name for path in place.iterdir()) == ["epoch-10", "other"]
    remove(folder)


def test_a_table_is_written_as_in_a_folder(place: Place) -> None:
    write_csv(place / "t.csv", ("id", "z"), [("a", 0.5)], quoted=False, end="\r\n")
    assert (place / "t.csv").read_bytes() == b"id,z\r\na,0.5\r\n"


def test_a_folder_that_could_not_be_replaced_does_not_count_as_whole(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = address_of(f"{bucket}/{tmp_path.name}/model")
    write_folder(folder, {"weights": b"1", "model.json": b"{}"})
    put = BucketPath.write_bytes

    def fails(self: BucketPath, content: bytes) -> None:
        if self.name == "model.json":
            raise OSError(5, "the connection broke")
        put(self, content)

    monkeypatch.setattr(BucketPath, "write_bytes", fails)
    with pytest.raises(StoreError, match="cannot write .*model: the connection broke; make room"):
        write_folder(folder, {"weights": b"2", "model.json": b"{}"})
    assert not (folder / "model.json").exists()


def test_the_parts_of_an_address(bucket: str) -> None:
    path = address_of("s3://bucket//run/a.tar.gz/")
    assert isinstance(path, BucketPath)
    assert str(path) == "s3://bucket/run/a.tar.gz"
    assert (path.name, str(path.parent)) == ("a.tar.gz", "s3://bucket/run")
    assert str(path.with_name("b")) == "s3://bucket/run/b"
    assert path.resolve() == pickle.loads(pickle.dumps(path)) == path
    assert path.parent.parent.parent == path.parent.parent == address_of("s3://bucket")


def test_places_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert address_of("out") == Path("out") == address_of(Path("out"))
    assert address_of("file:///x/y") == Path("/x/y")
    with pytest.raises(ConfigError, match="ftp://x is no place for results"):
        address_of("ftp://x")
    for wrong in ("s3:/bucket/run", "s3://", "s3://bucket/a#b", "s3://bucket/a?b", "s3://bucket/a%41"):
        with pytest.raises(ConfigError, match="expected"):
            address_of(wrong)
    with pytest.raises(ConfigError, match="no address in a bucket"):
        open_place("s3://bucket/a#b/store.zarr", write=True)
    assert absolute("a/b") == str(tmp_path / "a/b")
    assert absolute("/a/b") == "/a/b"
    assert absolute("s3://a/b") == "s3://a/b"


def test_a_folder_in_a_bucket_says_that_it_is_unfinished(bucket: str, tmp_path: Path) -> None:
    folder = BucketPath(f"{bucket}/{tmp_path.name}/table")
    (folder / "old").write_bytes(b"1")
    with pytest.raises(ValueError, match="broken off"), in_place(folder) as partial:
        partial.mkdir()
        raise ValueError("broken off before anything is put there")
    assert ((folder / "old").is_file(), is_unfinished(folder)) == (True, False)
    with pytest.raises(ValueError, match="broken off"), unfinished(folder):
        (folder / "new").write_bytes(b"2")
        raise ValueError("broken off")
    assert is_unfinished(folder)
    with in_place(folder) as partial:
        partial.mkdir()
        (partial / "newer").write_bytes(b"3")
    assert not is_unfinished(folder)
    assert [path.name for path in folder.iterdir()] == ["newer"]


@pytest.mark.slow
def test_what_cannot_be_reached_is_not_taken_for_missing(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(BucketError, match=r"s3://surveys/run/model.json cannot be reached .*; see to connection"):
        read_json(BucketPath("s3://surveys/run/model.json"))
    files = Files("s3://surveys/spectra", "files")
    for ask in (files.has, files.open):
        with pytest.raises(UnreachableError, match=r"s3://surveys/spectra/a.fits cannot be reached"):
            ask("a.fits")


def test_a_bucket_that_is_not_there_is_an_error_of_one_line(bucket: str) -> None:
    with pytest.raises(StoreError, match="s3://no-such-bucket-here/x cannot be written: there is no such") as caught:
        write_file(address_of("s3://no-such-bucket-here/x"), "text")
    assert "\n" not in str(caught.value)


def test_content_is_put_over_known_content_only(bucket: str, tmp_path: Path) -> None:
    path = BucketPath(f"{bucket}/{tmp_path.name}/lock")
    first = path.put_over(b"1", None)
    assert first is not None
    assert path.put_over(b"2", None) is None
    second = path.put_over(b"2", first)
    assert path.read_tagged() == (b"2", second)
    assert path.put_over(b"3", first) is None
