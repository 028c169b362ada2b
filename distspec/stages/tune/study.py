"""What is known of a search for settings: Optuna's journal, one JSON line a step, on disk before the next step.

A trial that did not come to its end, because the driver or its worker was killed, is begun again under its old number.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from distspec.addresses import BucketPath, Place
from distspec.errors import ConfigError
from distspec.files import csv_text, write_file

__all__ = ["JOURNAL", "NAME", "Ended", "Study", "number_of"]

JOURNAL = "journal.jsonl"
"""Of the study, in its folder."""

NAME = "tune"
"""Of the study inside the journal."""

_TRIES = 3
"""How often a trial is begun whose worker dies."""


@dataclass(frozen=True)
class Ended:
    """A trial that has ended.

    Arguments:
        number: of the trial.
        losses: the smallest validation loss so far, after each epoch.
        loss: the smallest of all; infinite if the trial failed.
        params: what it had drawn.
    """

    number: int
    losses: tuple[float, ...]
    loss: float
    params: dict[str, Any]

    @property
    def failed(self) -> bool:
        """Tell whether it came to no finite loss."""
        return not math.isfinite(self.loss)


def number_of(trial: Any) -> int:
    """Give the number of an Optuna trial; begun again it keeps the one that it had at first."""
    number: int = trial.user_attrs.get("origin", trial.number)
    return number


class Study:
    """A study that is kept in a folder; whoever opens it must be the only one.

    Arguments:
        folder: of the journal; made if it is not there.
    """

    def __init__(self, folder: Place) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.storage = JournalStorage(_journal(folder / JOURNAL))
        self._study = optuna.create_study(
            storage=self.storage, study_name=NAME, direction="minimize", load_if_exists=True
        )
        for trial in self._trials():
            if trial.state == TrialState.RUNNING:
                self._again(trial)
                self._study.tell(trial.number, state=TrialState.FAIL)

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def __len__(self) -> int:
        """Count all trials ever begun, those begun again included."""
        return len(self._trials())

    def _again(self, trial: FrozenTrial) -> None:
        if all(number_of(later) != number_of(trial) for later in self._trials()[trial.number + 1 :]):
            self._study.enqueue_trial(trial.params, user_attrs={"origin": number_of(trial)})

    def begin_again(self, number: int) -> bool:
        """Put a trial whose worker died in line once more; False if that happened too often."""
        begun = [trial for trial in self._trials() if number_of(trial) == number]
        if len(begun) >= _TRIES:
            return False
        self._again(begun[-1])
        return True

    def ended(self) -> list[Ended]:
        """Give the trials that have ended, by number."""
        newest = {number_of(trial): trial for trial in self._trials()}
        return [_ended(newest[number]) for number in sorted(newest) if newest[number].state.is_finished()]

    def best(self) -> Ended:
        """Give the trial of the smallest loss.

        Raises:
            ConfigError: no trial has a finite loss.
        """
        ended = self.ended()
        good = [trial for trial in ended if not trial.failed]
        if not good:
            raise ConfigError(
                f"none of {len(ended)} trials came to a finite loss; lower tune.learning_rate, or set train.clip"
            )
        return min(good, key=lambda trial: trial.loss)

    def table(self) -> str:
        """Write all trials that have ended as CSV: number, state, loss, epochs, parameters."""
        ended = self.ended()
        names = sorted({name for trial in ended for name in trial.params})
        rows = []
        for trial in ended:
            told = ["failed", ""] if trial.failed else ["finished", trial.loss]
            rows.append([trial.number, *told, len(trial.losses), *(trial.params.get(name, "") for name in names)])
        return csv_text(("trial", "state", "validation_loss", "epochs", *names), rows, quoted=False)


def _journal(path: Place) -> BaseJournalBackend:
    if not isinstance(path, Path):
        return _BucketJournal(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        # A power cut may leave half a line, and a kill the journal's lock.
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    return JournalFileBackend(str(path))


class _BucketJournal(BaseJournalBackend):
    """A journal in a bucket, put anew with every step: it is small, and has one writer."""

    def __init__(self, path: BucketPath) -> None:
        self._path = path
        self._lines = path.read_text().splitlines() if path.is_file() else []

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Give the steps from a number on."""
        return map(json.loads, self._lines[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add steps."""
        self._lines += [json.dumps(log, separators=(",", ":")) for log in logs]
        write_file(self._path, "".join(f"{line}\n" for line in self._lines))


def _ended(trial: FrozenTrial) -> Ended:
    reported = [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
    loss = math.inf
    if trial.state == TrialState.COMPLETE and trial.value is not None:
        loss = trial.value
        # Ray tells Optuna the result that ends a trial as its value alone.
        reported.append(loss)
    losses = tuple(value for value in reported if math.isfinite(value))
    return Ended(number_of(trial), losses, loss, trial.params)
