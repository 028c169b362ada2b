"""Addresses mean the same everywhere, and errors of object stores fit in a line."""

from pathlib import Path

import pytest

from distspec.addresses import absolute, brief, in_bucket


def test_a_path_means_the_same_in_another_folder_and_a_url_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = absolute("run/store.zarr")
    assert here == str(tmp_path.resolve() / "run/store.zarr")
    monkeypatch.chdir("/")
    assert absolute(here) == here
    assert absolute("s3://bucket/run") == "s3://bucket/run"


def test_buckets_are_known_by_their_schemes() -> None:
    assert [in_bucket(text) for text in ("s3://a/b", "gs://a", "https://a/b", "s3/a", "/s3://a")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_an_error_is_told_in_its_first_sentence() -> None:
    error = OSError("Generic S3 error:\n  no answer\n\nDebug source:\nGeneric { store: ... }")
    assert brief(error) == "Generic S3 error: no answer"
    assert brief(ValueError()) == "ValueError()"
    assert len(brief(OSError("x" * 1000))) == 300
