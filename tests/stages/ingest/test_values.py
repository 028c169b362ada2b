import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.table import Column, MaskedColumn, Table

from distspec.addresses import address_of
from distspec.config import Values
from distspec.errors import ConfigError, DistspecWarning, SourceError
from distspec.stages.ingest import values
from distspec.stages.ingest.values import Spread, join_values, require_values
from distspec.store import SpectraStore
from distspec.store.table import table_layers
from tests.conftest import make_spectra
from tests.support.catalogues import GRID, NUMBERS, catalogue, grow, make_catalogue


@pytest.fixture
def store(tmp_path: Path) -> SpectraStore:
    return make_catalogue(tmp_path / "s.zarr")


@pytest.fixture
def texts(tmp_path: Path) -> SpectraStore:
    return make_catalogue(tmp_path / "t.zarr", text=True)


def value_table(ids: Any) -> Table:
    """A table in another order than the store, with a stranger, and every kind of column."""
    order = np.random.default_rng(3).permutation(len(ids))
    count = len(ids)
    lines = np.arange(count)
    return Table(
        {
            "TARGETID": ids,
            "HALPHA": Column(lines * 1.5, unit="1e-17 erg / (s cm2)", description="Flux of Hα"),
            "BIG": MaskedColumn(2**60 + 1 + lines, mask=lines % 4 == 1),
            "SMALL": np.asarray(lines, np.int16),
            "GOOD": lines % 2 == 0,
            "KIND": np.array([f"<i>{n}</i>" for n in lines]),
            "VEC": np.stack([lines, lines * 2.0], 1).astype(np.float32),
        }
    )[order]


def write(table: Table, path: Path) -> str:
    kind = {".parquet": "parquet", ".fits": "fits", ".vot": "votable", ".ecsv": "ascii.ecsv"}[path.suffix]
    if kind == "votable":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deprecated in the VOUnit")
            table.write(path, format=kind, tabledata_format="binary2")
    elif kind == "ascii.ecsv":
        table.write(path, format=kind)
    elif kind == "parquet":
        columns = {
            name: pa.array(list(table[name]))
            if table[name].ndim > 1
            else pa.array(
                np.asarray(table[name]), mask=np.asarray(getattr(table[name], "mask", np.zeros(len(table), bool)))
            )
            for name in table.colnames
        }
        result = pa.table(columns)
        unit = result.schema.field("HALPHA").with_metadata({"unit": "1e-17 erg / (s cm2)"})
        pq.write_table(result.cast(result.schema.set(result.schema.get_field_index("HALPHA"), unit)), path)
    else:
        table.write(path, format=kind)
    return str(path)


@pytest.mark.parametrize(
    "suffix",
    [".parquet", ".fits", pytest.param(".vot", marks=pytest.mark.slow), pytest.param(".ecsv", marks=pytest.mark.slow)],
)
def test_every_format_is_joined_exactly(store: SpectraStore, tmp_path: Path, suffix: str) -> None:
    ids = store.column("id")
    known = np.flatnonzero(np.arange(40) % 3 != 0)
    path = write(value_table(np.append(ids[known], 12345)), tmp_path / f"v{suffix}")
    join_values((Values(path=path, id="TARGETID", prefix="vac_"),), store)
    arrow, table = store.arrow(), store.table()
    where = {int(row): place for place, row in enumerate(known)}
    places = [where.get(row) for row in range(40)]
    assert arrow["vac_matched"].to_pylist() == [place is not None for place in places]
    assert arrow["vac_HALPHA"].to_pylist() == [None if place is None else place * 1.5 for place in places]
    assert arrow["vac_BIG"].to_pylist() == [
        None if place is None or place % 4 == 1 else 2**60 + 1 + place for place in places
    ]
    assert arrow["vac_SMALL"].to_pylist() == places
    assert arrow["vac_GOOD"].to_pylist() == [None if place is None else place % 2 == 0 for place in places]
    assert arrow["vac_KIND"].to_pylist() == [None if place is None else f"<i>{place}</i>" for place in places]
    assert [[str(value) for value in pair] for pair in arrow["vac_VEC"].to_pylist()] == [
        ["nan", "nan"] if place is None else [str(1.0 * place), str(2.0 * place)] for place in places
    ]
    assert table["vac_HALPHA"].unit == u.Unit("1e-17 erg / (s cm2)")
    assert table["vac_BIG"].dtype == np.int64
    assert table["vac_BIG"].mask.tolist() == [place is None or place % 4 == 1 for place in places]
    assert table["vac_SMALL"].dtype.kind == "i"


@pytest.mark.parametrize("form", ["text", "integers"])
@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_workers_join_what_this_process_joins(
    bucket: str, tmp_path: Path, form: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "out" if place == "folder" else address_of(f"{bucket}/{tmp_path.name}")
    one, other = (make_catalogue(tmp_path / f"{name}.zarr", text=form == "text") for name in ("one", "other"))
    table = (Values(path=write(value_table(one.column("id")), tmp_path / "v.parquet"), id="TARGETID"),)
    join_values(table, one)
    monkeypatch.setattr(values, "_FEW", 1)
    seen = []

    def each(factory: Any, arguments: tuple[Any, ...], items: Any) -> Iterator[Any]:
        # As they travel to workers.
        work = factory(*cloudpickle.loads(cloudpickle.dumps(arguments)))
        for item in items:
            seen.append(item)
            yield work(item)

    join_values(table, other, Spread(each, scratch))
    assert seen == list(range(other.shards))
    assert other.shards > 1
    (name,) = one.layers()
    for field in one.layer(name).fields:
        np.testing.assert_array_equal(one.layer(name).read(field), other.layer(name).read(field))
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("form", ["text", "integers"])
def test_csv_ids_are_text_and_then_exact(store: SpectraStore, texts: SpectraStore, tmp_path: Path, form: str) -> None:
    chosen = store if form == "integers" else texts
    ids = chosen.column("id")
    lines = ["object,flag,other"]
    for row, value in enumerate(ids):
        quoted = '"' + str(value).replace('"', '""') + '"'
        lines.append(f"{quoted},{row if row % 5 else ''},1199876543210987{row:04d}")
    (tmp_path / "v.csv").write_text("\n".join(lines) + "\n", "utf-8")
    join_values((Values(path=str(tmp_path / "v.csv"), id="object"),), chosen)
    arrow = chosen.arrow()
    assert arrow["matched"].to_pylist() == [True] * 40
    assert arrow["flag"].to_pylist() == [row if row % 5 else None for row in range(40)]
    # Beyond 64 bits it stays what was written.
    assert arrow["other"].to_pylist()[7] == "11998765432109870007"


def test_long_unsigned_ids_match_a_store_of_text(texts: SpectraStore, tmp_path: Path) -> None:
    ids = np.array([11998765432109876543, 7, 2**64 - 1], np.uint64)
    Table({"SPECOBJID": ids, "MASS": [1.0, 2.0, 3.0]}).write(tmp_path / "v.fits")
    join_values((Values(path=str(tmp_path / "v.fits"), id="SPECOBJID"),), texts)
    # "007" is not 7: text is compared as text.
    assert texts.arrow(columns=["MASS"])["MASS"].to_pylist()[:7] == [1.0, None, None, None, None, None, None]


def test_text_ids_of_numbers_match_a_store_of_numbers(store: SpectraStore, tmp_path: Path) -> None:
    ids = [f" {value} " for value in NUMBERS] + ["18446744073709551615", "", "+1152921504606846983"]
    pq.write_table(pa.table({"id": ids, "v": list(range(len(ids)))}), tmp_path / "v.parquet")
    join_values((Values(path=str(tmp_path / "v.parquet")),), store)
    assert store.arrow(columns=["v"])["v"].to_pylist()[:8] == [0, 1, 2, 3, 4, 5, 8, None]


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        (pa.array([1.0, 2.0]), SourceError, "is double, which cannot hold ids exactly"),
        (pa.array(["9.0e15", "1"]), SourceError, "holds '9.0e15'; expected integers"),
        (pa.array([7, 7]), SourceError, r"1 rows repeat an id of id \(7\)"),
        (pa.array([8, 9]), SourceError, r"no id of id \(8, 9\) is in the store \(\d+"),
    ],
)
def test_ids_that_cannot_be_right_are_refused(
    store: SpectraStore, tmp_path: Path, ids: pa.Array, error: type[Exception], says: str
) -> None:
    pq.write_table(pa.table({"id": ids, "v": [1, 2]}), tmp_path / "v.parquet")
    with pytest.raises(error, match=says):
        join_values((Values(path=str(tmp_path / "v.parquet")),), store)
    assert store.layers() == []


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"z": [1.0, 2.0]}, "the name 'z' is taken already; set ingest.values.prefix"),
        ({"row": [1, 2]}, "'row' is taken"),
        ({"matched": [1, 2]}, "'matched' is taken"),
        ({"v": [[1], [1, 2]]}, "lists of different lengths"),
        ({"v": [{"a": 1}, {"a": 2}]}, "expected numbers, text"),
    ],
)
def test_columns_that_cannot_be_kept_are_refused(
    store: SpectraStore, tmp_path: Path, columns: dict[str, Any], says: str
) -> None:
    pq.write_table(pa.table({"id": NUMBERS[:2], **columns}), tmp_path / "v.parquet")
    with pytest.raises((ConfigError, SourceError), match=says):
        join_values((Values(path=str(tmp_path / "v.parquet")),), store)


def test_names_that_are_paths_stay_names(store: SpectraStore, tmp_path: Path) -> None:
    names = ["[Fe/H]", "../../up", "__hidden", ".dot", "ε Å", "a b"]
    pq.write_table(pa.table({"id": NUMBERS, **{name: [1.0] * 6 for name in names}}), tmp_path / "v.parquet")
    before = set(os.listdir(tmp_path))
    join_values((Values(path=str(tmp_path / "v.parquet")),), store)
    assert set(os.listdir(tmp_path)) == before
    assert store.arrow(columns=names)["../../up"].to_pylist()[:6] == [1.0] * 6
    assert SpectraStore.open(store.path).arrow(columns=["[Fe/H]"])["[Fe/H]"].null_count == 34


def test_only_the_columns_that_are_named_are_taken(store: SpectraStore, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": NUMBERS, "a": [1] * 6, "z": [1] * 6, "l": [[1], []] * 3}), tmp_path / "v.parquet")
    join_values((Values(path=str(tmp_path / "v.parquet"), columns=("a",)),), store)
    assert store.arrow().column_names[-2:] == ["matched", "a"]
    with pytest.raises(ConfigError, match="no column 'aa'; did you mean 'a'"):
        join_values((Values(path=str(tmp_path / "v.parquet"), columns=("aa",)),), store)
    with pytest.raises(ConfigError, match="no column 'SPECOBJ'; it has id, a, z, l"):
        join_values((Values(path=str(tmp_path / "v.parquet"), id="SPECOBJ"),), store)


def test_joined_once_and_anew_when_the_table_changes(store: SpectraStore, tmp_path: Path) -> None:
    path = tmp_path / "v.parquet"
    pq.write_table(pa.table({"id": NUMBERS, "v": [1] * 6}), path)
    settings = (Values(path=str(path)),)
    join_values(settings, store)
    marks = {file: file.stat().st_mtime_ns for file in Path(store.path).rglob("*") if file.is_file()}
    join_values(settings, store)
    assert {file: file.stat().st_mtime_ns for file in Path(store.path).rglob("*") if file.is_file()} == marks
    time.sleep(0.01)
    pq.write_table(pa.table({"id": NUMBERS, "v": [2] * 6}), path)
    join_values(settings, store)
    assert len(store.layers()) == 2
    assert len(table_layers(store)) == 1
    assert store.arrow(columns=["v"])["v"].to_pylist()[:6] == [2] * 6
    path.unlink()
    with pytest.warns(DistspecWarning, match="used as they are"):
        join_values(settings, store)
    with pytest.raises(SourceError, match="no file"):
        join_values((Values(path=str(path), prefix="x"),), store)


def test_a_store_that_has_grown_is_joined_where_it_has_grown(tmp_path: Path) -> None:
    store = make_catalogue(tmp_path / "s.zarr", parts=1)
    told = catalogue(60, text=False)
    pq.write_table(pa.table({"id": told["id"], "v": np.arange(60)}), tmp_path / "v.parquet")
    settings = (Values(path=str(tmp_path / "v.parquet")),)
    join_values(settings, store)
    grow(store, make_spectra(np.random.default_rng(1), GRID, 60), told)
    assert store.arrow(columns=["v"])["v"].null_count == 20
    join_values(settings, store)
    assert store.arrow(columns=["v"])["v"].to_pylist() == list(range(60))
    assert len(store.layers()) == 1


def test_a_join_that_was_killed_goes_on(store: SpectraStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distspec.store import Layer

    pq.write_table(pa.table({"id": store.column("id"), "v": np.arange(40)}), tmp_path / "v.parquet")
    settings = (Values(path=str(tmp_path / "v.parquet")),)
    real = Layer.write

    def dies(self: Layer, shard: int, values: Any) -> None:
        if shard == 2:
            raise KeyboardInterrupt
        real(self, shard, values)

    monkeypatch.setattr(Layer, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        join_values(settings, store)
    monkeypatch.undo()
    join_values(settings, store)
    assert store.arrow(columns=["v"])["v"].to_pylist() == list(range(40))


def test_units_scales_and_nulls_of_fits(store: SpectraStore, tmp_path: Path) -> None:
    """T7: big-endian, TNULL, unsigned by TZERO, a logical column, scaled integers."""
    ids = store.column("id")[:4]
    columns = [
        fits.Column("ID", "K", array=ids),
        fits.Column("N", "J", null=-99, array=np.array([1, -99, 3, 4])),
        fits.Column("U", "J", bzero=2**31, array=np.array([2**31 + 5, 1, 2, 3], np.uint32)),
        fits.Column("S", "I", array=np.array([2, 3, 4, 5])),
        fits.Column("L", "L", array=np.array([True, False, True, True])),
        fits.Column("T", "8A", array=np.array([b"x", b"", b"z", b"y"])),
        fits.Column("F", "E", unit="km/s", array=np.array([1, np.nan, 3, 4], np.float32)),
    ]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "v.fits")
    fits.setval(tmp_path / "v.fits", "TSCAL4", value=0.5, ext=1)
    join_values((Values(path=str(tmp_path / "v.fits"), id="ID"),), store)
    found = store.arrow(rows=range(5), layers=table_layers(store)).to_pydict()
    assert found["N"] == [1, None, 3, 4, None]
    assert found["U"] == [2**31 + 5, 1, 2, 3, None]
    assert found["S"] == [1.0, 1.5, 2.0, 2.5, None]
    assert found["L"] == [True, False, True, True, None]
    assert found["T"] == ["x", "", "z", "y", None]
    assert found["F"] == [1.0, None, 3.0, 4.0, None]
    assert store.table()["F"].unit == u.km / u.s


def test_a_table_that_is_cut_short_or_no_table_is_refused(store: SpectraStore, tmp_path: Path) -> None:
    Table({"id": store.column("id"), "v": np.arange(40.0)}).write(tmp_path / "v.fits")
    whole = (tmp_path / "v.fits").read_bytes()
    (tmp_path / "cut.fits").write_bytes(whole[: 2 * 2880 + 100])
    (tmp_path / "html.parquet").write_text("<html>")
    (tmp_path / "odd.csv").write_text("id,v\n1,2,3\n")
    for name in ("cut.fits", "html.parquet", "odd.csv"):
        with pytest.raises(SourceError, match=name):
            join_values((Values(path=str(tmp_path / name)),), store)
    with pytest.raises(SourceError, match="tells no format"):
        require_values((Values(path="table.doc"),))
    with pytest.raises(SourceError, match="no file 'nowhere.fits'"):
        require_values((Values(path="nowhere.fits"),))


def test_parquet_that_may_hold_code_is_refused_unopened(store: SpectraStore, tmp_path: Path) -> None:
    field = pa.field("v", pa.int64(), metadata={"ARROW:extension:name": "ray.data.arrow_tensor"})
    schema = pa.schema([pa.field("id", pa.int64()), field])
    pq.write_table(pa.table([pa.array(NUMBERS), pa.array([1] * 6)], schema=schema), tmp_path / "v.parquet")
    with pytest.raises(SourceError, match="extension types"):
        join_values((Values(path=str(tmp_path / "v.parquet")),), store)


def test_missing_is_told_from_zero(store: SpectraStore, tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"id": NUMBERS, "n": [0, None, 3, 4, 5, 6], "b": [None, True, False] * 2}), tmp_path / "v.parquet"
    )
    join_values((Values(path=str(tmp_path / "v.parquet")),), store)
    arrow = store.arrow(rows=range(7))
    assert arrow["n"].to_pylist() == [0, None, 3, 4, 5, 6, None]
    assert arrow["b"].to_pylist() == [None, True, False, None, True, False, None]
    assert pc.sum(store.arrow()["matched"]).as_py() == 6
    layer = store.layer(store.layers()[0])
    assert set(layer.fields) == {"matched", "n", "missing/n", "b", "missing/b"}
