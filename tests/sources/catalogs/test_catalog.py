"""Catalogues: the same rows as a plain evaluation in memory, from FITS and from text, in any cut into chunks."""

import gzip
import os
import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st

from distspec.addresses import address_of
from distspec.config import Condition, Wanted
from distspec.errors import ConfigError, SourceError
from distspec.sources.catalogs import rows as catalog_rows
from distspec.sources.catalogs.catalog import Catalog, locate, stamp_of
from distspec.sources.catalogs.rows import Chunk
from distspec.sources.catalogs.selection import passes

ROWS = 700
COLUMNS = ("z", "class", "flags", "snr", "sn_median", "wide")


@pytest.fixture
def table(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A table with what surveys do: missing values of each kind, padded text, bits, arrays, and huge identifiers."""
    ids = 2**60 + rng.permutation(ROWS)
    snr = rng.integers(0, 40, ROWS).astype(np.float32)
    snr[rng.random(ROWS) < 0.1] = np.nan
    return {
        "TARGETID": ids,
        "PLATE": rng.integers(266, 12000, ROWS),
        "MJD": rng.integers(51000, 60000, ROWS).astype(np.int32),
        "FIBERID": rng.integers(1, 1001, ROWS).astype(np.int16),
        "Z": np.where(rng.random(ROWS) < 0.05, np.nan, rng.normal(0.5, 0.3, ROWS)),
        "CLASS": rng.choice(["GALAXY", "QSO", "STAR  ", ""], ROWS),
        "FLAGS": rng.choice([0, 1, 4, 5, -99, 1 << 30], ROWS).astype(np.int32),
        "SNR": snr,
        "SN_MEDIAN": rng.normal(size=(ROWS, 5)).astype(np.float32),
        "WIDE": rng.integers(-(2**62), 2**62, ROWS),
        "PRIMARY": rng.random(ROWS) < 0.5,
    }


def write(path: Path, table: dict[str, Any], checksum: bool = False) -> Path:
    formats = {"i8": "K", "i4": "J", "i2": "I", "f8": "D", "f4": "E", "b1": "L"}
    columns = []
    for name, values in table.items():
        code = "12A" if values.dtype.kind == "U" else formats[values.dtype.str[1:]]
        code = f"{values.shape[1]}{code}" if values.ndim > 1 else code
        columns.append(fits.Column(name, code, array=values, null=-99 if name == "FLAGS" else None))
    unit = fits.BinTableHDU.from_columns(columns, name="SPECOBJ")
    fits.HDUList([fits.PrimaryHDU(), unit]).writeto(path, checksum=checksum)
    return path


def write_text(path: Path, table: dict[str, Any], separator: str = "|") -> Path:
    names = [name for name in table if table[name].ndim == 1]
    lines = [separator.join(name.lower() for name in names)]
    for row in range(len(table[names[0]])):
        words = []
        for name in names:
            value = table[name][row]
            missing = value == -99 if name == "FLAGS" else isinstance(value, np.floating) and np.isnan(value)
            words.append("" if missing else f"{int(value)}" if isinstance(value, np.bool_) else f"{value}")
        lines.append(separator.join(words))
    text = "\n".join(lines).encode() + b"\n"
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def plain(table: dict[str, Any], wanted: Wanted) -> np.ndarray:
    """Evaluate the conditions row by row with Python's own numbers: the rows, in the order of the file."""
    taken = []
    for row in range(len(table["TARGETID"])):
        if all(_holds(table[c.column.upper()][row].item(), c) for c in wanted.where):
            taken.append(row)
    if wanted.highest is not None and wanted.limit is not None:
        rank = table[wanted.highest.upper()]
        taken = [row for row in taken if not np.isnan(rank[row])]
        taken.sort(key=lambda row: (-float(rank[row]), int(table["TARGETID"][row])))
        taken = taken[: wanted.limit]
    return np.array(sorted(taken, key=lambda row: int(table["TARGETID"][row])), np.int64)


def _holds(value: Any, condition: Condition) -> bool:
    if (isinstance(value, float) and np.isnan(value)) or value == -99:
        return False
    if isinstance(value, str):
        value = value.strip()
    return all(
        [
            condition.min is None or value >= condition.min,
            condition.max is None or value <= condition.max,
            condition.above is None or value > condition.above,
            condition.below is None or value < condition.below,
            condition.one_of is None or value in [v.strip() if isinstance(v, str) else v for v in condition.one_of],
            condition.any_bits is None or any(value >> bit & 1 for bit in condition.any_bits),
            condition.no_bits is None or not any(value >> bit & 1 for bit in condition.no_bits),
        ]
    )


CASES = {
    "nothing": Wanted(),
    "range": Wanted(where=(Condition(column="Z", min=0.1, below=0.9),)),
    "strict": Wanted(where=(Condition(column="snr", above=20.0, max=30.0),)),
    "text": Wanted(where=(Condition(column="Class", one_of=("GALAXY ", "STAR")),)),
    "empty text": Wanted(where=(Condition(column="CLASS", one_of=("",)),)),
    "integers": Wanted(where=(Condition(column="FLAGS", one_of=(0, 5)),)),
    "any bits": Wanted(where=(Condition(column="FLAGS", any_bits=(0, 30)),)),
    "no bits": Wanted(where=(Condition(column="FLAGS", no_bits=(2, 40)),)),
    "not missing": Wanted(where=(Condition(column="FLAGS"),)),
    "several": Wanted(where=(Condition(column="Z", above=0.0), Condition(column="FLAGS", no_bits=(0,)))),
    "highest": Wanted(highest="SNR", limit=37),
    "more than there are": Wanted(highest="SNR", limit=ROWS * 2),
    "highest of some": Wanted(where=(Condition(column="CLASS", one_of=("QSO",)),), highest="SNR", limit=20),
    "none": Wanted(where=(Condition(column="Z", min=99.0),)),
    "true": Wanted(where=(Condition(column="PRIMARY", one_of=(1,)),)),
}


@pytest.mark.parametrize("kind", ["fits", "fits.gz", "csv", "csv.gz", "comma.csv"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [100, 1 << 25])
def test_the_same_rows_as_a_plain_evaluation(
    tmp_path: Path, table: dict[str, Any], case: str, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_rows, "CHUNK_BYTES", chunk * 100)
    path = tmp_path / f"cat.{kind}"
    if "csv" in kind:
        write_text(path, table, "," if "comma" in kind else "|")
    else:
        write(tmp_path / "cat.fits", table, checksum=True)
        if kind.endswith("gz"):
            path.write_bytes(gzip.compress((tmp_path / "cat.fits").read_bytes()))
    wanted = CASES[case]
    columns = tuple(name for name in COLUMNS if "csv" not in kind or name != "sn_median")
    catalog = Catalog.build(str(path), ("targetid",), (*columns, "unknown"), wanted, tmp_path / "scratch")
    expected = plain(table, wanted)
    assert len(catalog) == len(expected)
    assert catalog.columns == columns
    np.testing.assert_array_equal(catalog.key("targetid"), table["TARGETID"][expected])
    everything = np.arange(len(catalog))
    for name in columns:
        values = table[name.upper()][expected]
        values = np.char.strip(values) if values.dtype.kind == "U" else values
        found = catalog.values(name, everything)
        if name == "flags" and "csv" in kind:
            values = np.where(values == -99, np.nan, values)
        elif len(expected):
            assert found.dtype.kind == values.dtype.kind
        np.testing.assert_array_equal(found, values)
    found, where = catalog.find(table["TARGETID"])
    np.testing.assert_array_equal(np.flatnonzero(found), np.sort(expected))
    np.testing.assert_array_equal(catalog.key("targetid")[where[found]], table["TARGETID"][found])
    assert not catalog.find(np.array([0, -1, 2**62]))[0].any()


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20),
    limit=st.floats(-1e19, 1e19),
    bits=st.sets(st.integers(0, 63), min_size=1, max_size=3),
)
def test_conditions_on_any_integers(values: list[int], limit: float, bits: set[int]) -> None:
    column = np.array(values, np.int64)
    chunk = Chunk({"x": column}, {"x": np.zeros(len(column), bool)})

    def holds(**what: Any) -> list[bool]:
        return passes(Condition(column="X", **what), chunk, "here").tolist()

    assert holds(min=limit) == [value >= limit for value in values]
    assert holds(max=limit) == [value <= limit for value in values]
    assert holds(above=limit) == [value > limit for value in values]
    assert holds(below=limit) == [value < limit for value in values]
    some = [any((value % 2**64) >> bit & 1 for bit in bits) for value in values]
    assert holds(any_bits=tuple(bits)) == some
    assert holds(no_bits=tuple(bits)) == [not value for value in some]
    assert holds(one_of=(values[0],)) == [value == values[0] for value in values]


def test_the_sign_of_a_short_integer_is_no_high_bit() -> None:
    chunk = Chunk({"x": np.array([-1], np.int16)}, {"x": np.zeros(1, bool)})
    assert passes(Condition(column="x", any_bits=(15,)), chunk, "").tolist() == [True]
    assert passes(Condition(column="x", any_bits=(16, 63)), chunk, "").tolist() == [False]


@settings(max_examples=30, deadline=None)
@given(
    keys=st.lists(
        st.tuples(st.integers(0, 2**21 - 1), st.integers(0, 2**21 - 1), st.integers(0, 2**21 - 1)), max_size=30
    ),
    asked=st.lists(st.tuples(*[st.integers(-5, 2**22)] * 3), min_size=1, max_size=30),
)
def test_keys_of_three_numbers(
    keys: list[tuple[int, int, int]], asked: list[tuple[int, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    columns = np.array(keys, np.int64).reshape(-1, 3)
    table = {name: columns[:, i] for i, name in enumerate(("PLATE", "MJD", "FIBERID"))} | {"N": np.arange(len(keys))}
    path = write(folder / "cat.fits", table)
    catalog = Catalog.build(str(path), ("plate", "mjd", "fiberid"), ("n",), Wanted(), folder)
    ordered = sorted(keys)
    for i, name in enumerate(("plate", "mjd", "fiberid")):
        assert catalog.key(name).tolist() == [key[i] for key in ordered]
    questions = np.array(asked + keys, np.int64).reshape(-1, 3)
    found, where = catalog.find(*questions.T)
    start, stop = catalog.span(*questions.T)
    for i, question in enumerate(map(tuple, questions.tolist())):
        assert found[i] == (question in keys)
        assert stop[i] - start[i] == keys.count(question)
        if found[i]:
            assert ordered[where[i]] == question
            rows = catalog.values("n", np.arange(start[i], stop[i]))
            assert rows.tolist() == [row for row, key in enumerate(keys) if key == question]


def test_ties_go_to_the_smaller_key(tmp_path: Path) -> None:
    table = {"TARGETID": np.array([9, 3, 7, 1, 5]), "SNR": np.array([2.0, 2.0, 2.0, 1.0, 3.0])}
    path = write(tmp_path / "cat.fits", table)
    catalog = Catalog.build(str(path), ("targetid",), ("snr",), Wanted(highest="SNR", limit=3), tmp_path)
    assert catalog.key("targetid").tolist() == [3, 5, 7]
    assert catalog.values("snr", np.arange(3)).tolist() == [2.0, 3.0, 2.0]


def test_unsigned_and_scaled_columns_and_their_nulls(tmp_path: Path) -> None:
    columns = [
        fits.Column("ID", "K", array=np.array([1, 2, 3])),
        fits.Column("FLUX", "I", array=np.array([0, -9, 2], np.int16)),
        fits.Column("COUNT", "J", bzero=2**31, array=np.array([0, 2**32 - 1, 7], np.uint32)),
    ]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "cat.fits")
    for key, value in (("TSCAL2", 0.5), ("TZERO2", 10.0), ("TNULL2", -9)):
        fits.setval(tmp_path / "cat.fits", key, value=value, ext=1)
    for what, expected in ({"column": "FLUX"}, [1, 3]), ({"column": "COUNT", "min": 5.0}, [2, 3]):
        wanted = Wanted(where=(Condition(**what),))
        catalog = Catalog.build(str(tmp_path / "cat.fits"), ("id",), ("flux", "count"), wanted, tmp_path)
        assert catalog.key("id").tolist() == expected
    assert catalog.values("count", np.array([0])).tolist() == [2**32 - 1]
    np.testing.assert_array_equal(catalog.values("flux", np.arange(2)), [np.nan, 11.0])


def test_text_becomes_numbers_only_where_nothing_is_lost(tmp_path: Path) -> None:
    lines = ["obsid,whole,gaps,long,real,word,mixed", f"3,1,,{2**60 + 1},1.5,a,1", "1,2,7,,nan,,x", '2,3,8,5,2,"b,c",2']
    (tmp_path / "cat.csv").write_text("\n".join(lines))
    names = ("whole", "gaps", "long", "real", "word", "mixed")
    catalog = Catalog.build(str(tmp_path / "cat.csv"), ("obsid",), names, Wanted(), tmp_path)
    values = {name: catalog.values(name, np.arange(3)) for name in names}
    assert values["whole"].tolist() == [2, 3, 1]
    np.testing.assert_array_equal(values["gaps"], [7.0, 8.0, np.nan])
    assert values["long"].tolist() == ["", "5", str(2**60 + 1)]
    np.testing.assert_array_equal(values["real"], [np.nan, 2.0, 1.5])
    assert values["word"].tolist() == ["", "b,c", "a"]
    assert values["mixed"].tolist() == ["x", "2", "1"]


def test_it_is_distilled_once_and_mapped(tmp_path: Path, table: dict[str, Any]) -> None:
    path = write(tmp_path / "cat.fits", table)
    first = Catalog.build(str(path), ("targetid",), ("z",), Wanted(), tmp_path)
    before = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    second = Catalog.build(str(path), ("targetid",), ("z",), Wanted(), tmp_path)
    assert second == first
    assert {file: file.stat().st_mtime_ns for file in first.folder.iterdir()} == before
    assert isinstance(second._packed, np.memmap)
    assert {f.name for f in first.folder.iterdir()} == {"catalog.json", "keys.npy", "0.npy"}
    assert [f.name for f in first.folder.parent.iterdir()] == [first.folder.name]
    again = pickle.loads(pickle.dumps(second))
    assert len(pickle.dumps(second)) < 1000
    np.testing.assert_array_equal(again.values("z", np.arange(5)), first.values("z", np.arange(5)))
    os.utime(path, (1, 1))
    assert Catalog.build(str(path), ("targetid",), ("z",), Wanted(), tmp_path).folder != first.folder


def test_two_at_once(tmp_path: Path, table: dict[str, Any]) -> None:
    path = str(write(tmp_path / "cat.fits", table))
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda _: Catalog.build(path, ("targetid",), ("z",), Wanted(), tmp_path), range(6)))
    assert len({catalog.folder for catalog in made}) == 1
    assert len(list((tmp_path / "catalogs").iterdir())) == 1
    assert len(made[0]) == ROWS


def test_what_is_distilled_lies_in_a_bucket_and_each_machine_takes_a_copy(
    bucket: str, tmp_path: Path, table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "cat.fits", table)
    place = address_of(f"{bucket}/{tmp_path.name}")
    found = []
    for machine in ("one", "other"):
        (tmp_path / machine).mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / machine))
        catalog = Catalog.build(str(path), ("targetid",), ("z",), Wanted(), place)
        assert tmp_path / machine in catalog.folder.parents
        found.append(catalog)
        # The second one finds it made.
        monkeypatch.setattr("distspec.sources.catalogs.catalog._distil", None)
    one, other = found
    np.testing.assert_array_equal(one.key("targetid"), other.key("targetid"))
    (kept,) = (place / "catalogs").iterdir()
    assert sorted(file.name for file in kept.iterdir()) == sorted(file.name for file in one.folder.iterdir())


def test_a_catalog_in_a_bucket(tmp_path: Path, table: dict[str, Any]) -> None:
    data = write(tmp_path / "cat.fits", table).read_bytes()
    fsspec.filesystem("memory").pipe("/bucket/cat.fits", data)
    assert locate("memory://bucket/cat.fits", "nowhere") == "memory://bucket/cat.fits"
    catalog = Catalog.build("memory://bucket/cat.fits", ("targetid",), ("z",), Wanted(), tmp_path)
    assert len(catalog) == ROWS


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(where=(Condition(column="SNRR", min=1.0),)), "no column 'SNRR' for a condition; there are SNR"),
        (Wanted(highest="SN_MEDIAN_ALL", limit=3), "there are .*SN_MEDIAN"),
        (Wanted(where=(Condition(column="CLASS", min=1.0),)), "CLASS holds text; expected one of numbers"),
        (Wanted(where=(Condition(column="Z", any_bits=(1,)),)), "Z holds numbers; expected one of integers"),
        (Wanted(where=(Condition(column="SN_MEDIAN", min=1.0),)), "expected one of numbers a row"),
        (Wanted(where=(Condition(column="Z", one_of=("a",)),)), "expected numbers in one_of"),
        (Wanted(highest="CLASS", limit=3), "highest: column CLASS holds text"),
    ],
)
def test_conditions_that_do_not_suit(tmp_path: Path, table: dict[str, Any], wanted: Wanted, message: str) -> None:
    path = write(tmp_path / "cat.fits", table)
    with pytest.raises(ConfigError, match=message) as caught:
        Catalog.build(str(path), ("targetid",), (), wanted, tmp_path / "scratch")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "scratch" / "catalogs").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("obsid|z\n1.0|2\n", "OBSID holds numbers; expected one integer"),
        ("obsid|z\nabc|2\n", "OBSID holds text; expected one integer"),
        ("id|z\n1|2\n", "no column OBSID"),
        ("obsid|z\n1|2|3\n", "cannot be read"),
        ("", "no column OBSID"),
        (b"obsid|z\n1|\xff\n", "cannot be read"),
        (b"\x1f\x8bjunk", "gzip data damaged"),
    ],
)
def test_damaged_text(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "cat.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SourceError, match=message) as caught:
        Catalog.build(str(path), ("obsid",), ("z",), Wanted(), tmp_path)
    assert "cat.csv" in str(caught.value)


def test_damaged_tables(tmp_path: Path, table: dict[str, Any]) -> None:
    content = write(tmp_path / "cat.fits", table, checksum=True).read_bytes()

    def build(data: bytes, keys: tuple[str, ...] = ("targetid",)) -> Catalog:
        (tmp_path / "bad.fits").write_bytes(data)
        return Catalog.build(str(tmp_path / "bad.fits"), keys, ("z",), Wanted(), tmp_path)

    with pytest.raises(SourceError, match="truncated"):
        build(content[:-3000])
    middle = len(content) // 2
    with pytest.raises(SourceError, match="expected DATASUM"):
        build(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(SourceError, match="a web page"):
        build(b"<html></html>")
    with pytest.raises(SourceError, match="expected a table with OBSID"):
        build(content, ("obsid",))
    with pytest.raises(SourceError, match="Z holds numbers; expected one integer"):
        build(content, ("z",))
    with pytest.raises(SourceError, match="expected numbers from 0 to 2097151"):
        build(content, ("targetid", "mjd", "fiberid"))
    with pytest.raises(SourceError, match="No such file"):
        Catalog.build(str(tmp_path / "gone.fits"), ("z",), (), Wanted(), tmp_path)


def test_a_damaged_distillate_is_named(tmp_path: Path, table: dict[str, Any]) -> None:
    path = write(tmp_path / "cat.fits", table)
    catalog = Catalog.build(str(path), ("targetid",), ("z",), Wanted(), tmp_path)
    (catalog.folder / "0.npy").write_bytes(b"")
    with pytest.raises(SourceError, match="remove the folder"):
        catalog.values("z", np.array([0]))


def test_a_catalog_may_lie_beside_the_spectra_in_a_bucket(bucket: str, tmp_path: Path, table: dict[str, Any]) -> None:
    root = f"{bucket}/{tmp_path.name}/spectra"
    file = address_of(f"{root}/cat.fits")
    assert not isinstance(file, Path)
    file.upload(write(tmp_path / "cat.fits", table))
    assert locate("cat.fits", root) == f"{root}/cat.fits"
    before = stamp_of(f"{root}/cat.fits")
    assert len(Catalog.build(f"{root}/cat.fits", ("targetid",), ("z",), Wanted(), tmp_path)) == ROWS
    with pytest.raises(SourceError, match=r"no catalog file 'gone\.fits'"):
        locate("gone.fits", root)
    file.write_bytes(b"another")
    assert stamp_of(f"{root}/cat.fits") != before


def test_where_a_catalog_lies(tmp_path: Path) -> None:
    Table({"a": [1]}).write(tmp_path / "cat.fits")
    assert locate("cat.fits", str(tmp_path)) == str(tmp_path / "cat.fits")
    assert locate(str(tmp_path / "cat.fits"), "elsewhere") == str(tmp_path / "cat.fits")
    with pytest.raises(SourceError, match=r"no catalog file 'gone\.fits'"):
        locate("gone.fits", str(tmp_path))
