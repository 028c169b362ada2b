import pickle

import pytest

from distspec import errors

ERRORS = [name for name in errors.__all__ if name.endswith("Error")]


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_survives_the_way_between_processes(name: str) -> None:
    error = getattr(errors, name)("what was found; what was expected; what to do")
    error.rows = (5, 9)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == "what was found; what was expected; what to do"
    assert copy.rows == (5, 9)


def test_each_error_is_also_the_builtin_that_it_specializes() -> None:
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.SourceError, OSError)
    assert issubclass(errors.StoreNotFoundError, FileNotFoundError)
    assert all(issubclass(getattr(errors, name), errors.DistspecError) for name in ERRORS)
