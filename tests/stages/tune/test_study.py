"""The journal of a search, in a folder and in a bucket."""

from pathlib import Path

import pytest

from distspec.addresses import Place, address_of
from distspec.stages.tune.study import JOURNAL, Study


@pytest.fixture(params=["folder", "bucket"])
def folder(request: pytest.FixtureRequest, bucket: str, tmp_path: Path) -> Place:
    """A place of either kind in which nothing lies yet."""
    return tmp_path / "study" if request.param == "folder" else address_of(f"{bucket}/{tmp_path.name}/study")


def test_a_search_is_gone_on_with_from_its_journal(folder: Place) -> None:
    study = Study(folder)
    for loss in (0.5, 0.25):
        trial = study._study.ask()
        trial.suggest_float("rate", 0.1, 1.0)
        trial.report(loss, 0)
        study._study.tell(trial, loss)
    begun = study._study.ask()
    begun.suggest_float("rate", 0.1, 1.0)
    assert (folder / JOURNAL).is_file()
    again = Study(folder)
    assert [trial.loss for trial in again.ended()] == [0.5, 0.25]
    assert again.table() == study.table()
    assert again.best().number == 1
    # The one that had begun is in line once more, under its own number.
    assert len(again) == 4
    assert len(Study(folder)) == 4
