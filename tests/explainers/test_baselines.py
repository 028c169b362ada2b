"""Which ordinary spectra others are compared with: usable, not odd themselves, of the class or redshift asked for."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from distspec.config import ExpectedGradients, Experiment, Gradient, Imo, Lime
from distspec.errors import ConfigError, DistspecWarning
from distspec.explainers import baselines
from distspec.explainers.baselines import Baselines
from distspec.pipeline import Products
from distspec.store import SpectraStore


@pytest.fixture
def store(done: tuple[Experiment, Products], tmp_path: Path) -> SpectraStore:
    shutil.copytree(done[1].store.path, tmp_path / "store.zarr")
    return SpectraStore.open(str(tmp_path / "store.zarr"))


def test_candidates_are_usable_and_not_odd_and_hardly_depend_on_the_list(store: SpectraStore) -> None:
    usable = np.flatnonzero(store.column("status") == 0)
    one, two = (Baselines.of(store, odd, 3, [Imo()]).rows for odd in (usable[:5], usable[3:9]))
    assert set(one) == set(usable) - set(usable[:5])
    # Those that are ordinary for both lists come in one order.
    both = set(one) & set(two)
    assert [row for row in one if row in both] == [row for row in two if row in both]


def test_who_compares_with_nothing_may_explain_all(store: SpectraStore) -> None:
    usable = np.flatnonzero(store.column("status") == 0)
    assert Baselines.of(store, usable, 0, [Lime(), Gradient()]).near(store, usable[:2], Lime()) == []
    # Where all are explained they are compared with each other, none with itself.
    asking = Imo(baselines=4)
    with pytest.warns(DistspecWarning, match="only 0 ordinary spectra are left of the 4 .* fill up, 4 in all"):
        found = Baselines.of(store, usable, 0, [Lime(), asking])
    near = found.near(store, usable[:40], asking)
    assert {len(one) for one in near} == {4}
    assert all(row not in one.rows for row, one in zip(usable[:40], near, strict=True))


def test_a_store_smaller_than_what_is_asked_for_gives_all_there_is(
    store: SpectraStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable = np.flatnonzero(store.column("status") == 0)
    asking = Imo(baselines=5000)
    with pytest.warns(DistspecWarning, match=f"explained ones fill up, {len(usable) - 1} in all"):
        found = Baselines.of(store, usable[:3], 0, [asking])
    assert [len(one) for one in found.like(store, usable[:3], 5000, "any")] == [len(usable) - 1] * 3
    single = np.where(np.arange(store.rows) == usable[0], 0, 1)
    monkeypatch.setattr(type(store), "column", lambda self, name, rows: single[rows])
    with pytest.raises(ConfigError, match="imo compares spectra with others, and the store has no other to use"):
        Baselines.of(store, usable[:1], 0, [asking])


def test_a_class_too_rare_for_the_candidates_is_looked_for(
    store: SpectraStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds, usable = store.column("class").astype(str), store.column("status") == 0
    rare = np.flatnonzero((kinds == "QSO") & usable)
    assert 5 < len(rare) < 0.2 * len(kinds)
    monkeypatch.setattr(baselines, "_CANDIDATES", 32)
    asking = Imo(baselines=4, like="class")
    near = Baselines.of(store, rare[:1], 0, [asking]).near(store, rare[:1], asking)[0]
    assert len(near) == 4
    assert set(kinds[near.rows]) == {"QSO"}
    assert rare[0] not in near.rows
    # Where the whole store has too few, others fill up.
    many = ExpectedGradients(baselines=len(rare) + 3, like="class")
    rows = Baselines.of(store, rare[:1], 0, [many]).like(store, rare[:1], many.baselines, "class")[0]
    assert set(rare[1:]) < set(rows)
    assert len(set(rows)) == many.baselines


def test_the_nearest_redshifts_come_first(store: SpectraStore) -> None:
    usable = np.flatnonzero(store.column("status") == 0)
    asking = Imo(baselines=3, like="redshift")
    found = Baselines.of(store, usable[:1], 0, [asking])
    (rows,) = found.like(store, usable[:1], 3, "redshift")
    z = store.column("z")
    far = np.abs(z[usable[1:]] - z[usable[0]])
    np.testing.assert_array_equal(np.sort(np.abs(z[rows] - z[usable[0]])), np.sort(far)[:3])
