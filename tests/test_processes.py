"""Tests end what they start."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import PATIENCE, finished, started

PARENT = (
    "import pathlib, subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])\n"
    "mark = pathlib.Path(sys.argv[1])\n"
    "mark.with_suffix('.partial').write_text(str(child.pid))\n"
    "mark.with_suffix('.partial').rename(mark)\n"
    "time.sleep(3600)\n"
)


def wait_for(mark: Path) -> int:
    deadline = time.monotonic() + PATIENCE
    while not mark.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(mark.read_text())


def require_ended(pid: int) -> None:
    """Wait until a process that is no child of this one is gone; only its killing can end it so soon."""
    deadline = time.monotonic() + 60
    while True:
        try:
            # One that waits for its parent, or init, to take note of it has ended too.
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_a_failed_test_leaves_no_process(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        started([sys.executable, "-c", PARENT, str(tmp_path / "mark")]) as process,
    ):
        child = wait_for(tmp_path / "mark")
        raise ZeroDivisionError
    assert process.returncode == -signal.SIGKILL
    require_ended(child)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a child whose parent dies")
def test_a_killed_test_leaves_no_process(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\n"
        "from tests.support.processes import started\n"
        "with started([sys.executable, '-c', 'import os, pathlib, sys, time; "
        'pathlib.Path(sys.argv[1] + ".partial").write_text(str(os.getpid())); '
        'os.rename(sys.argv[1] + ".partial", sys.argv[1]); time.sleep(3600)\', sys.argv[1]]):\n'
        "    time.sleep(3600)\n"
    )
    root = str(Path(__file__).parents[1])
    test = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "mark")], cwd=root)
    child = wait_for(tmp_path / "mark")
    test.kill()
    test.wait()
    require_ended(child)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_parent_that_ignores_signals_does_not_pass_that_on(sent: signal.Signals) -> None:
    probe = f"import signal; print(signal.getsignal({int(sent)}) == signal.SIG_IGN)"
    before = signal.signal(sent, signal.SIG_IGN)
    try:
        plain = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
        said = finished([sys.executable, "-c", probe]).stdout
    finally:
        signal.signal(sent, before)
    assert (plain, said) == ("True\n", "False\n")


def test_what_a_program_wrote_and_its_status_are_told() -> None:
    said = finished([sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"])
    assert (said.returncode, said.stdout, said.stderr) == (3, "out\n", "err\n")
    assert said.args[0] == sys.executable
