import io
import sys

import pytest

from distspec.runtime.progress import progress


class Terminal(io.StringIO):
    """A stderr that says of itself that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_bar_counts_on_a_terminal_and_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress(iter("abc"), 3, "score")) == ["a", "b", "c"]
    assert "score" in sys.stderr.getvalue()
    assert "3/3" in sys.stderr.getvalue()


@pytest.mark.parametrize(("label", "stream"), [("score", io.StringIO), ("", Terminal)])
def test_without_a_terminal_or_a_label_it_is_silent(
    label: str, stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(progress(iter("abc"), 3, label)) == ["a", "b", "c"]
    assert sys.stderr.getvalue().strip() == ""


def test_it_takes_one_at_a_time_and_lets_errors_through() -> None:
    taken = []

    def results() -> object:
        for number in range(3):
            taken.append(number)
            yield number
        raise ZeroDivisionError

    passed = progress(results(), 4, "score")
    assert next(passed) == 0
    assert taken == [0]
    with pytest.raises(ZeroDivisionError):
        list(passed)
