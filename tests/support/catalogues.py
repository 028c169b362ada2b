"""Stores with catalogues that are hard on whoever passes them on: ids beyond floats, markup, text of all kinds."""

import atexit
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from distspec.spectra import Spectra, WaveGrid
from distspec.store import Inventory, SpectraStore, StoreSpec, field_of
from tests.conftest import make_spectra

NUMBERS = [2**53 + 1, -(2**62) - 1, 2**63 - 1, -(2**63), 0, 7]
TEXTS = ["11998765432109876543", "<b>&amp;\"'</b>", "Ångström ✶ 星", "  padded ", "a,b;\tc\nd", "007"]
GRID = WaveGrid.between("log", 3600.0, 7200.0, 24)


def ids_of(count: int, *, text: bool) -> np.ndarray:
    """Give ids, the odd ones first."""
    if text:
        return np.array([*TEXTS, *(f"id-{row}" for row in range(len(TEXTS), count))][:count])
    return np.array([*NUMBERS, *(2**60 + 1 + row for row in range(len(NUMBERS), count))][:count], np.int64)


def catalogue(count: int, *, text: bool) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    status = np.zeros(count, np.int32)
    status[1::9] = 4
    status[2::9] = 4 | 64
    z = np.where(status & 4, np.nan, rng.uniform(0, 0.3, count))
    windows = np.full((count, 4, 2), np.nan, np.float32)
    windows[::5, 0] = [4000.0, 4100.5]
    ra, dec = rng.uniform(0, 360, count), np.degrees(np.arcsin(rng.uniform(-1, 1, count)))
    ra[3::11] = np.nan
    return {
        "id": ids_of(count, text=text),
        "ra": ra,
        "dec": dec,
        "z": z,
        "zwarn": np.where(status, np.int64(2**55 + 1), np.int64(0)),
        "class": np.resize(np.array(["GALAXY", "QSO", "<script>", ""]), count),
        "ebv": np.full(count, 0.1, np.float32),
        "norm": np.linspace(1e-300, 1e300, count),
        "status": status,
        "anomaly_wave": windows,
        "note": np.array([f"line\r\none\x00 {row}" if row == 5 else "" for row in range(count)]),
    }


def make_catalogue(
    path: Path, count: int = 40, *, text: bool = False, parts: int = 2, shard_rows: int = 16, grid: WaveGrid = GRID
) -> SpectraStore:
    """Make a finished store; with two parts it has grown once, and the last shard of the first is short."""
    return SpectraStore.open(shutil.copytree(_made(count, text, parts, shard_rows, grid), path), write=True)


@cache
def _made(count: int, text: bool, parts: int, shard_rows: int, grid: WaveGrid) -> Path:
    """Give the folder of a store of which tests get copies: to write it takes a second, and there are many tests."""
    folder = Path(mkdtemp())
    atexit.register(shutil.rmtree, folder)
    path = folder / "store.zarr"
    columns = catalogue(count, text=text)
    spectra = make_spectra(np.random.default_rng(1), grid, count)
    first = count if parts == 1 else count // 2 + 3
    store = SpectraStore.create(
        path,
        StoreSpec(
            grid=grid,
            frame="observed",
            rows=first,
            shard_rows=shard_rows,
            chunk_rows=shard_rows // 2,
            columns={name: field_of(values) for name, values in columns.items()},
            digest="store",
            recipe="recipe",
            settings={},
            inventory=_inventory(first),
        ),
    )
    fill(store, spectra, columns)
    if parts > 1:
        grow(store, spectra, columns)
    return path


def grow(store: SpectraStore, spectra: Spectra, columns: dict[str, Any]) -> None:
    more = len(spectra) - store.rows
    store.extend(more, _inventory(more))
    fill(store, spectra, columns)


def fill(store: SpectraStore, spectra: Spectra, columns: dict[str, Any]) -> None:
    for shard in store.pending():
        rows = slice(*store.base.bounds(shard))
        store.write(shard, spectra[rows], {name: values[rows] for name, values in columns.items()})
    store.freeze(None)
    store.mark_finished()


def _inventory(rows: int) -> Inventory:
    return Inventory(["file"], *(np.array([number], np.int64) for number in (1, 1, rows)))


def add_scores(store: SpectraStore, name: str = "score-0123456789ab", shards: int | None = None) -> None:
    """Score every row; NaN where it is set aside."""
    layer = store.create_layer(name, {"latents": ("f4", (3,)), "mse": ("f4", ()), "chi2": ("f4", ())})
    for shard in layer.pending()[:shards]:
        start, stop = layer.bounds(shard)
        rows = np.arange(start, stop, dtype=np.float32)
        values = np.where(store.status(start, stop) == 0, rows, np.nan).astype(np.float32)
        layer.write(
            shard, {"latents": np.stack([values, values + 1, values / 3], 1), "mse": values, "chi2": values * 2}
        )
