import json
import re
import shutil
import sys
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy import units as u
from astropy.io import votable
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st

from distspec.config import Experiment, load
from distspec.errors import ConfigError, DistspecWarning, LayoutError, StoreError, StoreNotFoundError
from distspec.pipeline import Products, run
from distspec.spectra import WaveGrid
from distspec.stages.export.hats import Partition, partitions
from distspec.stages.export.parquet import flat
from distspec.stages.export.stage import export
from distspec.stages.order import STAGES
from distspec.stages.stage import Exported
from distspec.store import SpectraStore
from tests.support.catalogues import add_scores, catalogue, make_catalogue
from tests.support.processes import finished
from tests.support.small import contents


@pytest.fixture(params=["int64", pytest.param("text", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> SpectraStore:
    """Has grown once, is scored, and has rows set aside and rows without a position."""
    store = make_catalogue(tmp_path / "s.zarr", text=request.param == "text")
    add_scores(store)
    return store


def exporting(folder: Path, **changes: Any) -> Experiment:
    tree = {"name": "test", "output": str(folder / "out"), "export": changes}
    return Experiment.model_validate_json(json.dumps(tree))


def read_vot(path: Path) -> Table:
    """Parse as strictly as astropy can."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated in the VOUnit")
        return votable.parse(path, verify="exception").get_first_table().to_table()


def test_it_is_a_stage_that_runs_by_name_only() -> None:
    assert [stage.in_run for stage in STAGES if stage.name == "export"] == [False]
    assert load(None).export.format == "parquet"
    with pytest.raises(ConfigError, match="cannot hold export.spectra"):
        load(None, ["export.format=votable", "export.spectra=true"])


def test_parquet_holds_what_the_store_holds(store: SpectraStore, tmp_path: Path) -> None:
    made = export(exporting(tmp_path), store)
    assert made == Exported(tmp_path / "out/catalog.parquet", 40, tuple(store.arrow().column_names))
    file = pq.ParquetFile(made.path)
    assert str(file.read().to_pylist()) == str(flat(store.arrow()).to_pylist())
    assert file.metadata.num_row_groups == store.shards
    # Nothing that another program would have to know us for.
    assert set(file.metadata.metadata) == {
        b"ARROW:schema", b"IVOA.VOTable-Parquet.version", b"IVOA.VOTable-Parquet.content",
    }  # fmt: skip
    assert file.schema_arrow.field("ra").metadata[b"unit"] == b"deg"
    assert file.schema_arrow.field("id").metadata[b"ucd"] == b"meta.id;meta.main"
    assert file.schema_arrow.field("latents").type == pa.list_(pa.float32(), 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No table::len")
        table = Table.read(made.path)
    assert table.colnames == list(made.columns)
    windows = file.schema_arrow.field("anomaly_wave")
    assert windows.metadata[b"shape"] == b"4,2"
    np.testing.assert_array_equal(table["anomaly_wave"].reshape(-1, 4, 2), catalogue(40, text=False)["anomaly_wave"])
    assert table["id"].tolist() == store.column("id").tolist()
    assert [path.name for path in made.path.parent.iterdir()] == ["catalog.parquet"]


def test_a_large_table_is_a_folder_of_files_that_is_read_as_one(store: SpectraStore, tmp_path: Path) -> None:
    whole = export(exporting(tmp_path / "whole"), store)
    made = export(exporting(tmp_path, partition_rows=10), store)
    assert made.rows == whole.rows and made.columns == whole.columns
    files = sorted(path.name for path in made.path.iterdir())
    assert files[:3] == ["_common_metadata", "part-00000.parquet", "part-00001.parquet"]
    assert str(pq.read_table(made.path).to_pylist()) == str(pq.read_table(whole.path).to_pylist())
    assert pq.read_schema(made.path / "_common_metadata").field("ra").metadata[b"unit"] == b"deg"
    # Replaced by another one, and by a single file.
    export(exporting(tmp_path, partition_rows=30), store)
    assert export(exporting(tmp_path), store).path.is_file()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "hats"])
def test_workers_write_the_same_files(
    ray_session: None, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_catalogue(tmp_path / "s.zarr", 4_000, parts=1, shard_rows=256)
    add_scores(store)
    written = []
    for few in (10**9, 0):
        monkeypatch.setattr("distspec.stages.export.stage._FEW", few)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DistspecWarning)
            made = export(exporting(tmp_path / str(few), format=form, partition_rows=500), store)
        written.append({name: data for name, data in contents(made.path).items() if "properties" not in name})
    assert len(written[0]) > 5
    assert written[0] == written[1]


def test_parquet_tells_units_to_the_vo(store: SpectraStore, tmp_path: Path) -> None:
    made = export(exporting(tmp_path), store)
    text = pq.read_metadata(made.path).metadata[b"IVOA.VOTable-Parquet.content"].decode()
    fields = dict(re.findall(r'<FIELD ID="(\w+)"([^>]*)>', text))
    assert 'unit="deg"' in fields["ra"]
    assert 'ucd="pos.eq.dec;meta.main"' in fields["dec"]
    assert 'datatype="long"' in fields["zwarn"]


def test_votable_reads_back_exactly(store: SpectraStore, tmp_path: Path) -> None:
    made = export(exporting(tmp_path, format="votable"), store)
    table = read_vot(made.path)
    text = store.base.fields["columns/id"][0] == "string"
    told = catalogue(40, text=text)
    # astropy's reader strips the blanks around text; they are in the file.
    ids = np.char.strip(told["id"]).tolist() if text else told["id"].tolist()
    assert table["id"].tolist() == ids
    assert not text or "<TD>  padded </TD>" in made.path.read_text("utf-8")
    assert table["zwarn"].tolist() == told["zwarn"].tolist()
    assert table["class"].tolist() == told["class"].tolist()
    assert table["norm"].tolist() == told["norm"].tolist()
    # XML has no NUL.
    assert table["note"].tolist()[5] == "line\r\none\ufffd 5"
    assert table["reasons"].tolist() == store.arrow()["reasons"].to_pylist()
    np.testing.assert_array_equal(np.ma.filled(table["z"], np.nan), told["z"])
    np.testing.assert_array_equal(np.ma.filled(table["anomaly_wave"], np.nan), told["anomaly_wave"])
    np.testing.assert_array_equal(np.ma.filled(table["mse"], np.nan), store.table()["mse"])
    assert (table["ra"].unit, table["anomaly_wave"].unit) == (u.deg, u.Angstrom)
    assert table["norm"].unit == u.Unit("1e-17 erg / (s cm2 Angstrom)")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated in the VOUnit")
        assert Table.read(made.path, format="votable")["id"].tolist() == ids


@pytest.mark.parametrize("rows", [7, 1_000_000])
def test_hats_is_read_by_hats_and_holds_every_row(store: SpectraStore, tmp_path: Path, rows: int) -> None:
    hats = pytest.importorskip("hats")
    from hats.io.validation import is_valid_catalog
    from hats.pixel_math.spatial_index import compute_spatial_index

    with pytest.warns(DistspecWarning, match="4 of 40 rows have no position on the sky"):
        made = export(exporting(tmp_path, format="hats", partition_rows=rows), store)
    assert is_valid_catalog(made.path, strict=True)
    catalog = hats.read_hats(made.path)
    assert catalog.catalog_info.total_rows == 36
    assert catalog.catalog_name == "test"
    assert len(catalog.get_healpix_pixels()) == len(list((made.path / "dataset").rglob("Npix=*.parquet")))
    seen = []
    for pixel in catalog.get_healpix_pixels():
        path = made.path / f"dataset/Norder={pixel.order}/Dir={pixel.dir}/Npix={pixel.pixel}.parquet"
        table = pq.read_table(path, partitioning=None)
        index = table["_healpix_29"].to_numpy()
        assert table.num_rows <= rows
        assert (np.diff(index) >= 0).all()
        assert (index >> 2 * (29 - pixel.order) == pixel.pixel).all()
        theirs = compute_spatial_index(table["ra"].to_numpy(), table["dec"].to_numpy())
        # Their library and ours round differently: that may move an object on an edge by a pixel of 0.4 mas.
        assert (theirs == index).mean() > 0.9
        seen += table.drop_columns(["_healpix_29"]).to_pylist()
    seen += pq.read_table(made.path / "unplaced.parquet").to_pylist()
    seen.sort(key=lambda line: line["row"])
    assert str(seen) == str(flat(store.arrow()).to_pylist())
    assert not list(made.path.rglob(".*"))


def test_hats_gives_lsdb_what_it_asks_for(store: SpectraStore, tmp_path: Path) -> None:
    hats = pytest.importorskip("hats")
    with pytest.warns(DistspecWarning):
        made = export(exporting(tmp_path, format="hats", columns=["id", "mse"]), store)
    catalog = hats.read_hats(made.path)
    assert catalog.schema.names == ["_healpix_29", "id", "mse", "ra", "dec"]
    assert pq.read_schema(made.path / "dataset/_common_metadata").field("ra").metadata[b"unit"] == b"deg"
    frame = catalog.read_pixel_to_pandas(catalog.get_healpix_pixels()[0])
    assert set(frame["id"]) <= set(store.column("id").tolist())
    # One footer for the whole dataset gives the same rows.
    whole = pq.ParquetDataset(made.path / "dataset", partitioning=None).read()
    assert whole.num_rows == pq.read_metadata(made.path / "dataset/_metadata").num_rows == 36


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.integers(0, 4), limit=st.integers(1, 50))
def test_partitions_cover_every_object_once(seed: int, order: int, limit: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 30, 12 << 2 * order) * (rng.random(12 << 2 * order) < 0.2)
    found = partitions(counts, limit)
    held = np.zeros(len(counts), int)
    for cell in found:
        width = 1 << 2 * (order - cell.order)
        mine = slice(cell.pixel * width, (cell.pixel + 1) * width)
        held[mine] += 1
        total = counts[mine].sum()
        assert total > 0
        assert total <= limit or cell.order == order
        if cell.order:
            parent = (cell.pixel >> 2) * width * 4
            assert counts[parent : parent + 4 * width].sum() > limit
    assert (held[counts > 0] == 1).all()
    assert found == sorted(found, key=lambda cell: cell.first)
    assert Partition(9, 123_456).path == "Norder=9/Dir=120000/Npix=123456.parquet"


def test_rows_that_are_set_aside_can_be_left_out(store: SpectraStore, tmp_path: Path) -> None:
    made = export(exporting(tmp_path, scored_only=True, columns=["row", "mse"]), store)
    table = pq.read_table(made.path)
    used = np.flatnonzero(store.status() == 0)
    assert table["row"].to_pylist() == used.tolist()
    assert table["mse"].null_count == 0
    assert made.rows == len(used) < 40


def test_spectra_can_go_along(tmp_path: Path) -> None:
    store = make_catalogue(tmp_path / "s.zarr", grid=WaveGrid.between("log", 3600.0, 9000.0, 200))
    made = export(exporting(tmp_path, spectra=True, columns=["id"]), store)
    table = pq.read_table(made.path)
    spectra = store.take(np.arange(40))
    kind = table.schema.field("spectrum").type
    assert [field.name for field in kind] == ["flux", "ivar", "lambda"]
    flux = np.array([line["flux"] for line in table["spectrum"].to_pylist()], np.float32)
    np.testing.assert_array_equal(flux, spectra.flux)
    with pytest.warns(DistspecWarning):
        made = export(exporting(tmp_path, spectra=True, format="hats"), store)
    assert pq.read_metadata(made.path / "dataset/_metadata").num_rows == 36


def test_spectra_can_be_read_as_a_survey_again(tmp_path: Path) -> None:
    from distspec.config import Table as TableSettings
    from distspec.sources import Piece
    from distspec.sources.table import SpectrumTable

    store = make_catalogue(tmp_path / "s.zarr", grid=WaveGrid.between("log", 3600.0, 9000.0, 200))
    made = export(exporting(tmp_path, spectra=True, columns=["id", "ra", "dec", "z", "zwarn", "class"]), store)
    source = SpectrumTable(TableSettings(path=str(made.path)))
    (entry,) = source.files()
    spectra, columns = source.read(Piece(entry.name, 0, 40))
    # The source finds the grid from the wavelengths, to within a small part of a pixel.
    np.testing.assert_allclose(source.grid.position(store.grid.wave), np.arange(200), atol=0.01)
    assert columns["id"].tolist() == store.column("id").tolist()
    held = store.take(np.arange(40))
    np.testing.assert_array_equal(spectra.ivar, held.ivar)
    np.testing.assert_array_equal(spectra.flux[held.good], held.flux[held.good])
    np.testing.assert_array_equal(columns["z"], store.column("z"))


def test_nothing_that_looks_whole_is_left_by_an_interruption(
    store: SpectraStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distspec.store.table import Catalogue

    real = Catalogue.read

    def dies(self: Catalogue, start: int, stop: int) -> pa.Table:
        if start >= 16 and "id" in self.schema.names:
            raise KeyboardInterrupt
        return real(self, start, stop)

    for form in ("parquet", "votable", "hats"):
        monkeypatch.setattr(Catalogue, "read", dies)
        with pytest.raises(KeyboardInterrupt):
            export(exporting(tmp_path, format=form), store)
        assert list((tmp_path / "out").iterdir()) == []
        monkeypatch.undo()
    # An earlier table stays as it was until the new one is whole.
    first = export(exporting(tmp_path), store).path.read_bytes()
    monkeypatch.setattr(Catalogue, "read", dies)
    with pytest.raises(KeyboardInterrupt):
        export(exporting(tmp_path), store)
    assert (tmp_path / "out/catalog.parquet").read_bytes() == first
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_an_earlier_table_is_replaced_and_nothing_else(store: SpectraStore, tmp_path: Path) -> None:
    settings = exporting(tmp_path, format="hats", columns=["id"])
    with pytest.warns(DistspecWarning):
        before = export(settings, store)
    stale = before.path / "dataset/Norder=9/Dir=0/Npix=1.parquet"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"")
    with pytest.warns(DistspecWarning):
        export(settings, store)
    assert not stale.exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["catalog-hats"]
    (tmp_path / "mine").mkdir()
    for form in ("hats", "parquet"):
        with pytest.raises(ConfigError, match="mine"):
            export(exporting(tmp_path, format=form, to=str(tmp_path / "mine")), store)
    with pytest.raises(ConfigError, match="expected a folder, or a bucket"):
        export(exporting(tmp_path, to="ftp://host/x.parquet"), store)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        export(exporting(tmp_path, to=str(tmp_path / "file/x.parquet")), store)


def test_what_cannot_be_exported_is_refused(store: SpectraStore, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="no column 'msee'"):
        export(exporting(tmp_path, columns=["msee"]), store)
    with pytest.raises(StoreNotFoundError, match="score-x"):
        export(exporting(tmp_path, layers=["score-x"]), store)


def test_without_positions_there_is_no_hats(tmp_path: Path, spectra: Any) -> None:
    from tests.conftest import make_store

    store = make_store(tmp_path / "s.zarr", spectra, shard_rows=16, chunk_rows=8)
    with pytest.raises(LayoutError, match="no columns ra and dec"):
        export(exporting(tmp_path, format="hats"), store)
    assert export(exporting(tmp_path), store).rows == 40


def peak(store: SpectraStore, folder: Path, **changes: Any) -> int:
    """Give the largest memory that Python and Arrow take together, bytes."""
    pool = pa.default_memory_pool()
    most = 0

    def watch() -> Iterator[None]:
        nonlocal most
        from distspec.store.table import Catalogue

        real = Catalogue.read

        def read(self: Catalogue, start: int, stop: int) -> pa.Table:
            nonlocal most
            most = max(most, pool.bytes_allocated())
            return real(self, start, stop)

        Catalogue.read = read  # type: ignore[method-assign]
        try:
            yield
        finally:
            Catalogue.read = real  # type: ignore[method-assign]

    export(exporting(folder, **changes), store)
    tracemalloc.start()
    for _ in watch():
        export(exporting(folder, **changes), store)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most + python


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::distspec.errors.DistspecWarning")
@pytest.mark.parametrize("form", ["parquet", "votable", "hats"])
def test_memory_does_not_grow_with_the_survey(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distspec.stages.export.hats._AT_ONCE", 1 << 20)
    monkeypatch.setattr("distspec.stages.export.hats._LARGEST", 1 << 20)
    grid = WaveGrid.between("log", 3600.0, 7200.0, 2)
    small, large = (
        make_catalogue(tmp_path / f"{count}.zarr", count, parts=1, shard_rows=4096, grid=grid)
        for count in (8_192, 65_536)
    )
    changes: dict[str, Any] = {"format": form} | ({"partition_rows": 2000} if form == "hats" else {})
    assert peak(large, tmp_path / "l", **changes) < 2 * peak(small, tmp_path / "s", **changes)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "votable", "hats"])
def test_the_command_names_what_it_wrote(done: tuple[Experiment, Products], tmp_path: Path, form: str) -> None:
    experiment, made = done
    # In a place of its own, since a run leaves its settings there.
    output = shutil.copytree(experiment.output, tmp_path / "out")
    target = tmp_path / f"table.{form}"
    command = [sys.executable, "-m", "distspec", "export", str(output / "experiment.toml")]
    command += [f"export.format={form}", f"export.to={target}", f"output={output}"]
    told = finished(command)
    assert told.returncode == 0, told.stderr
    assert re.search(rf"export   {re.escape(str(target))}: 700 rows of \d+ columns", told.stdout)
    if form == "parquet":
        assert pq.read_table(target)["mse"].null_count == int((made.store.status() != 0).sum())
    if form == "votable":
        assert read_vot(target)["id"].tolist() == made.store.column("id").tolist()


def test_the_experiments_own_scores_are_exported(done: tuple[Experiment, Products], tmp_path: Path) -> None:
    experiment, made = done
    # In a place of its own, since a run leaves its settings there.
    shutil.copytree(experiment.output, tmp_path / "out")
    to = experiment.export.model_copy(update={"to": str(tmp_path / "x")})
    settings = experiment.model_copy(update={"output": str(tmp_path / "out"), "export": to})
    exported = run(settings, "export").exported
    assert exported is not None
    table = pq.read_table(exported.path)
    held = made.scores.read("mse")
    np.testing.assert_array_equal(table["mse"].to_numpy(), np.where(np.isnan(held), np.nan, held))
