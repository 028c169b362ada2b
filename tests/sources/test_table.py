"""Parquet tables of spectra: layouts that are published, grids recognized, rows set aside, hostile files refused."""

import base64
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from hypothesis import given, settings
from hypothesis import strategies as st

from distspec.config import Table
from distspec.errors import SourceError
from distspec.sources import Piece, Source
from distspec.sources.files.parquet import _EXTENSION_MARKS
from distspec.sources.table import SpectrumTable
from distspec.sources.uniform import uniform_grid
from distspec.spectra import Columns, Spectra, Status, WaveGrid

LINEAR = (3600 + 0.8 * np.arange(200)).astype(np.float32)
LOG = (10 ** (3.58 + 1e-4 * np.arange(300))).astype(np.float32)


def rows(count: int, wave: Any = LINEAR, **changes: Any) -> dict[str, list[Any]]:
    """Columns of a table of spectra; flux counts up from 1 in each."""
    made: dict[str, list[Any]] = {
        "flux": [np.arange(1, len(wave) + 1, dtype=np.float32) + 1000 * row for row in range(count)],
        "ivar": [np.full(len(wave), row + 1, np.float32) for row in range(count)],
        "lambda": [wave] * count,
        "mask": [np.zeros(len(wave), bool)] * count,
        "object_id": [f"39633127718519{row:03d}" for row in range(count)],
        "ra": [10.0 + row for row in range(count)],
        "dec": [-5.0] * count,
        "Z": [0.1 * (row + 1) for row in range(count)],
        "ZWARN": [0] * count,
        "EBV": [0.02] * count,
    }
    return {name: values for name, values in (made | changes).items() if values is not None}


ARRAYS = ("flux", "ivar", "lambda", "mask", "lsf_sigma", "error")


def flat(columns: dict[str, Any]) -> pa.Table:
    return pa.table(columns)


def struct(columns: dict[str, Any]) -> pa.Table:
    """Lay the arrays out as Hugging Face stores the Multimodal Universe, and nested-pandas its frames."""
    inner = {name: pa.array(values) for name, values in columns.items() if name in ARRAYS}
    outer = {name: values for name, values in columns.items() if name not in ARRAYS}
    return pa.table({"spectrum": pa.StructArray.from_arrays(list(inner.values()), list(inner))} | outer)


def listed(columns: dict[str, Any]) -> pa.Table:
    """Lay the arrays out as lists of structs."""
    names = [name for name in columns if name in ARRAYS]
    outer = {name: values for name, values in columns.items() if name not in ARRAYS}
    items = [
        [dict(zip(names, (v.item() for v in values), strict=True)) for values in zip(*row, strict=True)]
        for row in zip(*(columns[name] for name in names), strict=True)
    ]
    return pa.table({"spectrum": items} | outer)


LAYOUTS = {"flat": flat, "struct": struct, "listed": listed}


def write(path: Path, table: Any, group: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = table if isinstance(table, pa.Table) else flat(table)
    pq.write_table(table, path, row_group_size=group, write_page_checksum=True)
    return path


def source(path: Path, **options: Any) -> SpectrumTable:
    return SpectrumTable(Table(path=str(path), **options))


def read(path: Path, **options: Any) -> tuple[Spectra, Columns]:
    table = source(path, **options)
    (entry,) = table.files()
    return table.read(Piece(entry.name, 0, table.count(entry.name)))


# --- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_give_the_same_spectra(tmp_path: Path, layout: str) -> None:
    table = source(write(tmp_path / "a.parquet", LAYOUTS[layout](rows(3))))
    table = pickle.loads(pickle.dumps(table))
    assert isinstance(table, Source)
    (entry,) = table.files()
    assert (entry.name, entry.count, table.count(entry.name), table.missing()) == ("a.parquet", None, 3, [])
    assert table.grid == WaveGrid("linear", 3600.0, 0.8, 200)
    spectra, columns = table.read(Piece("a.parquet", 0, 3))
    np.testing.assert_array_equal(spectra.flux, rows(3)["flux"])
    np.testing.assert_array_equal(spectra.ivar, rows(3)["ivar"])
    assert columns["id"].tolist() == rows(3)["object_id"]
    np.testing.assert_allclose(columns["z"], [0.1, 0.2, 0.3])
    assert columns["ebv"].dtype == np.float32
    kinds = {name: values.dtype.kind for name, values in columns.items()}
    assert kinds == dict.fromkeys(("id", "class", "subclass", "note"), "U") | dict.fromkeys(
        ("ra", "dec", "z", "ebv"), "f"
    ) | dict.fromkeys(("zwarn", "status"), "i")
    assert columns["status"].tolist() == [0, 0, 0]
    assert columns["note"].tolist() == ["", "", ""]


def test_large_and_fixed_lists_and_dictionaries(tmp_path: Path) -> None:
    columns = rows(2)
    columns["flux"] = pa.array(columns["flux"], pa.large_list(pa.float64()))
    columns["ivar"] = pa.array(columns["ivar"], pa.list_(pa.float32(), 200))
    columns["object_id"] = pa.array(columns["object_id"]).dictionary_encode()
    spectra, found = read(write(tmp_path / "a.parquet", columns))
    np.testing.assert_array_equal(spectra.flux, rows(2)["flux"])
    np.testing.assert_array_equal(spectra.ivar, rows(2)["ivar"])
    assert found["id"].tolist() == rows(2)["object_id"]


def test_real_spectra_in_a_multimodal_universe_table(tmp_path: Path, real_data: Path) -> None:
    """The builder of the Multimodal Universe pads with -1 in wavelength, the last flux, zero ivar and a set mask."""
    paths = sorted((real_data / "sdss").glob("spec-0[23]*.fits"))[:6]
    kinds = {"flux": "f4", "ivar": "f4", "and_mask": "i4", "loglam": "f4"}
    raw = []
    for path in paths:
        with fits.open(path) as units:
            table = units[1].data
            raw.append([np.array(table[name]).astype(kind) for name, kind in kinds.items()])
    longest = max(len(parts[0]) for parts in raw)
    assert len({len(parts[0]) for parts in raw}) > 1
    pads = [(0, longest - len(parts[0])) for parts in raw]
    columns = rows(len(paths), np.zeros(1))
    for name in ("flux", "ivar", "lambda", "mask"):
        columns[name] = []
    for (flux, ivar, mask, loglam), pad in zip(raw, pads, strict=True):
        columns["flux"].append(np.pad(flux, pad, mode="edge"))
        columns["ivar"].append(np.pad(ivar, pad))
        columns["lambda"].append(np.pad((10.0**loglam).astype(np.float32), pad, constant_values=-1))
        columns["mask"].append(np.pad((mask != 0) | (ivar <= 1e-6), pad, constant_values=True))
    spectra, found = read(write(tmp_path / "a.parquet", struct(columns)))
    assert (spectra.grid.scale, spectra.grid.step) == ("log", 1e-4)
    assert round(np.log10(spectra.grid.first), 12) == round(np.log10(spectra.grid.first), 4)
    for row, (flux, ivar, mask, loglam) in enumerate(raw):
        good = (mask == 0) & (ivar > 1e-6)
        where = np.rint((loglam.astype(float) - np.log10(spectra.grid.first)) / 1e-4).astype(int)
        np.testing.assert_array_equal(spectra.flux[row, where], flux)
        np.testing.assert_array_equal(spectra.ivar[row, where], np.where(good, ivar, 0))
        assert spectra.good[row].sum() == good.sum()
    dead = [not (parts[1] > 1e-6).any() for parts in raw]
    assert (found["status"] == np.where(dead, int(Status.DEAD), 0)).all()


def test_a_hats_tree_gives_each_object_once(tmp_path: Path) -> None:
    root = tmp_path / "collection"
    (root / "main" / "dataset").mkdir(parents=True)
    leaf = "dataset/Norder=1/Dir=0/Npix={}.parquet"
    write(root / "main" / leaf.format(44), struct(rows(2)))
    write(root / "main" / "dataset/Norder=2/Dir=0/Npix=9/part0.parquet", struct(rows(3)))
    write(root / "main_10arcs" / leaf.format(44), struct(rows(2)))
    for name in ("_metadata", "_common_metadata", "data_thumbnail.parquet"):
        write(root / "main" / "dataset" / name, struct(rows(2)))
    (root / "collection.properties").write_text("obs_collection=main\nhats_primary_table_url=main\n")
    (root / "main" / "hats.properties").write_text("dataproduct_type=object\nhats_nrows=5\n")
    (root / "main_10arcs" / "hats.properties").write_text("#\ndataproduct_type=margin\n")
    (root / "main" / "partition_info.csv").write_text("Norder,Npix\n1,44\n")
    names = [entry.name for entry in source(root).files()]
    assert names == ["main/" + leaf.format(44), "main/dataset/Norder=2/Dir=0/Npix=9/part0.parquet"]
    assert [entry.name for entry in source(root / "main").files()] == [name[5:] for name in names]
    assert [source(root).count(name) for name in names] == [2, 3]


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "_metadata.parquet", rows(1))
    with pytest.raises(SourceError, match="no Parquet data file"):
        source(tmp_path).files()
    with pytest.raises(SourceError, match="no file or folder"):
        source(tmp_path / "nowhere").files()


# --- reading in pieces ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [7, 64, 300, 1000])
def test_any_cut_into_pieces_gives_the_same_rows(tmp_path: Path, group: int, rng: np.random.Generator) -> None:
    path = write(tmp_path / "a.parquet", struct(rows(300, LINEAR[:90])), group)
    whole, columns = read(path)
    table = source(path)
    cuts = [0, *np.sort(rng.choice(np.arange(1, 300), 9, replace=False)).tolist(), 300]
    pieces = [Piece("a.parquet", start, stop) for start, stop in zip(cuts[:-1], cuts[1:], strict=True)]
    for order in (pieces, pieces[::-1], pieces[::2]):
        for piece in order:
            spectra, found = table.read(piece)
            np.testing.assert_array_equal(spectra.rows, np.arange(piece.start, piece.stop))
            np.testing.assert_array_equal(spectra.flux, whole.flux[piece.start : piece.stop])
            assert found["id"].tolist() == columns["id"][piece.start : piece.stop].tolist()


def test_only_the_columns_that_are_needed_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", struct(rows(2) | {"lsf_sigma": [LINEAR] * 2, "image": [b"x" * 99] * 2}))
    table = source(path)
    table.read(Piece("a.parquet", 0, 1))
    assert table._run is not None
    batch = next(table._run.take(1, 2))
    assert batch.schema.names == ["spectrum", "object_id", "ra", "dec", "Z", "ZWARN", "EBV"]
    assert [field.name for field in batch.schema.field("spectrum").type] == ["flux", "ivar", "lambda", "mask"]


def test_more_rows_than_there_are_is_an_error(tmp_path: Path) -> None:
    table = source(write(tmp_path / "a.parquet", rows(3)))
    with pytest.raises(SourceError, match="1 rows from 2 on; expected 2"):
        table.read(Piece("a.parquet", 2, 4))


# --- wavelengths ---------------------------------------------------------------------------------------------------


def test_b6_log_and_linear_grids_are_recognized_from_rounded_wavelengths(tmp_path: Path) -> None:
    assert source(write(tmp_path / "a.parquet", rows(2, LOG))).grid == WaveGrid("log", 10**3.58, 1e-4, 300)
    loglam = np.log10(LOG.astype(float)).astype(np.float32)
    made = rows(2, loglam)
    made["loglam"] = made.pop("lambda")
    assert source(write(tmp_path / "b.parquet", made)).grid == WaveGrid("log", 10**3.58, 1e-4, 300)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["log", "linear"]),
    st.integers(3400, 4200),
    st.integers(1, 30),
    st.integers(30, 4000),
    st.sampled_from([np.float32, np.float64]),
    st.integers(0, 2**32 - 1),
)
def test_b6_any_decimal_grid_is_recognized_with_gaps_and_in_any_order(
    scale: Any, first: int, step: int, pixels: int, kind: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    # The coarsest rounding is a float32's, which must stay a small part of a pixel.
    grid = WaveGrid(scale, 10 ** (first / 1000) if scale == "log" else float(first), step * 1e-5 * 3, pixels)
    if scale == "linear":
        grid = WaveGrid(scale, float(first), step * 0.1, pixels)
    wave = grid.wave.astype(kind).astype(float)
    start = rng.integers(1, pixels - 5)
    gap = np.delete(wave, slice(start, start + rng.integers(1, pixels // 4 + 2)))
    found = uniform_grid(gap if len(gap) > 20 else wave)
    if found is None:
        # So short a range that the other scale fits as well, within the rounding of a pixel.
        assert pixels * (wave[-1] / wave[0] - 1) < 2
        return
    assert (found.scale, found.step) == (grid.scale, pytest.approx(grid.step, rel=2e-5))
    position = found.position(grid.wave)
    np.testing.assert_allclose(position, np.rint(position), atol=0.01)
    shuffled = uniform_grid(rng.permutation(gap if len(gap) > 20 else wave))
    assert shuffled == found


def test_b6_reversed_unsorted_padded_and_gappy_spectra_are_placed_by_wavelength(tmp_path: Path) -> None:
    columns = rows(5)
    order = np.random.default_rng(1).permutation(200)
    keep = np.r_[0:50, 90:200]
    for row, index in ((1, np.arange(200)[::-1]), (2, order), (3, keep)):
        for name in ("flux", "ivar", "lambda", "mask"):
            columns[name][row] = columns[name][row][index]
    columns["lambda"][4] = np.where(np.arange(200) < 190, LINEAR, -1)
    columns["ivar"][4] = np.where(np.arange(200) < 190, columns["ivar"][4], 0)
    spectra, found = read(write(tmp_path / "a.parquet", columns))
    assert (found["status"] == 0).all()
    expected = np.array(rows(5)["flux"])
    np.testing.assert_array_equal(spectra.flux[:3], expected[:3])
    np.testing.assert_array_equal(spectra.flux[3, keep], expected[3, keep])
    np.testing.assert_array_equal(np.flatnonzero(~spectra.good[3]), np.arange(50, 90))
    np.testing.assert_array_equal(np.flatnonzero(spectra.good[4]), np.arange(190))


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (LINEAR + 0.3, "off the pixel centers"),
        (LINEAR + 16, "good pixels outside"),
        (np.where(np.arange(200) == 7, np.nan, LINEAR), "without a wavelength"),
        (np.where(np.arange(200) == 7, LINEAR[8], LINEAR), "a repeated wavelength"),
        (LINEAR / 10, "off the pixel centers|outside"),
    ],
)
def test_b6_a_spectrum_off_the_grid_is_set_aside_alone(tmp_path: Path, wave: Any, message: str) -> None:
    columns = rows(3)
    columns["lambda"][1] = wave.astype(np.float32)
    spectra, found = read(write(tmp_path / "a.parquet", columns), last=float(LINEAR[-1]))
    assert found["status"].tolist() == [0, Status.UNREADABLE, 0]
    assert not spectra.ivar[1].any()
    assert spectra.ivar[[0, 2]].all()
    assert found["note"][1].startswith(f"{tmp_path}/a.parquet row 1: ")
    assert re.search(message, found["note"][1])
    assert found["id"][1] == columns["object_id"][1]


def test_the_range_is_that_of_the_first_spectra_or_of_the_settings(tmp_path: Path) -> None:
    columns = rows(2, LOG)
    columns["lambda"][1] = (10 ** (3.57 + 1e-4 * np.arange(300))).astype(np.float32)
    path = write(tmp_path / "a.parquet", columns)
    assert source(path).grid == WaveGrid("log", 10**3.57, 1e-4, 400)
    wide = source(path, first=3650.0, last=4100.0).grid
    assert wide.position(np.array(10**3.57)) == pytest.approx(77, abs=1e-6)
    assert (wide.wave[0], wide.wave[-1]) == (pytest.approx(3650, rel=1e-4), pytest.approx(4100, rel=1e-4))
    with pytest.raises(SourceError, match="expected a range"):
        _ = source(path, first=9000.0).grid


@pytest.mark.parametrize("wave", [np.geomspace(400, 500, 50), np.linspace(1000, 2500, 50), np.linspace(0.4, 0.9, 50)])
def test_b6_an_unclear_unit_is_asked_for(tmp_path: Path, wave: Any) -> None:
    path = write(tmp_path / "a.parquet", rows(2, wave))
    with pytest.raises(SourceError, match=r"unit that is not clear.*source\.wave_unit"):
        source(path).files()
    with pytest.raises(SourceError, match="not clear"):
        made = rows(2, np.log(LOG.astype(float)))
        made["loglam"] = made.pop("lambda")
        source(write(tmp_path / "ln.parquet", made)).files()


def test_b6_stated_units_are_converted(tmp_path: Path) -> None:
    nm = write(tmp_path / "nm.parquet", rows(2, 360 + 0.08 * np.arange(200)))
    assert source(nm, wave_unit="nm").grid == WaveGrid("linear", 3600.0, 0.8, 200)
    micron = write(tmp_path / "um.parquet", rows(2, 1 + 1e-3 * np.arange(200)))
    assert source(micron, wave_unit="micron").grid == WaveGrid("linear", 10000.0, 10.0, 200)
    far = write(tmp_path / "uv.parquet", rows(2, 1200 + 0.5 * np.arange(200)))
    assert source(far, wave_unit="Angstrom").grid == WaveGrid("linear", 1200.0, 0.5, 200)


def test_b6_an_irregular_first_grid_and_air_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="uniform neither"):
        source(write(tmp_path / "a.parquet", rows(2, 3600 + np.linspace(0, 30, 200) ** 2))).files()
    with pytest.raises(SourceError, match="repeat"):
        source(write(tmp_path / "b.parquet", rows(2, np.repeat(LINEAR, 2)))).files()
    made = rows(2)
    made["wave_air"] = made.pop("lambda")
    with pytest.raises(SourceError, match="in air by its name"):
        source(write(tmp_path / "c.parquet", made), wave="wave_air").files()


# --- noise ---------------------------------------------------------------------------------------------------------


def test_b10_errors_become_inverse_variances_only_if_named(tmp_path: Path) -> None:
    error = np.full(200, 0.5, np.float32)
    error[:4] = 0, -1, np.nan, np.inf
    path = write(tmp_path / "a.parquet", rows(2, ivar=None, error=[error] * 2))
    with pytest.raises(SourceError, match=r"no array ivar.*source\.error"):
        source(path).files()
    spectra, _ = read(path, error="error")
    np.testing.assert_array_equal(spectra.ivar[0], np.where(np.arange(200) < 4, 0, 4))


def test_b1_b2_b3_bad_pixels_are_masked(tmp_path: Path) -> None:
    columns = rows(2)
    columns["flux"][0] = np.r_[np.nan, np.inf, np.arange(2, 200)].astype(np.float32)
    columns["ivar"][0] = np.r_[1, 1, 0, -1, np.nan, np.inf, np.full(194, 2)].astype(np.float32)
    columns["mask"][0] = np.arange(200) == 6
    spectra, found = read(write(tmp_path / "a.parquet", columns))
    np.testing.assert_array_equal(np.flatnonzero(spectra.good[0]), np.arange(7, 200))
    assert np.isfinite(spectra.flux).all()
    assert np.isfinite(spectra.ivar).all()
    assert (found["status"] == 0).all()


def test_b3_a_mask_of_bits_is_bad_where_any_is_set(tmp_path: Path) -> None:
    bits = [np.where(np.arange(200) < 3, 1 << 20, 0)] * 2
    spectra, _ = read(write(tmp_path / "a.parquet", rows(2, mask=bits)))
    np.testing.assert_array_equal(np.flatnonzero(~spectra.good[0]), [0, 1, 2])


def test_b2_a_spectrum_without_a_good_pixel_is_dead(tmp_path: Path) -> None:
    columns = rows(3)
    columns["ivar"][1] = np.zeros(200, np.float32)
    assert read(write(tmp_path / "a.parquet", columns))[1]["status"].tolist() == [0, Status.DEAD, 0]


@pytest.mark.parametrize("layout", ["flat", "struct"])
def test_t8_missing_empty_and_unequal_arrays_set_a_row_aside(tmp_path: Path, layout: str) -> None:
    columns = rows(6)
    columns["flux"][1] = None
    columns["flux"][2] = []
    columns["ivar"][3] = np.ones(7, np.float32)
    columns["mask"][4] = None
    spectra, found = read(write(tmp_path / "a.parquet", LAYOUTS[layout](columns)))
    assert found["status"].tolist() == [0, 1, 1, 1, 1, 0]
    reasons = [note.partition(": ")[2] for note in found["note"]]
    assert reasons[1] == reasons[2] == "a spectrum without pixels"
    assert reasons[3] == "200 pixels of flux and 7 of ivar"
    assert reasons[4] == "200 pixels of flux and 0 of mask"
    np.testing.assert_array_equal(spectra.good.any(axis=1), [True, False, False, False, False, True])


def test_a_missing_struct_or_element_is_no_pixel(tmp_path: Path) -> None:
    columns = rows(3)
    columns["flux"][2] = [None, *range(199)]
    table = struct(columns)
    whole = table["spectrum"].combine_chunks()
    fields = [whole.field(name) for name in ("flux", "ivar", "lambda", "mask")]
    holed = pa.StructArray.from_arrays(fields, ["flux", "ivar", "lambda", "mask"], mask=pa.array([False, True, False]))
    spectra, found = read(write(tmp_path / "a.parquet", table.set_column(0, "spectrum", holed)))
    assert found["status"].tolist() == [0, 1, 0]
    assert not spectra.good[2, 0]
    assert spectra.good[2, 1:].all()


def test_t8_one_pixel_of_a_longer_grid(tmp_path: Path) -> None:
    columns = rows(2)
    for name in ("flux", "ivar", "lambda", "mask"):
        columns[name][1] = columns[name][1][:1]
    spectra, found = read(write(tmp_path / "a.parquet", columns))
    assert spectra.good.sum(axis=1).tolist() == [200, 1]
    assert (found["status"] == 0).all()


# --- catalog values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([2**53 + 1, -7], pa.int64()), [2**53 + 1, -7]),
        (pa.array([2**31, 5], pa.uint32()), [2**31, 5]),
        (pa.array([2**64 - 1, 2**63], pa.uint64()), ["18446744073709551615", "9223372036854775808"]),
        (pa.array(["  482050393 ", "x"]), ["482050393", "x"]),
        (pa.array([b"11", b"12"]), ["11", "12"]),
    ],
)
def test_t10_ids_are_exact(tmp_path: Path, ids: Any, expected: list[Any]) -> None:
    _, columns = read(write(tmp_path / "a.parquet", rows(2, object_id=ids)))
    assert columns["id"].tolist() == expected
    assert columns["id"].dtype.kind in ("U" if isinstance(expected[0], str) else "i")


def test_t10_ids_as_floats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="object_id is double.*a float loses digits"):
        source(write(tmp_path / "a.parquet", rows(2, object_id=[1.0, 2.0]))).files()
    with pytest.raises(SourceError, match=r"no column object_id or .*source\.id"):
        source(write(tmp_path / "b.parquet", rows(2, object_id=None))).files()
    _, columns = read(write(tmp_path / "c.parquet", rows(2, object_id=None, name=["a", "b"])), id="NAME")
    assert columns["id"].tolist() == ["a", "b"]


def test_t10_a_row_without_an_id_is_set_aside(tmp_path: Path) -> None:
    spectra, columns = read(write(tmp_path / "a.parquet", rows(2, object_id=pa.array([5, None], pa.int64()))))
    assert columns["status"].tolist() == [0, Status.UNREADABLE]
    assert columns["note"][1].endswith("a row without an id; expected one")
    assert not spectra.ivar[1].any()


def test_b7_an_unknown_redshift_is_nan(tmp_path: Path) -> None:
    z = pa.array([0.5, None, float("nan"), -9999.0, -0.001])
    _, columns = read(write(tmp_path / "a.parquet", rows(5, Z=z)))
    np.testing.assert_array_equal(columns["z"], [0.5, np.nan, np.nan, np.nan, -0.001])
    assert columns["status"].tolist() == [0, 4, 4, 4, 0]
    _, columns = read(write(tmp_path / "b.parquet", rows(1, Z=None, ZWARN=None, EBV=None, ra=None)))
    assert columns["status"].tolist() == [Status.NO_REDSHIFT]
    assert columns["zwarn"].tolist() == [0]
    assert np.isnan(columns["ebv"]).all()


def test_a_boolean_zwarn_must_be_explained(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", struct(rows(2, ZWARN=[True, False])))
    with pytest.raises(SourceError, match=r"source\.zwarn_true"):
        source(path).files()
    assert read(path, zwarn_true="bad")[1]["zwarn"].tolist() == [1, 0]
    assert read(path, zwarn_true="good")[1]["zwarn"].tolist() == [0, 1]


def test_names_differ_in_case_but_not_in_doubt(tmp_path: Path) -> None:
    made = rows(2, Z=None, z=[0.1, 0.2], SPECTYPE=["GALAXY", None], SUBTYPE=["", "CV"])
    _, columns = read(write(tmp_path / "a.parquet", {name.upper(): values for name, values in made.items()}))
    assert columns["z"].tolist() == [0.1, 0.2]
    assert columns["class"].tolist() == ["GALAXY", ""]
    assert columns["subclass"].tolist() == ["", "CV"]
    with pytest.raises(SourceError, match="columns RA and Ra"):
        source(write(tmp_path / "b.parquet", rows(2, ra=None, RA=[1.0, 2.0], Ra=[3.0, 4.0]))).files()


def test_what_the_table_says_is_known_of_rows_whose_arrays_are_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", struct(rows(300, LINEAR[:90])), 64)
    columns = source(path).identify(Piece("a.parquet", 60, 70))
    assert columns["id"].tolist() == rows(300)["object_id"][60:70]
    assert "note" not in columns
    assert source(path).identify(Piece("a.parquet", 290, 310)) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flux": None}, "no array flux; there are ivar"),
        ({"lambda": None}, "no array lambda or wavelength"),
        ({"flux": [1.0, 2.0]}, "flux is double; expected a list"),
        ({"flux": [["a"], ["b"]]}, "expected a list of numbers"),
    ],
)
def test_t4_missing_and_wrong_columns_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        source(write(tmp_path / "a.parquet", rows(2, **changes))).files()
    assert "\n" not in str(caught.value)
    with pytest.raises(SourceError, match="column 'arrays' is missing"):
        source(write(tmp_path / "b.parquet", rows(2)), spectrum="arrays").files()


def test_a_file_with_other_columns_is_an_error_of_that_file(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows(2))
    write(tmp_path / "b.parquet", rows(2, object_id=[1, 2]))
    table = source(tmp_path)
    assert len(table.files()) == 2
    table.read(Piece("a.parquet", 0, 2))
    with pytest.raises(SourceError, match=r"b\.parquet: has other columns"):
        table.read(Piece("b.parquet", 0, 2))
    table.read(Piece("a.parquet", 0, 1))


# --- damaged and hostile files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"PAR1", b"<!DOCTYPE html><html>404</html>", b"PAR1" + bytes(40) + b"PARE"])
def test_t9_what_is_not_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(SourceError, match="expected an unencrypted Parquet file") as caught:
        source(tmp_path).files()
    assert not isinstance(caught.value.__cause__, OSError)


def test_t1_t2_a_truncated_or_damaged_file_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows(3))
    content = write(tmp_path / "b.parquet", rows(3)).read_bytes()
    table = source(tmp_path)
    table.files()
    damaged = bytearray(content)
    damaged[40:400] = bytes(360)
    for broken in (content[:-1], content[:1000], bytes(damaged), content[:-8] + b"\xff\xff\xff\x7fPAR1"):
        (tmp_path / "b.parquet").write_bytes(broken)
        with pytest.raises(SourceError, match=r"b\.parquet") as caught:
            table.read(Piece("b.parquet", 0, 3))
        assert "\n" not in str(caught.value)
        assert not isinstance(caught.value.__cause__, OSError)


def test_a_file_that_is_gone_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows(3))
    table = source(path)
    table.files()
    path.unlink()
    with pytest.raises(SourceError, match="No such file") as caught:
        table.read(Piece("a.parquet", 0, 1))
    assert isinstance(caught.value.__cause__, OSError)


class Canary:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def write_hostile(path: Path, name: str, payload: bytes) -> Path:
    """Write a table whose column `extra` names an Arrow extension type with that metadata."""
    metadata = {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": payload}
    columns = rows(2) | {"extra": [[1.0], [2.0]]}
    table = flat(columns)
    index = table.schema.get_field_index("extra")
    field = pa.field("extra", pa.list_(pa.float64()), metadata=metadata)
    return write(path, table.cast(table.schema.set(index, field)))


@pytest.mark.parametrize(
    "name", ["arrow.py_extension_type", "ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "test.canary"]
)
def test_s13_pickled_extension_metadata_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    path = write_hostile(tmp_path / "a.parquet", name, pickle.dumps(Canary(canary)))
    program = f"""
import pickle, pyarrow as pa
class Careless(pa.ExtensionType):
    def __arrow_ext_serialize__(self): return b""
    @classmethod
    def __arrow_ext_deserialize__(cls, storage, serialized):
        pickle.loads(serialized)
        return cls(storage, {name!r})
try:
    pa.register_extension_type(Careless(pa.list_(pa.float64()), {name!r}))
except pa.ArrowKeyError:
    pass
import pyarrow.parquet as pq
from distspec.config import Table
from distspec.errors import SourceError
from distspec.sources.table import SpectrumTable
try:
    SpectrumTable(Table(path={str(path)!r})).files()
except SourceError as error:
    print(error)
import os; print("after ours:", os.path.exists({str(canary)!r}))
pq.ParquetFile({str(path)!r}).schema_arrow
print("after pyarrow:", os.path.exists({str(canary)!r}))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Arrow extension types, whose metadata may hold code" in ran.stdout
    assert "after ours: False" in ran.stdout
    # The file is a threat indeed: Arrow itself, where such a type is registered, runs the code.
    assert "after pyarrow: True" in ran.stdout


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40), st.binary(max_size=40))
def test_s13_the_name_is_found_at_any_alignment_of_base64(before: bytes, after: bytes) -> None:
    text = base64.b64encode(before + b"ARROW:extension:name" + after)
    assert any(mark in text for mark in _EXTENSION_MARKS)
    other = base64.b64encode(before + b"ARROW:schema" + after)
    assert b"ARROW:ext" in before + after or not any(mark in other for mark in _EXTENSION_MARKS)
