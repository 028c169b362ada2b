"""Write simulated spectra as the surveys write theirs, so that the readers can be driven at any size.

`write_sdss` makes one lite `spec` file an object, `write_plates` pairs of `spPlate` and `spZbest` files of the same
objects, `write_desi` pairs of `coadd` and `redrock` files; `write_specobj` and `write_zcatalog` are the catalogues that
go with them. The first three also write `truth.ecsv`: what is known about each object beyond its file, by the
identifier that the file gives (normal spectra have an empty `anomaly`, which astropy shows as masked).
Every file appears under its name only when it is complete.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from astropy.io import fits
from astropy.table import Table
from jaxtyping import Float32, Int64, Shaped

from distspec.errors import SourceError
from distspec.sources import Piece
from distspec.sources.simulation.instrument import sky_brightness
from distspec.sources.simulation.survey import SDSS_GRID, SimulatedSurvey
from distspec.sources.simulation.templates import INSTRUMENT_SIGMA
from distspec.spectra import LIGHT_SPEED, Columns, Spectra, WaveGrid

__all__ = [
    "DESI_ARMS",
    "sdss_identity",
    "write_desi",
    "write_plates",
    "write_sdss",
    "write_specobj",
    "write_zcatalog",
]

DESI_ARMS: Final[dict[str, WaveGrid]] = {
    "B": WaveGrid("linear", 3600.0, 0.8, 2751),
    "R": WaveGrid("linear", 5760.0, 0.8, 2326),
    "Z": WaveGrid("linear", 7520.0, 0.8, 2881),
}
"""Grids of DESI's three arms: 3600-5800, 5760-7620 and 7520-9824 Å."""

_FIBERS: Final = 640  # on an SDSS plate
_FIRST_PLATE: Final = 266
_LAST_PLATE: Final = (1 << 14) - 1
_RUN2D: Final = 26

_FIRST_TILE: Final = 1000
_NIGHT: Final = 20210514

_NO_DATA: Final = 1 << 24
"""Bit NODATA of SDSS's SPPIXMASK."""

_BROKEN_FIBER: Final = 1 << 16
"""Bit BROKENFIBER of DESI's FIBERSTATUS."""

# A(u, g, r, i, z) / E(B-V), Schlafly & Finkbeiner (2011), Table 6, in SDSS's own rounding.
_EXTINCTIONS: Final = np.array([4.239, 3.303, 2.285, 1.698, 1.263])


def sdss_identity(row: int) -> tuple[int, int, int, str]:
    """Give a row's plate, MJD, fiber and SPECOBJID, which packs the three as SDSS does.

    References:
        https://www.sdss4.org/dr17/help/glossary/#specobj
    """
    plate, fiber = _FIRST_PLATE + row // _FIBERS, row % _FIBERS + 1
    if plate > _LAST_PLATE:
        limit = (_LAST_PLATE - _FIRST_PLATE + 1) * _FIBERS
        raise SourceError(f"row {row}; SDSS's identifiers have room for rows 0 to {limit}; write fewer rows")
    mjd = 51600 + row // _FIBERS % 3000
    return plate, mjd, fiber, str(plate << 50 | fiber << 38 | (mjd - 50000) << 24 | _RUN2D << 10)


def write_sdss(survey: SimulatedSurvey, folder: Path, rows: range | None = None) -> list[Path]:
    """Write one lite `spec-PLATE-MJD-FIBER.fits` an object.

    Layout: HDU 0 with the plate's keywords; HDU 1 COADD: flux, loglam, ivar, and_mask, or_mask, wdisp, sky, model;
    HDU 2 SPECOBJ: one row of the catalogue.

    Arguments:
        survey: what to write; its grid must be `SDSS_GRID`.
        folder: made if absent.
        rows: consecutive rows, all by default.

    Returns:
        The files, in the order of rows.

    Raises:
        SourceError: the rows are not in the survey, the grid is another, or there are more rows than plates.
    """
    if survey.grid != SDSS_GRID:
        raise SourceError(f"survey on {survey.grid}; SDSS files are sampled as {SDSS_GRID}")
    rows = _consecutive(survey, rows)
    sdss_identity(rows[-1])  # refused before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    sky = sky_brightness(survey.grid.wave)
    paths, tables = [], []
    for piece in _pieces(rows, 512):
        spectra, columns = survey.rows(piece.start, piece.stop)
        model = survey.model(piece.start, piece.stop)
        identities = [sdss_identity(int(row)) for row in spectra.rows]
        for index, (plate, mjd, fiber, _) in enumerate(identities):
            path = folder / f"spec-{plate:04d}-{mjd:05d}-{fiber:04d}.fits"
            one = {name: values[index] for name, values in columns.items()}
            _replace(path, _sdss_hdus(spectra[index : index + 1], one, model[index], sky, identities[index]).writeto)
            paths.append(path)
        tables.append(_truth(np.array([identity[3] for identity in identities]), spectra.rows, columns))
    _write_truth(folder, tables)
    return paths


def _sdss_hdus(
    spectrum: Spectra,
    row: dict[str, Any],
    model: Float32[np.ndarray, "pixels"],
    sky: Float32[np.ndarray, "pixels"],
    identity: tuple[int, int, int, str],
) -> fits.HDUList:
    plate, mjd, fiber, name = identity
    flux, ivar, grid = spectrum.flux[0], spectrum.ivar[0], spectrum.grid
    primary = fits.PrimaryHDU()
    for key, value, comment in (
        ("TELESCOP", "SDSS 2.5-M", "simulated"),
        ("MJD", mjd, "MJD of observation"),
        ("PLATEID", plate, "plate"),
        ("FIBERID", fiber, "fiber"),
        ("PLUG_RA", float(row["ra"]), "RA of object [deg]"),
        ("PLUG_DEC", float(row["dec"]), "dec of object [deg]"),
        ("VACUUM", True, "wavelengths are in vacuum"),
        ("COEFF0", round(float(np.log10(grid.first)), 6), "log10 of the first wavelength"),
        ("COEFF1", grid.step, "log10 dispersion per pixel"),
        ("BUNIT", "1E-17 erg/cm^2/s/Ang", "units"),
        ("RUN2D", str(_RUN2D), "spectro-2D reduction"),
    ):
        primary.header[key] = (value, comment)

    layout = [(key, ">f4") for key in ("flux", "loglam", "ivar")] + [("and_mask", ">i4"), ("or_mask", ">i4")]
    coadd = np.zeros(grid.pixels, dtype=layout + [(key, ">f4") for key in ("wdisp", "sky", "model")])
    coadd["flux"], coadd["ivar"], coadd["loglam"] = flux, ivar, np.log10(grid.wave)
    coadd["and_mask"] = coadd["or_mask"] = np.where(ivar > 0, 0, _NO_DATA)
    coadd["wdisp"] = INSTRUMENT_SIGMA / (LIGHT_SPEED * np.log(10.0) * grid.step)
    coadd["sky"], coadd["model"] = sky, model

    good = ivar > 0
    snr = float(np.median(flux[good] * np.sqrt(ivar[good]))) if good.any() else 0.0
    entries: tuple[tuple[str, str, Any], ...] = (
        ("SURVEY", "S6", "sdss"),
        ("SPECOBJID", "S22", f"{name:>22}"),
        ("RUN2D", "S6", str(_RUN2D)),
        ("PLATE", ">i4", plate),
        ("MJD", ">i4", mjd),
        ("FIBERID", ">i4", fiber),
        ("PLUG_RA", ">f8", row["ra"]),
        ("PLUG_DEC", ">f8", row["dec"]),
        ("CLASS", "S6", row["class"]),
        ("SUBCLASS", "S21", row["subclass"]),
        ("Z", ">f4", row["z"]),
        ("Z_ERR", ">f4", (1e-3 if row["class"] == "QSO" else 2e-5) * (1.0 + row["z"])),
        ("ZWARNING", ">i4", row["zwarn"]),
        ("SN_MEDIAN_ALL", ">f4", snr),
        ("EXTINCTION", "(5,)>f4", _EXTINCTIONS * float(row["ebv"])),
    )
    catalog = np.zeros(1, dtype=[(key, kind) for key, kind, _ in entries])
    for key, _, value in entries:
        catalog[key][0] = value
    return fits.HDUList([primary, fits.BinTableHDU(coadd, name="COADD"), fits.BinTableHDU(catalog, name="SPECOBJ")])


def write_plates(survey: SimulatedSurvey, folder: Path, rows: range | None = None) -> list[Path]:
    """Write pairs of `RUN2D/PLATE/spPlate-PLATE-MJD.fits` and `RUN2D/PLATE/RUN1D/spZbest-PLATE-MJD.fits`.

    A plate holds those of its fibers that the rows are about. Layout of a plate: images of flux, inverse variance, AND
    and OR mask, dispersion; the plug map; the sky. The rows of `spZbest` run against those of the plate.

    Arguments:
        survey: what to write; its grid must be `SDSS_GRID`.
        folder: made if absent.
        rows: consecutive rows, all by default.

    Returns:
        The `spPlate` files, in the order of rows.

    Raises:
        SourceError: the rows are not in the survey, the grid is another, or there are more rows than plates.
    """
    if survey.grid != SDSS_GRID:
        raise SourceError(f"survey on {survey.grid}; SDSS files are sampled as {SDSS_GRID}")
    rows = _consecutive(survey, rows)
    sdss_identity(rows[-1])  # refused before anything is written
    paths, tables = [], []
    for first in range(rows.start - rows.start % _FIBERS, rows.stop, _FIBERS):
        spectra, columns = survey.rows(max(first, rows.start), min(first + _FIBERS, rows.stop))
        plate, mjd, _, _ = sdss_identity(first)
        identities = [sdss_identity(int(row)) for row in spectra.rows]
        fibers = np.array([identity[2] for identity in identities], np.int32)
        path = folder / str(_RUN2D) / f"{plate:04d}" / f"spPlate-{plate:04d}-{mjd:05d}.fits"
        other = path.parent / str(_RUN2D) / f"spZbest-{plate:04d}-{mjd:05d}.fits"
        other.parent.mkdir(parents=True, exist_ok=True)
        _replace(other, _zbest_hdus(columns, plate, mjd, fibers).writeto)
        _replace(path, _plate_hdus(spectra, columns, plate, mjd, fibers).writeto)
        paths.append(path)
        tables.append(_truth(np.array([identity[3] for identity in identities]), spectra.rows, columns))
    _write_truth(folder, tables)
    return paths


def _plate_hdus(
    spectra: Spectra, columns: Columns, plate: int, mjd: int, fibers: Shaped[np.ndarray, "n"]
) -> fits.HDUList:
    primary = fits.PrimaryHDU(spectra.flux)
    for key, value in (
        ("PLATEID", plate),
        ("MJD", mjd),
        ("VACUUM", True),
        ("COEFF0", round(float(np.log10(spectra.grid.first)), 6)),
        ("COEFF1", spectra.grid.step),
        ("BUNIT", "1E-17 erg/cm^2/s/Ang"),
    ):
        primary.header[key] = value
    mask = np.where(spectra.ivar > 0, 0, _NO_DATA).astype(np.int32)
    width = np.full(spectra.flux.shape, INSTRUMENT_SIGMA / (LIGHT_SPEED * np.log(10.0) * spectra.grid.step), np.float32)
    sky = np.tile(sky_brightness(spectra.grid.wave).astype(np.float32), (len(spectra), 1))
    kinds = np.where(columns["class"] == "QSO", "QSO", "GALAXY")
    plugmap = {"HOLETYPE": np.full(len(fibers), "OBJECT"), "RA": columns["ra"], "DEC": columns["dec"]}
    images = [fits.ImageHDU(image) for image in (spectra.ivar, mask, mask, width)]
    table = _desi_table("PLUGMAP", plugmap | {"OBJTYPE": kinds, "FIBERID": fibers})
    return fits.HDUList([primary, *images, table, fits.ImageHDU(sky)])


def _zbest_hdus(columns: Columns, plate: int, mjd: int, fibers: Shaped[np.ndarray, "n"]) -> fits.HDUList:
    table = {
        "PLATE": np.full(len(fibers), plate, np.int32),
        "MJD": np.full(len(fibers), mjd, np.int32),
        "FIBERID": fibers,
        "PLUG_RA": columns["ra"],
        "PLUG_DEC": columns["dec"],
        "CLASS": columns["class"],
        "SUBCLASS": columns["subclass"],
        "Z": columns["z"].astype(np.float32),
        "ZWARNING": columns["zwarn"].astype(np.int32),
    }
    reverse = {name: values[::-1] for name, values in table.items()}
    return fits.HDUList([fits.PrimaryHDU(), _desi_table("", reverse)])


def write_specobj(survey: SimulatedSurvey, path: Path, rows: range | None = None) -> Path:
    """Write the catalogue that goes with `write_sdss` and `write_plates`.

    Columns: PLATE, MJD, FIBERID, PLUG_RA, PLUG_DEC, Z, ZWARNING, CLASS, SUBCLASS, SN_MEDIAN_ALL (NaN of dead fibers).
    """
    rows = _consecutive(survey, rows)
    spectra, columns = survey.rows(rows.start, rows.stop)
    plate, mjd, fiber = np.array([sdss_identity(row)[:3] for row in rows], np.int32).T
    table = {
        "PLATE": plate,
        "MJD": mjd,
        "FIBERID": fiber,
        "PLUG_RA": columns["ra"],
        "PLUG_DEC": columns["dec"],
        "Z": columns["z"].astype(np.float32),
        "ZWARNING": columns["zwarn"].astype(np.int32),
        "CLASS": columns["class"],
        "SUBCLASS": columns["subclass"],
        "SN_MEDIAN_ALL": _median_snr(spectra),
    }
    hdus = fits.HDUList([fits.PrimaryHDU(), _desi_table("SPECOBJ", table)])
    _replace(path, hdus.writeto)
    return path


def _median_snr(spectra: Spectra) -> Float32[np.ndarray, "n"]:
    snr = np.where(spectra.good, spectra.flux * np.sqrt(spectra.ivar), np.nan)
    dead = ~spectra.good.any(axis=1)
    snr[dead] = 0.0
    median = np.nanmedian(snr, axis=1)
    return np.where(dead, np.nan, median).astype(np.float32)


def write_desi(
    survey: SimulatedSurvey,
    folder: Path,
    rows: range | None = None,
    targets_per_file: int = 500,
    layout: Literal["flat", "healpix", "tile"] = "flat",
) -> list[Path]:
    """Write pairs of `coadd-main-dark-NNNNN.fits` and `redrock-main-dark-NNNNN.fits`.

    The objects are observed anew on each arm's grid. Layout of a coadd: FIBERMAP, then for each arm B, R, Z its
    WAVELENGTH, FLUX, IVAR and MASK (no RESOLUTION); of a redrock file: REDSHIFTS.

    Arguments:
        survey: what to write; its own grid does not matter.
        folder: made if absent.
        rows: consecutive rows, all by default.
        targets_per_file: spectra in a file, but for the last.
        layout: all in one folder, or as the survey's trees by healpix or by tile, with its names of files.

    Returns:
        The coadd files, in the order of rows.

    Raises:
        SourceError: the rows are not in the survey.
    """
    rows = _consecutive(survey, rows)
    folder.mkdir(parents=True, exist_ok=True)
    paths, tables = [], []
    for number, piece in enumerate(_pieces(rows, targets_per_file)):
        columns = survey.catalog(piece.start, piece.stop)
        arms = {arm: survey.on(grid).rows(piece.start, piece.stop)[0] for arm, grid in DESI_ARMS.items()}
        inside, stem = _desi_name(number, layout)
        (folder / inside).mkdir(parents=True, exist_ok=True)
        path = folder / inside / f"coadd-{stem}.fits"
        # The redshifts first: a reader that finds a coadd then finds them too.
        _replace(path.with_name(f"redrock-{stem}.fits"), _redrock_hdus(columns).writeto)
        _replace(path, _coadd_hdus(columns, arms, number, by_tile=layout == "tile").writeto)
        paths.append(path)
        tables.append(_truth(columns["id"], np.arange(piece.start, piece.stop), columns))
    _write_truth(folder, tables)
    return paths


def _desi_name(number: int, layout: str) -> tuple[str, str]:
    """Give the folder and the stem of a pair of files."""
    if layout == "healpix":
        return f"healpix/main/dark/{number // 100}/{number}", f"main-dark-{number}"
    if layout == "tile":
        tile = _FIRST_TILE + number // 10
        return f"tiles/cumulative/{tile}/{_NIGHT}", f"{number % 10}-{tile}-thru{_NIGHT}"
    return "", f"main-dark-{number:05d}"


def write_zcatalog(survey: SimulatedSurvey, path: Path, rows: range | None = None, targets_per_file: int = 500) -> Path:
    """Write the catalogue, as `zall-pix` files are, that goes with `write_desi` by healpix."""
    rows = _consecutive(survey, rows)
    columns = survey.catalog(rows.start, rows.stop)
    table = {
        "TARGETID": columns["id"],
        "SURVEY": np.full(len(rows), "main"),
        "PROGRAM": np.full(len(rows), "dark"),
        "HEALPIX": (np.arange(len(rows)) // targets_per_file).astype(np.int32),
        "Z": columns["z"],
        "ZWARN": columns["zwarn"],
        "SPECTYPE": columns["class"].astype("U6"),
        "ZCAT_PRIMARY": np.ones(len(rows), bool),
    }
    _replace(path, fits.HDUList([fits.PrimaryHDU(), _desi_table("ZCATALOG", table)]).writeto)
    return path


def _coadd_hdus(columns: Columns, arms: dict[str, Spectra], number: int, by_tile: bool) -> fits.HDUList:
    primary = fits.PrimaryHDU()
    fibermap = _fibermap(columns)
    facts: dict[str, Any] = {"SPGRP": "healpix", "SPGRPVAL": number, "SURVEY": "main", "PROGRAM": "dark"}
    if by_tile:
        tile, petal = _FIRST_TILE + number // 10, number % 10
        facts |= {"SPGRP": "cumulative", "SPGRPVAL": _NIGHT, "NIGHT": _NIGHT, "TILEID": tile, "PETAL": petal}
        count = len(columns["id"])
        fibermap |= {"TILEID": np.full(count, tile), "FIBER": (petal * 500 + np.arange(count)).astype(np.int32)}
    for key, value in facts.items():
        primary.header[key] = value
    hdus = [primary, _desi_table("FIBERMAP", fibermap)]
    for arm, spectra in arms.items():
        wave = fits.ImageHDU(spectra.grid.wave, name=f"{arm}_WAVELENGTH")
        wave.header["BUNIT"] = "Angstrom"
        flux = fits.ImageHDU(spectra.flux, name=f"{arm}_FLUX")
        flux.header["BUNIT"] = "10**-17 erg/(s cm2 Angstrom)"
        ivar = fits.ImageHDU(spectra.ivar, name=f"{arm}_IVAR")
        ivar.header["BUNIT"] = "10**+34 (s2 cm4 Angstrom2) / erg2"
        mask = fits.ImageHDU((spectra.ivar == 0).astype(np.int32), name=f"{arm}_MASK")
        hdus += [wave, flux, ivar, mask]
    return fits.HDUList(hdus)


def _fibermap(columns: Columns) -> dict[str, np.ndarray]:
    n = len(columns["id"])
    return {
        "TARGETID": columns["id"],
        "COADD_FIBERSTATUS": np.where(columns["status"] != 0, _BROKEN_FIBER, 0).astype(np.int32),
        "TARGET_RA": columns["ra"],
        "TARGET_DEC": columns["dec"],
        "OBJTYPE": np.full(n, "TGT"),
        "EBV": columns["ebv"],
        # LRG, QSO, MWS_ANY: bits of DESI_TARGET.
        "DESI_TARGET": np.select([columns["class"] == "QSO", columns["class"] == "STAR"], [1 << 2, 1 << 61], 1 << 0),
    }


def _redrock_hdus(columns: Columns) -> fits.HDUList:
    kind = columns["class"]
    # Redrock names a star's letter only, and says by which quasar templates a redshift was found.
    letter = np.where(columns["subclass"] == "WD", "WD", columns["subclass"].astype("U1"))
    quasar = np.where(columns["z"] < 1.6, "LOZ", "HIZ")
    table = {
        "TARGETID": columns["id"],
        "Z": columns["z"],
        "ZERR": np.where(kind == "QSO", 1e-3, 2e-5) * (1.0 + columns["z"]),
        "ZWARN": columns["zwarn"],
        "SPECTYPE": kind.astype("U6"),
        "SUBTYPE": np.select([kind == "STAR", kind == "QSO"], [letter, quasar], "").astype("U20"),
        "DELTACHI2": np.where(columns["zwarn"] == 0, 500.0, 5.0),
    }
    return fits.HDUList([fits.PrimaryHDU(), _desi_table("REDSHIFTS", table)])


def _desi_table(name: str, columns: dict[str, np.ndarray]) -> fits.BinTableHDU:
    # An empty text column would be stored with no width at all.
    return fits.BinTableHDU(Table({key: _text(values) for key, values in columns.items()}), name=name)


def _text(values: np.ndarray) -> np.ndarray:
    return values.astype(f"S{max(values.dtype.itemsize // 4, 1)}") if values.dtype.kind == "U" else values


def _consecutive(survey: SimulatedSurvey, rows: range | None) -> range:
    rows = range(survey.settings.spectra) if rows is None else rows
    if not len(rows) or rows.step != 1 or rows.start < 0 or rows.stop > survey.settings.spectra:
        raise SourceError(f"{rows}; expected consecutive rows between 0 and {survey.settings.spectra}")
    return rows


def _pieces(rows: range, size: int) -> list[Piece]:
    return [Piece("rows", first, min(first + size, rows.stop)) for first in range(rows.start, rows.stop, size)]


def _truth(names: np.ndarray, rows: Int64[np.ndarray, "n"], columns: Columns) -> Table:
    kept = ("z", "truth_z", "class", "subclass", "status", "anomaly", "anomaly_wave")
    return Table({"id": names, "row": rows} | {name: columns[name] for name in kept})


def _write_truth(folder: Path, tables: list[Table]) -> None:
    whole = Table({name: np.concatenate([np.asarray(t[name]) for t in tables]) for name in tables[0].colnames})
    whole["anomaly_wave"].description = "Windows (low, high), vacuum Angstrom in the rest frame of z; NaN where unused"
    _replace(folder / "truth.ecsv", lambda path: whole.write(path, format="ascii.ecsv"))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under a hidden name first: a reader never sees half a file, and an interrupted run leaves none."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
