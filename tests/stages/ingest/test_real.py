"""Every real survey file goes through the recipe made for it, and nothing is lost on the way."""

import csv
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from distspec.config import load
from distspec.spectra import Status
from distspec.stages.ingest.stage import ingest
from distspec.store import SpectraStore

pytestmark = pytest.mark.slow

RECIPES = [
    ("pae", "sdss", "sdss", 58),
    ("comparison", "sdss", "sdss", 58),
    ("cnn_stars", "lamost", "lamost_dr1", 176),
    ("cnn_stars", "lamost", "lamost_dr8", 24),
    ("desi", "desi", "desi", 9),
    ("desi_rest", "desi", "desi", 9),
]


def through(preset: str, kind: str, folder: Path, output: Path, *more: str) -> SpectraStore:
    words = [f"ingest.source.kind={kind}", f"ingest.source.path={folder}", f"output={output}", *more]
    if kind == "desi":
        words.append("ingest.source.catalog=QSO_cat_fuji_dark_tile.fits.gz")
    return ingest(load(preset, words))


@pytest.mark.parametrize(("preset", "kind", "folder", "rows"), RECIPES)
def test_real_files_go_through_their_recipe_and_the_counts_add_up(
    ray_session: None, real_data: Path, tmp_path: Path, preset: str, kind: str, folder: str, rows: int
) -> None:
    store = through(preset, kind, real_data / folder, tmp_path / "out")
    assert store.rows == rows
    assert store.finished
    status = store.status()
    with (tmp_path / "out/ledger.csv").open(newline="") as file:
        assert [int(line["row"]) for line in csv.DictReader(file)] == np.flatnonzero(status).tolist()
    for shard in range(store.shards):
        spectra = store.read(shard)
        assert np.isfinite(spectra.flux).all()
        assert np.isfinite(spectra.ivar).all()
        assert spectra.good[status[spectra.rows] == 0].any(axis=1).all()
    if kind != "desi":
        with (real_data / "labels.csv").open(newline="") as file:
            labels = {line["file"]: line for line in csv.DictReader(file) if line["folder"] == folder}
        names, kinds, z = (store.column(name) for name in ("file", "class", "z"))
        assert set(names) == set(labels)
        for name, found, redshift in zip(names, kinds, z, strict=True):
            assert found == labels[name]["class"]
            np.testing.assert_allclose(redshift, float(labels[name]["z"]), rtol=1e-6, atol=1e-9)


def test_desi_pixels_reach_the_store_in_every_bit(ray_session: None, real_data: Path, tmp_path: Path) -> None:
    bare = ("ingest.prepare.normalize.kind=none",)
    store = through("desi", "desi", real_data / "desi", tmp_path / "out", *bare)
    with fits.open(real_data / "desi/coadd-4-80613-thru20210324.fits") as units:
        ids = units["FIBERMAP"].data["TARGETID"].astype(np.int64)
        blue, weight = (np.asarray(units[f"B_{part}"].data, np.float32) for part in ("FLUX", "IVAR"))
        bad = np.asarray(units["B_MASK"].data) != 0
    rows = np.array([store.column("id").tolist().index(target) for target in ids])
    assert (store.column("status", rows) == Status.OK).all()
    spectra = store.take(rows)
    # 5600 Å and bluer: only the blue arm is there.
    alone = slice(0, 2500)
    good = ~bad[:, alone] & (weight[:, alone] > 0)
    np.testing.assert_array_equal(spectra.good[:, alone], good)
    np.testing.assert_array_equal(spectra.flux[:, alone][good], blue[:, alone][good])
    np.testing.assert_array_equal(spectra.ivar[:, alone][good], weight[:, alone][good])
