"""DESI's bit masks: what a fiber was pointed at and why, and what is wrong with it.

The bits of the target classes differ between the main survey, the three rounds of survey validation and commissioning,
and each has columns of its own. A file of survey validation holds the main survey's columns too, with zeros.

References:
    desitarget: data/targetmask.yaml, sv1/data/sv1_targetmask.yaml, sv2, sv3 and cmx likewise
    desispec: maskbits.py (fibermask), fiberbitmasking.py (which of its bits the coaddition takes for fatal)
    https://desidatamodel.readthedocs.io/en/latest/bitmasks.html
"""

from functools import reduce
from operator import or_
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Int32, Int64

from distspec.errors import ConfigError
from distspec.spectra import Status

__all__ = ["TARGET_COLUMNS", "check_classes", "fiber_status", "has_class", "is_unfit_for", "target_status"]

_BGS: Final = {"BGS_FAINT": 0, "BGS_BRIGHT": 1}

_BGS_MAIN: Final = _BGS | {"BGS_WISE": 2, "BGS_FAINT_HIP": 3}

_MWS: Final = {"MWS_BROAD": 0, "MWS_WD": 1, "MWS_NEARBY": 2, "MWS_BHB": 6, "MWS_MAIN_BLUE": 8, "MWS_MAIN_RED": 11}

_BACKUP: Final = {"BACKUP_BRIGHT": 60, "BACKUP_FAINT": 61, "BACKUP_VERY_FAINT": 62}

_DESI: Final = {"LRG": 0, "ELG": 1, "QSO": 2, "BGS_ANY": 60, "MWS_ANY": 61, "SCND_ANY": 62}

CLASSES: Final[dict[str, dict[str, int]]] = {
    "desi_target": _DESI | {"LGE": 3, "QSO_HIZ": 4, "ELG_LOP": 5, "ELG_HIP": 6, "ELG_VLO": 7},
    "bgs_target": _BGS_MAIN,
    "mws_target": _MWS
    | _BACKUP
    | {"MWS_FAINT_BLUE": 14, "MWS_FAINT_RED": 17, "BACKUP_DIB": 57, "BACKUP_GIANT_LOP": 58, "BACKUP_GIANT": 59},
    "sv1_desi_target": _DESI
    | {"LRG_OPT": 3, "LRG_IR": 4, "LRG_SV_OPT": 5, "LRG_SV_IR": 6, "LOWZ_FILLER": 7}
    | {"ELG_SV_GTOT": 8, "ELG_SV_GFIB": 9, "ELG_FDR_GTOT": 10, "ELG_FDR_GFIB": 11}
    | {"QSO_COLOR_4PASS": 12, "QSO_RF_4PASS": 13, "QSO_COLOR_8PASS": 14, "QSO_RF_8PASS": 15}
    | {"QSO_HZ_F": 16, "QSO_Z5": 17},
    "sv1_bgs_target": _BGS | {"BGS_FAINT_EXT": 2, "BGS_LOWQ": 3, "BGS_FIBMAG": 4},
    "sv1_mws_target": {"MWS_MAIN_BROAD": 0, "MWS_WD": 1, "MWS_NEARBY": 2, "MWS_BHB": 6, "MWS_MAIN_FAINT": 14} | _BACKUP,
    "sv2_desi_target": _DESI | {"QSO_HIZ": 4},
    "sv2_bgs_target": _BGS_MAIN,
    "sv2_mws_target": _MWS | _BACKUP,
    "sv3_desi_target": _DESI | {"QSO_HIZ": 4, "ELG_LOP": 5, "ELG_HIP": 6},
    "sv3_bgs_target": _BGS_MAIN,
    "sv3_mws_target": _MWS | _BACKUP,
    "cmx_target": {"SV0_BGS": 8, "SV0_MWS": 9, "SV0_LRG": 10, "SV0_ELG": 11, "SV0_QSO": 12, "SV0_WD": 13}
    | {"SV0_QSO_Z5": 14, "MINI_SV_LRG": 53, "MINI_SV_ELG": 54, "MINI_SV_QSO": 55, "MINI_SV_BGS_BRIGHT": 56},
}
"""Bits of the science classes by column; those that only say in which imaging an object was found are left out."""

TARGET_COLUMNS: Final = tuple(CLASSES)

_DESI_STANDARDS: Final = 1 << 33 | 1 << 34 | 1 << 35
"""STD_FAINT, STD_WD, STD_BRIGHT; in an MWS column GAIA_STD_FAINT, GAIA_STD_WD, GAIA_STD_BRIGHT."""

_DESI_SKY: Final = 1 << 32 | 1 << 36 | 1 << 37
"""SKY, BAD_SKY, SUPP_SKY."""

_INFORMATIVE: Final = 1 << 49 | 1 << 50 | 1 << 51 | 1 << 52
"""NO_TARGET, BRIGHT_OBJECT, IN_BRIGHT_OBJECT, NEAR_BRIGHT_OBJECT."""

_MWS_ANY: Final = 1 << 61

_CMX_STANDARDS: Final = reduce(or_, (1 << bit for bit in (0, 1, 2, 3, 4, 5, 18, 26, 30, 33, 35, 42, 58)))
"""STD_GAIA, SV0_STD_FAINT, SV0_STD_BRIGHT, STD_TEST, STD_CALSPEC, STD_DITHER, M31_, ORI_ and ROS_STD_BRIGHT, STD_FAINT,
STD_BRIGHT, M33_STD_BRIGHT, STD_DITHER_GAIA."""

_SKY_ID: Final = 59
"""Bit of a TARGETID that marks a sky location."""

_UNASSIGNED: Final = 1 << 0

_HARMLESS_FIBER: Final = reduce(or_, (1 << bit for bit in (1, 3, 10, 12, 13, 14, 15)))
"""STUCKPOSITIONER, RESTRICTED, POORPOSITION, LOWTRANSMISSION, NEARCHARGETRAP, VARIABLETHRU, LOWEFFTIME: the pipeline
coadds exposures with these bits, and what they cost is in the inverse variance."""

_BAD_CAMERA: Final = {"B": 1 << 22, "R": 1 << 23, "Z": 1 << 24}
"""BADAMPB, BADAMPR, BADAMPZ: one arm is lost, the others are as good as ever."""

_ALL_CAMERAS: Final = reduce(or_, _BAD_CAMERA.values())

_BAD_FIBER: Final = 0xFFFFFFFF & ~(_UNASSIGNED | _HARMLESS_FIBER | _ALL_CAMERAS)


def check_classes(names: tuple[str, ...]) -> None:
    """Refuse target classes that no survey of DESI has.

    Raises:
        ConfigError: a name is unknown.
    """
    known = sorted({name for bits in CLASSES.values() for name in bits})
    for name in names:
        if name not in known:
            raise ConfigError(f"no DESI target class {name!r}; expected one of {', '.join(known)}")


def has_class(table: dict[str, Any], names: tuple[str, ...], survey: str) -> Bool[np.ndarray, "n"]:
    """Say which rows of a FIBERMAP are targets of any of these classes.

    Arguments:
        table: its columns among `TARGET_COLUMNS`, and perhaps others.
        names: classes, such as "LRG" or "BGS_BRIGHT".
        survey: "main", "special", "sv1", "sv2", "sv3", "cmx", or "" where that is not known.
    """
    count = len(next(iter(table.values())))
    found = np.zeros(count, bool)
    for column in _columns_of(table, survey):
        mask = reduce(or_, (1 << CLASSES[column][name] for name in names if name in CLASSES[column]), 0)
        found |= _bits(table[column]) & np.uint64(mask) != 0
    return found


def target_status(table: dict[str, Any]) -> Int32[np.ndarray, "n"]:
    """Set aside skies, and standard stars that no science program asked for as well.

    Arguments:
        table: columns of a FIBERMAP: `targetid`, and those of `objtype` and `TARGET_COLUMNS` that there are.
    """
    ids: Int64[np.ndarray, "n"] = table["targetid"]
    # Fibers without a target have negative numbers.
    aside = (ids < 0) | (ids >> _SKY_ID & 1 != 0)
    science, calibration = np.zeros((2, len(ids)), bool)
    for column in _columns_of(table, ""):
        bits = _bits(table[column])
        if column == "cmx_target":
            calibrators, other = _CMX_STANDARDS | _DESI_SKY, _INFORMATIVE
        elif column.endswith("desi_target"):
            calibrators, other = _DESI_STANDARDS | _DESI_SKY, _INFORMATIVE
            # It is set for standards as well; the survey's own column says more.
            other |= _MWS_ANY if column.replace("desi", "mws") in table else 0
        else:
            calibrators, other = (_DESI_STANDARDS if "mws" in column else 0), 0
        calibration |= bits & np.uint64(calibrators) != 0
        science |= bits & np.uint64(0xFFFFFFFFFFFFFFFF & ~(calibrators | other)) != 0
    aside |= calibration & ~science
    status = np.zeros(len(ids), np.int32)
    if "objtype" in table:
        status[table["objtype"] == "BAD"] |= np.int32(Status.FIBER)
        aside |= (table["objtype"] != "TGT") & (table["objtype"] != "BAD")
    status[aside] |= np.int32(Status.NOT_A_TARGET)
    return status


def fiber_status(bits: Int64[np.ndarray, "n"]) -> Int32[np.ndarray, "n"]:
    """Set aside what the bits of FIBERSTATUS or COADD_FIBERSTATUS call unusable; unknown bits do too."""
    status = np.zeros(len(bits), np.int32)
    bad = (bits & _BAD_FIBER != 0) | (bits & _ALL_CAMERAS == _ALL_CAMERAS)
    status[bad] |= np.int32(Status.FIBER)
    status[bits & _UNASSIGNED != 0] |= np.int32(Status.NOT_A_TARGET)
    return status


def is_unfit_for(arm: str, bits: Int64[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Say which exposures a coaddition of this arm leaves out."""
    lost = _BAD_CAMERA.get(arm, _ALL_CAMERAS)
    return np.asarray((bits & (_BAD_FIBER | lost)) != 0)


def _columns_of(table: dict[str, Any], survey: str) -> list[str]:
    """Name the columns that say why an object was observed: the survey's own, or all where it is not known."""
    present = [column for column in TARGET_COLUMNS if column in table]
    prefix = {"main": "", "special": "", "sv1": "sv1_", "sv2": "sv2_", "sv3": "sv3_", "cmx": "cmx_"}.get(survey)
    if prefix is None:
        return present
    own = [
        column for column in present if column in (f"{prefix}{kind}target" for kind in ("desi_", "bgs_", "mws_", ""))
    ]
    return own or present


def _bits(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int64).view(np.uint64)
