"""Lazy arrays of dask and xarray hold what the store gives when it is asked itself."""

import pickle
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest

from distspec.errors import LayoutError, StoreError
from distspec.store import SpectraStore
from tests.support.catalogues import add_scores, make_catalogue


@pytest.fixture
def scored(tmp_path: Path) -> SpectraStore:
    """Has grown once, so that a shard in the middle is short."""
    store = make_catalogue(tmp_path / "s.zarr")
    add_scores(store)
    return store


def test_values_are_those_of_the_store_and_ids_exact(scored: SpectraStore) -> None:
    arrays = scored.to_dask(layers=["score-0123456789ab"])
    spectra = scored.take(np.arange(scored.rows))
    np.testing.assert_array_equal(arrays["flux"].compute(), spectra.flux)
    np.testing.assert_array_equal(arrays["ivar"].compute(), spectra.ivar)
    for name in scored.column_names:
        found = arrays[name].compute()
        np.testing.assert_array_equal(found, scored.column(name), err_msg=name)
        assert found.dtype == arrays[name].dtype
    assert arrays["id"].dtype == np.int64
    np.testing.assert_array_equal(arrays["latents"].compute(), scored.layer("score-0123456789ab").read("latents"))


@pytest.mark.parametrize(
    "key", [np.s_[::2], np.s_[::-1], 5, [20, 3, 1], np.s_[3:30:7, ::5], (5, 3), np.s_[:, 4]], ids=str
)
def test_however_rows_and_pixels_are_picked(scored: SpectraStore, key: Any) -> None:
    whole = scored.take(np.arange(scored.rows)).flux
    np.testing.assert_array_equal(scored.to_dask([])["flux"][key].compute(), whole[key])


def test_chunks_are_those_of_the_store(scored: SpectraStore) -> None:
    flux = scored.to_dask([])["flux"]
    edges = {0, *np.cumsum(flux.chunks[0]).tolist()}
    assert {edge for shard in range(scored.shards) for edge in scored.base.bounds(shard)} <= edges
    assert max(flux.chunks[0]) == scored.chunk_rows
    assert flux.dtype == np.float32


def test_only_what_is_asked_for_is_read(scored: SpectraStore) -> None:
    # A chunk of the last shard is lost; the first shards do not notice.
    for file in sorted(Path(scored.path).glob("base/flux/c/*"))[-1:]:
        (file / "0").unlink() if file.is_dir() else file.unlink()
    flux = scored.to_dask([])["flux"]
    assert flux[:16].compute().shape == (16, scored.grid.pixels)
    with pytest.raises(StoreError, match="lost rows|damaged"):
        flux.compute()


def test_graphs_travel_to_other_processes(scored: SpectraStore) -> None:
    flux = pickle.loads(pickle.dumps(scored.to_dask([])["flux"]))
    with dask.config.set(scheduler="synchronous"):
        np.testing.assert_array_equal(
            flux[20:30].mean(axis=1).compute(), scored.take(np.arange(20, 30)).flux.mean(axis=1)
        )


def test_xarray_knows_wavelengths_and_units(scored: SpectraStore) -> None:
    dataset = scored.to_xarray(["ra", "z", "anomaly_wave"], ["score-0123456789ab"])
    assert dict(dataset.flux.sizes) == {"row": scored.rows, "wave": scored.grid.pixels}
    np.testing.assert_array_equal(dataset.wave, scored.grid.wave)
    assert (dataset.wave.attrs["units"], dataset.ra.attrs["units"]) == ("Angstrom", "deg")
    line = dataset.flux.sel(wave=slice(4000, 5000)).mean("row").compute()
    assert line.sizes["wave"] == ((scored.grid.wave >= 4000) & (scored.grid.wave <= 5000)).sum()
    np.testing.assert_array_equal(dataset.chi2.compute(), scored.layer("score-0123456789ab").read("chi2"))


def test_what_there_is_not_is_refused(scored: SpectraStore) -> None:
    with pytest.raises(LayoutError, match=r"no column 'zz'; there are "):
        scored.to_dask(["zz"])
