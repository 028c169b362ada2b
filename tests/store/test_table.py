from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from astropy import units as u
from astropy.table import QTable
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distspec.errors import LayoutError, StoreNotFoundError
from distspec.store import SpectraStore
from distspec.store.arrow import facts_of, to_arrow, to_numpy
from distspec.store.columns import COLUMN_INFO
from distspec.store.table import Catalogue
from tests.support.catalogues import add_scores, catalogue, ids_of, make_catalogue


@pytest.fixture(params=["int64", "text"])
def scored(request: pytest.FixtureRequest, tmp_path: Path) -> SpectraStore:
    store = make_catalogue(tmp_path / "s.zarr", text=request.param == "text")
    add_scores(store)
    return store


def is_text(store: SpectraStore) -> bool:
    return store.base.fields["columns/id"][0] == "string"


@settings(max_examples=60, deadline=None)
@given(
    values=hnp.arrays(
        st.sampled_from(["i1", "i8", "u8", "f4", "f8", "b1", "U5"]),
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4),
    ),
    seed=st.integers(0, 9),
)
def test_arrays_become_arrow_and_come_back(values: np.ndarray, seed: int) -> None:
    # Halves of surrogate pairs are no text: neither Arrow nor zarr takes them.
    assume(values.dtype.kind != "U" or not any("\ud800" <= letter <= "\udfff" for letter in "".join(values.ravel())))
    missing = np.random.default_rng(seed).random(len(values)) < 0.3
    back, null = to_numpy(pa.chunked_array([to_arrow(values, missing)]))
    assert back.shape == values.shape
    assert (back.dtype.kind, back.dtype.kind in "U" or back.dtype == values.dtype) == (values.dtype.kind, True)
    expected = missing.copy()
    if values.dtype.kind == "f":
        expected |= np.isnan(values).reshape(len(values), -1).all(axis=1)
    np.testing.assert_array_equal(null, expected)
    np.testing.assert_array_equal(back[~expected], values[~expected])


def test_all_columns_arrive_exactly(scored: SpectraStore) -> None:
    told = catalogue(40, text=is_text(scored))
    arrow, table, frame = scored.arrow(), scored.table(), scored.pandas()
    assert isinstance(table, QTable)
    assert arrow.column_names == table.colnames == list(frame.columns)
    assert arrow.column_names == [
        "row", "id", "ra", "dec", "z", "zwarn", "class", "ebv", "norm", "anomaly_wave", "note", "status", "reasons",
        "latents", "mse", "chi2",
    ]  # fmt: skip
    ids = told["id"].tolist()
    assert arrow["id"].to_pylist() == table["id"].tolist() == frame["id"].tolist() == ids
    assert arrow["row"].to_pylist() == list(range(40))
    assert (arrow["id"].type, frame["id"].dtype) == (
        (pa.string(), pd.ArrowDtype(pa.string())) if is_text(scored) else (pa.int64(), pd.ArrowDtype(pa.int64()))
    )
    assert table["zwarn"].dtype == np.int64
    np.testing.assert_array_equal(table["anomaly_wave"].value, told["anomaly_wave"])
    assert frame["class"].tolist() == told["class"].tolist()
    assert table["norm"].to_value(table["norm"].unit).tolist() == told["norm"].tolist()


def test_missing_is_null_in_arrow_and_pandas_and_nan_in_astropy(scored: SpectraStore) -> None:
    status = catalogue(40, text=False)["status"]
    arrow, table, frame = scored.arrow(), scored.table(), scored.pandas()
    aside = (status != 0).tolist()
    for name in ("mse", "chi2"):
        assert pc.is_null(arrow[name]).to_pylist() == aside
        assert frame[name].isna().tolist() == aside
    assert np.isnan(table["latents"]).all(axis=1).tolist() == aside
    assert arrow["latents"].null_count == 0
    assert np.isnan(table["mse"]).tolist() == aside
    assert pc.is_null(arrow["z"]).to_pylist() == (status & 4 != 0).tolist()
    # So that a mean or a ranking is that of what was scored.
    assert frame["mse"].mean() == np.arange(40)[status == 0].mean()
    reasons = arrow["reasons"].to_pylist()
    assert reasons[2] == "no finite redshift is known; the signal-to-noise ratio is below the recipe's limit"
    assert reasons[0] == ""


def test_rows_are_chosen_by_position_or_mask_across_parts(scored: SpectraStore) -> None:
    rows = [39, 0, 23, 22, 0]
    whole = scored.arrow()
    # As text: NaN inside a list equals nothing.
    assert str(scored.arrow(rows=rows).to_pylist()) == str(whole.take(pa.array(rows)).to_pylist())
    mask = np.zeros(40, bool)
    mask[[5, 30]] = True
    assert scored.table(rows=mask)["row"].tolist() == [5, 30]
    assert scored.arrow(rows=[]).num_rows == len(scored.table(rows=[])) == 0
    with pytest.raises(LayoutError, match="one value for each row"):
        scored.arrow(rows=mask[:5])
    with pytest.raises(LayoutError, match="rows are float64"):
        scored.arrow(rows=[1.0])
    with pytest.raises(IndexError, match="40-40"):
        scored.arrow(rows=[40])


def test_units_and_descriptions_travel(scored: SpectraStore) -> None:
    table, frame = scored.table(), scored.pandas(columns=["ra", "norm", "id"])
    assert table["ra"].unit == u.deg
    assert table["ebv"].unit == u.mag
    assert table["norm"].unit == u.Unit("1e-17 erg / (s cm2 Angstrom)")
    assert table["anomaly_wave"].unit == u.Angstrom
    assert (table["z"] > 0.1).dtype == bool
    assert table["ra"].info.description == "Right ascension, ICRS"
    assert table["ra"].info.meta["ucd"] == "pos.eq.ra;meta.main"
    assert frame.attrs["units"] == {"ra": "deg", "norm": COLUMN_INFO["norm"].unit}
    assert facts_of(scored.arrow().schema.field("dec"))["unit"] == "deg"


def test_every_unit_and_descriptor_is_known_to_the_vo() -> None:
    from astropy.io.votable.ucd import check_ucd

    for name, meaning in COLUMN_INFO.items():
        u.Unit(meaning.unit)
        assert check_ucd(meaning.ucd, check_controlled_vocabulary=True) or not meaning.ucd, name


def test_columns_are_chosen_by_name(scored: SpectraStore) -> None:
    assert scored.arrow(columns=["mse", "id"]).column_names == ["mse", "id"]
    with pytest.raises(LayoutError, match="no column 'msee' in this store; did you mean 'mse'"):
        scored.arrow(columns=["msee"])
    with pytest.raises(LayoutError, match="no column 'mse'"):
        scored.arrow(columns=["mse"], layers=())


def test_scores_of_two_models_stand_side_by_side(scored: SpectraStore) -> None:
    add_scores(scored, "score-ba9876543210")
    names = scored.arrow().column_names
    assert {"mse_0123456789ab", "mse_ba9876543210"} <= set(names)
    assert "mse" not in names
    with pytest.raises(LayoutError, match="mse is in several layers; ask for mse_0123456789ab or mse_ba9876543210"):
        scored.arrow(columns=["mse"])
    assert "mse" in scored.arrow(layers=["score-ba9876543210"]).column_names
    with pytest.raises(StoreNotFoundError, match="run its stage first"):
        scored.arrow(layers=["score-nothing"])


def test_what_a_layer_has_not_reached_is_missing(tmp_path: Path) -> None:
    store = make_catalogue(tmp_path / "s.zarr", parts=1)
    add_scores(store, shards=2)
    assert store.arrow(columns=["mse"]).column(0).is_valid().to_pylist()[32:] == [False] * 8
    told = catalogue(60, text=False)
    from tests.conftest import make_spectra
    from tests.support.catalogues import GRID, grow

    grow(store, make_spectra(np.random.default_rng(1), GRID, 60), told)
    arrow = store.arrow()
    assert arrow.num_rows == 60
    assert arrow["id"].to_pylist() == told["id"].tolist()
    assert pc.is_valid(arrow["mse"]).to_pylist() == [row < 32 and told["status"][row] == 0 for row in range(60)]
    assert store.arrow(rows=[33, 0])["mse"].to_pylist() == [None, 0.0]


def test_a_layer_of_other_rows_is_refused(scored: SpectraStore) -> None:
    scored.create_layer("explain-mse-0", {"row": ("i8", ())}, rows=5)
    assert "row" in scored.arrow().column_names
    with pytest.raises(LayoutError, match="holds no value for each row"):
        scored.arrow(layers=["explain-mse-0"])


def test_spectra_come_as_structs_of_lists(scored: SpectraStore) -> None:
    table = Catalogue(scored, ["id"], spectra=True).read(20, 26)
    first = table["spectrum"][0].as_py()
    spectra = scored.take(np.arange(20, 26))
    np.testing.assert_array_equal(np.float32(first["flux"]), spectra.flux[0])
    np.testing.assert_array_equal(np.float32(first["ivar"]), spectra.ivar[0])
    np.testing.assert_array_equal(first["lambda"], scored.grid.wave)
    assert table["id"].to_pylist() == ids_of(40, text=is_text(scored))[20:26].tolist()
