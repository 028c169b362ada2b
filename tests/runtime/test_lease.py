"""A lock in a bucket, on a real server."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from distspec.addresses import BucketPath, address_of
from distspec.errors import ConfigError, StoreError
from distspec.runtime import lease


@pytest.fixture
def lock(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BucketPath:
    """The place of a lock, with times that a test can wait for."""
    monkeypatch.setattr(lease, "RENEW", 0.2)
    monkeypatch.setattr(lease, "EXPIRES", 3.0)
    path = address_of(f"{bucket}/{tmp_path.name}/.lock")
    assert isinstance(path, BucketPath)
    return path


def test_a_lock_that_is_held_is_refused_and_free_once_it_is_released(lock: BucketPath) -> None:
    with lease.held(lock, "the output"):
        begun = time.monotonic()
        told = r"another run is at work in the output \(a run on .*, process \d+\)"
        with pytest.raises(ConfigError, match=told), lease.held(lock, "the output"):
            raise AssertionError("held twice")
        # It is seen to change long before it would have expired.
        assert time.monotonic() - begun < 2.5
    with lease.held(lock, "the output"):
        pass


def test_a_lock_that_a_killed_run_left_is_taken_over(lock: BucketPath, capsys: pytest.CaptureFixture[str]) -> None:
    program = (
        "import os, signal; from distspec.addresses import address_of; from distspec.runtime import lease\n"
        f"with lease.held(address_of('{lock}'), 'x'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    begun = time.monotonic()
    with lease.held(lock, "the output"):
        assert 2.5 < time.monotonic() - begun < 20
    assert "the output is locked by a run on" in capsys.readouterr().err


def test_a_run_that_loses_its_lock_is_interrupted(lock: BucketPath) -> None:
    told = r"the lock of the output was lost \(another run has taken it\)"
    with pytest.raises(StoreError, match=told), lease.held(lock, "the output"):
        lock.write_bytes(b'{"run": "other"}')
        time.sleep(20)
    # It belongs to the other now.
    assert lock.read_bytes() == b'{"run": "other"}'


def test_a_bucket_that_is_not_there_is_one_line(bucket: str) -> None:
    path = address_of("s3://no-such-bucket/run/.lock")
    assert isinstance(path, BucketPath)
    with pytest.raises(ConfigError, match="cannot write to the output"), lease.held(path, "the output"):
        raise AssertionError("held")
