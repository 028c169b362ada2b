"""Faults on purpose: work that ends its process, never ends, or takes all memory, at one row of a survey."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distspec.spectra import Spectra
from distspec.stages.detect.workers import DetectorScorer
from distspec.stages.evaluate.workers import Injector
from distspec.stages.explain.workers import UnitWorker
from distspec.stages.ingest.workers import Ingester
from distspec.stages.score.workers import Scorer

__all__ = ["Fault", "Struck"]


@dataclass(frozen=True)
class Fault:
    """What happens at which row.

    Arguments:
        kind: the process ends, the row takes for ever, or memory is taken until something ends the process.
        row: of the store; of `ingest` the place in a file, of `evaluate` that of a host; -1 strikes nowhere.
        slow: seconds that each item takes longer, so that something can happen meanwhile.
    """

    kind: Literal["exit", "sleep", "memory"] = "exit"
    row: int = -1
    slow: float = 0.0

    def strike(self, rows: Any) -> None:
        """Do it, where the row is among some."""
        if self.row not in rows:
            return
        if self.kind == "exit":
            os._exit(1)
        taken = []
        while True:
            time.sleep(0.02)
            if self.kind == "memory":
                taken.append(os.urandom(1_000_000) * 50)


class Struck:
    """Work of a stage with a fault in it; in the place of the work's own class.

    Arguments:
        factory: the work's own class.
        fault: what happens.
        arguments: of the work.
    """

    def __init__(self, factory: Callable[..., Any], fault: Fault, *arguments: Any) -> None:
        self._work, self._fault = factory(*arguments), fault
        _arm(self._work, fault)

    def __call__(self, item: Any) -> Any:
        time.sleep(self._fault.slow)
        return self._work(item)

    def attempt(self, item: Any, start: int, stop: int) -> None:
        self._work.attempt(item, start, stop)

    def without(self, item: Any, lost: Sequence[int], why: str) -> Any:
        return self._work.without(item, lost, why)


def _arm(work: Any, fault: Fault) -> None:
    """Put the fault where the work meets its rows."""
    if isinstance(work, Scorer):
        work._scores = _Guarded(work._scores, fault)  # type: ignore[assignment]
    elif isinstance(work, DetectorScorer):
        work._detectors = {name: _Guarded(one, fault) for name, one in work._detectors.items()}  # type: ignore[misc]
    elif isinstance(work, UnitWorker):
        _guard(work, "find", lambda layer, chosen: fault.strike(chosen.rows))
    elif isinstance(work, Ingester):
        _guard(work, "_read", lambda piece, unreachable: fault.strike(range(piece.start, piece.stop)))
    elif isinstance(work, Injector):
        _guard(work, "_injected", lambda job, strength: fault.strike(range(job.start, job.stop)))


def _guard(work: Any, name: str, before: Callable[..., Any]) -> None:
    method = getattr(work, name)

    def guarded(*arguments: Any) -> Any:
        before(*arguments)
        return method(*arguments)

    setattr(work, name, guarded)


class _Guarded:
    """Scores as another does, and strikes where it meets the row."""

    def __init__(self, other: Any, fault: Fault) -> None:
        self._other, self._fault = other, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)

    def __call__(self, spectra: Spectra) -> Any:
        self._fault.strike(spectra.rows)
        return self._other(spectra)

    def details(self, spectra: Spectra) -> Any:
        self._fault.strike(spectra.rows)
        return self._other.details(spectra)
