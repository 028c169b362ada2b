"""DESI coadds: agreement with independent readers on real files, the join of arms, and redshifts by target."""

import gzip
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits

from distspec.config import Desi
from distspec.errors import SourceError
from distspec.sources.desi import GRID, DesiCoadds
from distspec.spectra import Columns, Spectra, Status

IDS = np.array([39633559463397282, 2**53 + 1, -7, 2**62 + 3], np.int64)
ARMS = {"B": (3600.0, 2751), "R": (5760.0, 2326), "Z": (7520.0, 2881)}
COADDS = ["coadd-1-80693-thru20210204.fits", "coadd-4-80613-thru20210324.fits", "coadd-special-dark-27247.fits"]


def read_all(path: Path, catalog: str | None = None) -> tuple[Spectra, Columns]:
    source = DesiCoadds(Desi(path=str(path), catalog=catalog))
    (piece,) = source.pieces()
    return source.read(piece)


@pytest.fixture
def folder(real_data: Path) -> Path:
    return real_data / "desi"


def write(path: Path, ids: np.ndarray = IDS, checksum: bool = False, **changes: Any) -> Path:
    """Write a coadd whose arms hold known numbers; a change replaces a unit, or leaves it out where it is None."""
    count = len(ids)
    fibermap = [
        fits.Column("TARGETID", "K", array=ids),
        fits.Column("TARGET_RA", "D", array=np.linspace(10, 20, count)),
        fits.Column("TARGET_DEC", "D", array=np.linspace(-5, 5, count)),
    ]
    fibermap += changes.pop("columns", [])
    units: dict[str, Any] = {"FIBERMAP": fits.BinTableHDU.from_columns(fibermap)}
    for arm, (first, pixels) in ARMS.items():
        units[f"{arm}_WAVELENGTH"] = fits.ImageHDU(first + 0.8 * np.arange(pixels))
        units[f"{arm}_FLUX"] = fits.ImageHDU(np.tile(np.arange(count, dtype=np.float32)[:, None] + 1, (1, pixels)))
        units[f"{arm}_IVAR"] = fits.ImageHDU(np.full((count, pixels), 2, np.float32))
        units[f"{arm}_MASK"] = fits.ImageHDU(np.zeros((count, pixels), np.uint32))
    units |= changes
    primary = fits.PrimaryHDU()
    for key in ("AIRORVAC",):
        if key in units:
            primary.header[key] = units.pop(key)
    listed = [primary]
    for name, unit in units.items():
        if unit is not None:
            unit.name = name
            listed.append(unit)
    fits.HDUList(listed).writeto(path, checksum=checksum)
    return path


def write_table(path: Path, name: str = "REDSHIFTS", **columns: Any) -> Path:
    formats = {"i": "K", "f": "D", "U": "20A", "b": "L"}
    made = [fits.Column(k, formats[np.asarray(v).dtype.kind], array=np.asarray(v)) for k, v in columns.items()]
    fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(made, name=name)]).writeto(path)
    return path


# --- real files ----------------------------------------------------------------------------------------------------


def test_every_file_is_read_or_named(folder: Path) -> None:
    source = pickle.loads(pickle.dumps(DesiCoadds(Desi(path=str(folder), catalog="QSO_cat_fuji_dark_tile.fits.gz"))))
    pieces = source.pieces()
    assert {p.name: len(p) for p in pieces} == dict(zip([*COADDS, "missing_z_color.fits"], [5, 1, 1, 2], strict=True))
    for piece in pieces:
        if piece.name == "missing_z_color.fits":
            with pytest.raises(SourceError, match=r"missing_z_color.fits: holds FIBERMAP; expected B_FLUX"):
                source.read(piece)
            continue
        spectra, columns = source.read(piece)
        assert {len(values) for values in columns.values()} == {len(spectra)} == {len(piece)}
        assert not columns["status"].any()
        with fits.open(folder / piece.name) as units:
            np.testing.assert_array_equal(columns["id"], units["FIBERMAP"].data["TARGETID"])
            np.testing.assert_array_equal(columns["ra"], units["FIBERMAP"].data["TARGET_RA"])


def test_redshifts_of_the_real_files(folder: Path) -> None:
    z = [0.36874355163716493, 0.007269671851219614]
    for name, expected in zip(COADDS[1:], z, strict=True):
        _, columns = read_all(folder / name)
        assert columns["z"].tolist() == [expected]
        assert columns["class"].tolist() == ["GALAXY"]
        assert 0.02 < columns["ebv"][0] < 0.06
        assert columns["ebv"].dtype == np.float32
    _, columns = read_all(folder / COADDS[0], str(folder / "QSO_cat_fuji_dark_tile.fits.gz"))
    expected_z = [2.116627083471065, 2.2250172468615674, 2.228644154277362, 3.035649236339306, 2.9985226386691486]
    assert columns["z"].tolist() == expected_z
    assert columns["class"].tolist() == ["QSO"] * 5
    assert np.isnan(columns["ebv"]).all()
    _, columns = read_all(folder / COADDS[0])
    assert (columns["status"] == Status.NO_REDSHIFT).all()
    assert np.isnan(columns["z"]).all()


def test_a_catalog_that_the_settings_do_not_name_is_set_aside(folder: Path) -> None:
    source = DesiCoadds(Desi(path=str(folder)))
    piece = next(p for p in source.pieces() if p.name.startswith("QSO_cat"))
    assert len(piece) == 1
    with pytest.raises(SourceError, match="holds QSO_CAT; expected a DESI coadd"):
        source.read(piece)


@pytest.mark.parametrize("name", COADDS)
def test_pixels_agree_with_a_plain_read(folder: Path, name: str) -> None:
    spectra, _ = read_all(folder / name)
    total, weight = np.zeros((2, len(spectra), GRID.pixels))
    with fits.open(folder / name) as units:
        for arm in "BRZ":
            where = np.abs(GRID.wave[None] - units[f"{arm}_WAVELENGTH"].data[:, None]).argmin(axis=1)
            np.testing.assert_allclose(GRID.wave[where], units[f"{arm}_WAVELENGTH"].data, atol=1e-3)
            ivar = np.where(units[f"{arm}_MASK"].data == 0, units[f"{arm}_IVAR"].data, 0).astype(float)
            total[:, where] += units[f"{arm}_FLUX"].data * ivar
            weight[:, where] += ivar
    np.testing.assert_allclose(spectra.ivar, weight, rtol=1e-6)
    np.testing.assert_allclose(spectra.flux[weight > 0], (total / weight)[weight > 0], rtol=1e-5, atol=1e-6)
    assert spectra.flux.dtype.isnative
    assert spectra.good.all()


def test_pixels_agree_with_specutils(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # specutils and its readers warn about themselves
        from specutils import SpectrumList

        arms = SpectrumList.read(folder / COADDS[1], format="DESI coadd")
    spectra, _ = read_all(folder / COADDS[1])
    assert len(arms) == 3
    shared = np.zeros(GRID.pixels, int)
    places = []
    for arm in arms:
        wave = arm.spectral_axis.to_value("Angstrom")
        places.append(np.rint((wave - 3600) / 0.8).astype(int))
        np.testing.assert_allclose(GRID.wave[places[-1]], wave, atol=1e-3)
        shared[places[-1]] += 1
    assert (shared == 2).sum() == 51 + 126
    for arm, place in zip(arms, places, strict=True):
        alone = (shared[place] == 1) & (arm.uncertainty.array[0] > 0)
        np.testing.assert_array_equal(spectra.flux[0, place[alone]], arm.flux.value[0, alone])
        np.testing.assert_array_equal(spectra.ivar[0, place[alone]], arm.uncertainty.array[0, alone])


# --- joining -------------------------------------------------------------------------------------------------------


def test_arms_are_joined_by_inverse_variance(tmp_path: Path) -> None:
    count = len(IDS)
    ivar = np.full((count, 2326), 6, np.float32)
    flux = np.full((count, 2326), 5, np.float32)
    mask = np.zeros((count, 2326), np.uint32)
    mask[0, 3], mask[1, 4], ivar[2, 5], ivar[3, 6] = 1, 1 << 31, np.nan, -1
    flux[0, 7] = np.inf
    new = {"R_FLUX": fits.ImageHDU(flux), "R_IVAR": fits.ImageHDU(ivar), "R_MASK": fits.ImageHDU(mask)}
    spectra, _ = read_all(write(tmp_path / "coadd-a.fits", **new))
    first = 2700  # 5760 Å
    own = np.arange(1, 5)[:, None] * np.ones(51)
    expected, total = (2 * own + 6 * 5) / 8, np.full((count, 51), 8.0)
    for row, pixel in [(0, 3), (1, 4), (2, 5), (3, 6), (0, 7)]:
        expected[row, pixel], total[row, pixel] = own[row, pixel], 2
    np.testing.assert_allclose(spectra.flux[:, first : first + 51], expected, rtol=1e-7)
    np.testing.assert_array_equal(spectra.ivar[:, first : first + 51], total)
    assert (spectra.flux[:, first - 1] == np.arange(1, 5)).all()
    assert (spectra.flux[:, first + 51] == 5).all()


@pytest.mark.parametrize("arm", ["B", "R", "Z"])
def test_a_missing_arm_leaves_no_data(tmp_path: Path, arm: str) -> None:
    gone = {f"{arm}_{part}": None for part in ("WAVELENGTH", "FLUX", "IVAR", "MASK")}
    spectra, columns = read_all(write(tmp_path / "coadd-a.fits", **gone))
    covered = np.zeros(GRID.pixels, bool)
    for other, (first, pixels) in ARMS.items():
        if other != arm:
            start = round((first - 3600) / 0.8)
            covered[start : start + pixels] = True
    assert (spectra.good == covered).all()
    assert (columns["status"] == Status.NO_REDSHIFT).all()


def test_a_coadd_that_is_joined_already_and_one_without_masks(tmp_path: Path) -> None:
    gone = {f"{arm}_{part}": None for arm in ARMS for part in ("WAVELENGTH", "FLUX", "IVAR", "MASK")}
    flux = np.arange(4 * 7781, dtype=np.float32).reshape(4, 7781)
    joined = {
        "BRZ_WAVELENGTH": fits.ImageHDU(3600 + 0.8 * np.arange(7781)),
        "BRZ_FLUX": fits.ImageHDU(flux),
        "BRZ_IVAR": fits.ImageHDU(np.ones((4, 7781), np.float32)),
    }
    spectra, _ = read_all(write(tmp_path / "coadd-a.fits", **gone, **joined))
    np.testing.assert_array_equal(spectra.flux, flux)
    assert (spectra.ivar == 1).all()


def test_a_compressed_mask_is_unpacked(tmp_path: Path) -> None:
    mask = np.zeros((4, 2751), np.int32)
    mask[2, 100] = 4
    path = write(tmp_path / "coadd-a.fits", B_MASK=fits.CompImageHDU(mask), checksum=True)
    spectra, _ = read_all(path)
    assert np.argwhere(~spectra.good).tolist() == [[2, 100]]


def test_rows_of_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "coadd-a.fits", checksum=True)
    whole, all_columns = read_all(tmp_path)
    monkeypatch.setattr("distspec.sources.desi.PIECE_ROWS", 3)
    source = DesiCoadds(Desi(path=str(tmp_path)))
    pieces = source.pieces()
    assert [(p.start, p.stop) for p in pieces] == [(0, 3), (3, 4)]
    parts = [source.read(piece) for piece in pieces]
    np.testing.assert_array_equal(np.concatenate([s.rows for s, _ in parts]), [0, 1, 2, 3])
    np.testing.assert_array_equal(np.concatenate([s.flux for s, _ in parts]), whole.flux)
    np.testing.assert_array_equal(np.concatenate([c["id"] for _, c in parts]), all_columns["id"])


# --- targets -------------------------------------------------------------------------------------------------------


def test_redshifts_are_joined_on_the_exact_target(tmp_path: Path) -> None:
    write(tmp_path / "coadd-a.fits")
    # 2⁵³ and 2⁵³ + 1 are one number in double precision.
    write_table(
        tmp_path / "redrock-a.fits",
        TARGETID=np.array([2**53, 2**62 + 3, -7, 2**53 + 1]),
        Z=[9.0, 0.4, 0.3, 0.2],
        ZWARN=[0, 1 << 7, 1, 4],
        SPECTYPE=["QSO", "STAR", "GALAXY", "GALAXY"],
        SUBTYPE=["", "M", "", ""],
    )
    write_table(tmp_path / "cat.fits", name="CAT", targetid=IDS[:2], z=[0.1, 7.0])
    _, columns = read_all(tmp_path, "cat.fits")
    assert columns["id"].tolist() == IDS.tolist()
    assert columns["id"].dtype == np.int64
    assert columns["z"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert columns["zwarn"].tolist() == [0, 4, 1, 128]
    assert columns["class"].tolist() == ["", "GALAXY", "GALAXY", "STAR"]
    assert columns["subclass"].tolist() == ["", "", "", "M"]
    assert columns["status"].tolist() == [0, 0, Status.NOT_A_TARGET, Status.FIBER]


def test_targets_that_repeat(tmp_path: Path) -> None:
    ids = np.array([5, 5, 6, 7], np.int64)
    write(tmp_path / "coadd-a.fits", ids)
    write_table(tmp_path / "redrock-a.fits", TARGETID=[7, 6, 5, 6, 5], Z=[0.7, 0.6, 0.5, 0.61, 0.5])
    _, columns = read_all(tmp_path)
    np.testing.assert_array_equal(columns["z"], [0.5, 0.5, np.nan, 0.7])
    assert columns["status"].tolist() == [0, 0, Status.NO_REDSHIFT, 0]


def test_the_surveys_own_choice_among_repeats(tmp_path: Path) -> None:
    write(tmp_path / "coadd-a.fits", np.array([6], np.int64))
    chosen = {"TARGETID": [6, 6], "Z": [0.6, 0.61], "ZCAT_PRIMARY": [False, True]}
    write_table(tmp_path / "cat.fits", name="ZCATALOG", **chosen)
    assert read_all(tmp_path, str(tmp_path / "cat.fits"))[1]["z"].tolist() == [0.61]


def test_status_of_fibers_and_objects(tmp_path: Path) -> None:
    ivar = {f"{arm}_IVAR": fits.ImageHDU(np.ones((4, pixels), np.float32)) for arm, (_, pixels) in ARMS.items()}
    for unit in ivar.values():
        unit.data[3] = 0
    columns = [
        fits.Column("COADD_FIBERSTATUS", "J", array=[0, 1 << 9, 0, 0]),
        fits.Column("OBJTYPE", "3A", array=["TGT", "TGT", "SKY", "TGT"]),
        fits.Column("EBV", "E", array=[0.1, 0.0, np.nan, -1]),
    ]
    write(tmp_path / "coadd-a.fits", columns=columns, **ivar)
    write_table(tmp_path / "redrock-a.fits", TARGETID=IDS, Z=[0.1, 0.2, 0.3, np.nan])
    _, table = read_all(tmp_path)
    expected = [Status.OK, Status.FIBER, Status.NOT_A_TARGET, Status.DEAD | Status.NO_REDSHIFT]
    assert table["status"].tolist() == expected
    np.testing.assert_array_equal(table["ebv"], np.array([0.1, np.nan, np.nan, np.nan], np.float32))


# --- files ---------------------------------------------------------------------------------------------------------


def test_companions_are_not_taken_for_coadds(tmp_path: Path) -> None:
    path = write(tmp_path / "coadd-a.fits")
    for name in ("redrock-b", "emline-a", "qso_mgii-a", "qso_qn-a", "spectra-a"):
        shutil.copy(path, tmp_path / f"{name}.fits")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "coadd-b.fits.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "broken.fits").write_bytes(b"<html>")
    source = DesiCoadds(Desi(path=str(tmp_path)))
    pieces = source.pieces()
    assert [(p.name, len(p)) for p in pieces] == [("broken.fits", 1), ("coadd-a.fits", 4), ("deep/coadd-b.fits.gz", 4)]
    np.testing.assert_array_equal(source.read(pieces[1])[0].flux, source.read(pieces[2])[0].flux)
    with pytest.raises(SourceError, match="a web page"):
        source.read(pieces[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"FIBERMAP": None}, "expected a DESI coadd with a FIBERMAP"),
        ({"B_IVAR": None}, "expected B_IVAR beside B_FLUX"),
        ({"AIRORVAC": "air"}, "in air"),
        ({"B_WAVELENGTH": fits.ImageHDU(3600.3 + 0.8 * np.arange(2751))}, "miss the pixel centers"),
        ({"B_WAVELENGTH": fits.ImageHDU(3599.2 + 0.8 * np.arange(2751))}, "expected a range of"),
        ({"B_WAVELENGTH": fits.ImageHDU(3600 + 1.6 * np.arange(2751))}, "expected a range of"),
        ({"B_WAVELENGTH": fits.ImageHDU(np.full(2751, np.nan))}, "miss the pixel centers"),
        ({"B_WAVELENGTH": fits.ImageHDU(3600 + 0.8 * np.arange(2750))}, r"expected \(4, 2750\)"),
        ({"R_FLUX": fits.ImageHDU(np.zeros((3, 2326), np.float32))}, r"R_FLUX is \(3, 2326\)"),
        ({"Z_MASK": fits.ImageHDU(np.zeros((4, 2880), np.int32))}, r"Z_MASK is \(4, 2880\)"),
        (
            {"FIBERMAP": fits.BinTableHDU.from_columns([fits.Column("TARGETID", "D", array=[1.0])])},
            "TARGETID is stored",
        ),
        ({"FIBERMAP": fits.BinTableHDU.from_columns([fits.Column("FIBER", "J", array=[1])])}, "FIBERMAP of TARGETID"),
    ],
)
def test_wrong_contents_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "coadd-a.fits", **changes)
    with pytest.raises(SourceError, match=message) as caught:
        read_all(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_flux_unit_is_refused(tmp_path: Path) -> None:
    unit = fits.ImageHDU(np.zeros((4, 2751), np.float32))
    unit.header["BUNIT"] = "Jy"
    with pytest.raises(SourceError, match="flux in 'Jy'"):
        read_all(write(tmp_path / "coadd-a.fits", B_FLUX=unit))


def test_damage_is_noticed(tmp_path: Path) -> None:
    content = write(tmp_path / "coadd-a.fits", checksum=True).read_bytes()
    (tmp_path / "coadd-a.fits").write_bytes(content[:-5000])
    with pytest.raises(SourceError, match="truncated"):
        read_all(tmp_path)
    flux = np.full(2751, 3, ">f4").tobytes()
    start = content.index(flux)
    (tmp_path / "coadd-a.fits").write_bytes(content[:start] + b"\x41" + content[start + 1 :])
    with pytest.raises(SourceError, match="expected DATASUM"):
        read_all(tmp_path)


def test_a_damaged_redrock_file_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "coadd-a.fits")
    (tmp_path / "redrock-a.fits").write_bytes(b"")
    with pytest.raises(SourceError, match=r"redrock-a\.fits: the file is empty"):
        read_all(tmp_path)


def test_a_coadd_without_spectra_is_one_piece_that_fails(tmp_path: Path) -> None:
    write(tmp_path / "coadd-a.fits", np.zeros(0, np.int64))
    with pytest.raises(SourceError, match="0 spectra; expected 1"):
        read_all(tmp_path)


def test_a_size_that_no_file_can_have_is_not_believed(tmp_path: Path) -> None:
    content = write(tmp_path / "a.fits").read_bytes()
    old = b"NAXIS2  =                    4"
    content = content.replace(old, b"NAXIS2  =     4000000000000000", 1)
    (tmp_path / "coadd-a.fits").write_bytes(content)
    (tmp_path / "coadd-b.fits.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.fits").unlink()
    source = DesiCoadds(Desi(path=str(tmp_path)))
    assert [len(piece) for piece in source.pieces()] == [1, 1]
    for piece in source.pieces():
        with pytest.raises(SourceError, match="truncated"):
            source.read(piece)


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no file or folder .*nowhere"):
        DesiCoadds(Desi(path=str(tmp_path / "nowhere"))).pieces()
    with pytest.raises(SourceError, match=r"no \*\.fits or \*\.fits\.gz file"):
        DesiCoadds(Desi(path=str(tmp_path))).pieces()
    write_table(tmp_path / "redrock-a.fits", TARGETID=[1], Z=[0.1])
    with pytest.raises(SourceError, match=r"no coadd-\*\.fits"):
        DesiCoadds(Desi(path=str(tmp_path))).pieces()
    with pytest.raises(SourceError, match=r"no catalog file 'gone\.fits'"):
        DesiCoadds(Desi(path=str(tmp_path), catalog="gone.fits")).pieces()
