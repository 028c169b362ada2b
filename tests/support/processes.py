"""Programs that a test starts: with the signals that a terminal gives them, and ended whole whatever becomes of it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["PATIENCE", "finished", "started", "told_by"]

PATIENCE = 800.0
"""Seconds after which a program counts as hung: many times what it takes, even beside other load."""

_LAUNCHER = """
import ctypes, os, signal, sys
for name in ("SIGHUP", "SIGINT", "SIGTERM"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed test takes its program with it
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the test has ended")
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Makes itself the program; a `preexec_fn` would fork a process that has threads."""


@contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """Start a program in a process group of its own, which is killed when the block is left.

    A parent that ignores SIGINT, as under `nohup` or in the background of a script, would pass that on.

    Arguments:
        command: the program and its arguments.
        options: of `subprocess.Popen`.
    """
    words = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
    with subprocess.Popen(words, text=True, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def finished(command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end, whatever its status, and give what it wrote."""
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        out, err = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


def told_by(program: str) -> tuple[Any, str]:
    """Run Python code of its own process in the project's folder; give what its last line tells as JSON, and stderr."""
    ended = finished([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1]), ended.stderr
