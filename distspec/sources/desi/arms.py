"""The pixels of DESI files: exposures summed to one spectrum a target, and three arms joined on one grid."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from distspec.errors import SourceError
from distspec.sources.conventions import check_flux_unit, pixel_numbers, refuse_air
from distspec.sources.desi.targets import fiber_status, is_unfit_for
from distspec.sources.files.fits import FitsFile, Unit
from distspec.spectra import WaveGrid

__all__ = ["GRID", "Rows", "choose_rows", "read_arms"]

GRID = WaveGrid("linear", 3600.0, 0.8, 7781)
"""3600-9824 Å, from the first pixel of the b arm to the last of z."""

_BLOCK = 4096
"""Exposures that are read at once."""


@dataclass(frozen=True)
class Rows:
    """Spectra of a file, and the rows of the file that each is made of.

    Arguments:
        table: columns of the FIBERMAP, one row a spectrum.
        members: rows of the file, those of one spectrum together.
        edges: where in `members` each spectrum begins, and the end.
        unfit: for each arm the members that must not enter the sum; None of a coadd.
    """

    table: dict[str, Any]
    members: Int64[np.ndarray, "rows"]
    edges: Int64[np.ndarray, "n+1"]
    unfit: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.edges) - 1

    def part(self, start: int, stop: int) -> "Rows":
        """Give a run of these spectra."""
        return self.take(np.arange(start, min(stop, len(self))))

    def take(self, chosen: Int64[np.ndarray, "m"]) -> "Rows":
        """Give some of these spectra, in the order given."""
        counts = np.diff(self.edges)[chosen]
        edges = np.concatenate([[0], np.cumsum(counts)])
        inside = np.arange(edges[-1]) - np.repeat(edges[:-1] - self.edges[:-1][chosen], counts)
        unfit = None if self.unfit is None else {arm: values[inside] for arm, values in self.unfit.items()}
        table = {name: values[chosen] for name, values in self.table.items()}
        return Rows(table, self.members[inside], edges, unfit)


def choose_rows(table: dict[str, Any], exposures: bool) -> Rows:
    """Give one row a spectrum; where the file holds exposures, those of one target together, by first appearance.

    The fiber status of a target is as the pipeline makes it: the bits that all of the good exposures have, or any
    where none is good.
    """
    ids = table["targetid"]
    if not exposures:
        return Rows(dict(table), np.arange(len(ids)), np.arange(len(ids) + 1))
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    number = rank[inverse]
    members = np.argsort(number, kind="stable")
    edges = np.searchsorted(number[members], np.arange(len(first) + 1))
    joined = {name: values[np.sort(first)] for name, values in table.items()}
    if not len(ids):
        return Rows(joined, members, edges, {})
    for name in {"tileid", "fiber"} & table.keys():
        values = table[name][members].astype(np.int64)
        low, high = np.minimum.reduceat(values, edges[:-1]), np.maximum.reduceat(values, edges[:-1])
        joined[name] = np.where(low == high, low, -1)
    bits = table.get("fiberstatus", np.zeros(len(ids), np.int64))[members].astype(np.int64)
    good = fiber_status(bits) == 0
    common = np.bitwise_and.reduceat(np.where(good, bits, -1), edges[:-1])
    every = np.bitwise_or.reduceat(bits, edges[:-1])
    joined["coadd_fiberstatus"] = np.where(np.logical_or.reduceat(good, edges[:-1]), common, every)
    return Rows(joined, members, edges, {arm: is_unfit_for(arm, bits) for arm in ("B", "R", "Z", "BRZ")})


def read_arms(
    file: FitsFile, total: int, rows: Rows
) -> tuple[Float32[np.ndarray, "n pixels"], Float32[np.ndarray, "n pixels"]]:
    """Read all arms of some spectra and join them on the grid.

    Arguments:
        file: a coadd or spectra file.
        total: rows of its FIBERMAP.
        rows: the spectra.

    Raises:
        SourceError: an arm is incomplete, off the grid or not in the survey's unit.
    """
    arms = [arm for arm in ("B", "R", "Z") if file.find(f"{arm}_FLUX")]
    if not arms and file.find("BRZ_FLUX"):
        arms = ["BRZ"]
    if not arms:
        raise SourceError(f"{file.path}: holds {file.contents}; expected B_FLUX, R_FLUX, Z_FLUX or BRZ_FLUX")
    refuse_air(file.units[0].header)
    flux = np.zeros((len(rows), GRID.pixels), np.float32)
    ivar = np.zeros((len(rows), GRID.pixels), np.float32)
    covered = 0
    for arm in arms:
        first, units = _find_arm(file, arm, total)
        arm_flux, arm_ivar = _read_arm(file, units, rows) if rows.unfit is None else _sum_arm(file, arm, units, rows)
        last = first + arm_flux.shape[1]
        shared = min(max(covered - first, 0), arm_flux.shape[1])
        _join(
            flux[:, first : first + shared], ivar[:, first : first + shared], arm_flux[:, :shared], arm_ivar[:, :shared]
        )
        flux[:, first + shared : last] = arm_flux[:, shared:]
        ivar[:, first + shared : last] = arm_ivar[:, shared:]
        covered = max(covered, last)
    return flux, ivar


def _join(
    flux: Float32[np.ndarray, "n shared"],
    ivar: Float32[np.ndarray, "n shared"],
    other_flux: Float32[np.ndarray, "n shared"],
    other_ivar: Float32[np.ndarray, "n shared"],
) -> None:
    """Replace flux and ivar by the weighted mean with another arm's, Σ w f / Σ w, and the summed weight Σ w."""
    # In double precision the product of two singles is exact, so that a pixel of one arm keeps its flux to the bit.
    weight, other = ivar.astype(np.float64), other_ivar.astype(np.float64)
    total = weight + other
    mean = np.divide(flux * weight + other_flux * other, total, out=np.zeros_like(total), where=total > 0)
    flux[:], ivar[:] = mean, total


def _find_arm(file: FitsFile, arm: str, total: int) -> tuple[int, list[Unit]]:
    """Find one arm: its first pixel on the grid, and its units of flux, ivar and, if there is one, mask."""
    units = []
    for part in ("FLUX", "IVAR", "MASK"):
        unit = file.find(f"{arm}_{part}")
        if unit is None and part != "MASK":
            raise SourceError(f"{file.path}: holds {file.contents}; expected {arm}_{part} beside {arm}_FLUX")
        units += [unit] if unit else []
    scale = file.find(f"{arm}_WAVELENGTH")
    if scale is None:
        raise SourceError(f"{file.path}: holds {file.contents}; expected {arm}_WAVELENGTH beside {arm}_FLUX")
    refuse_air(scale.header)
    check_flux_unit(units[0].header.get("BUNIT"), units[0].place)
    wave = file.image(scale)
    pixel = pixel_numbers(GRID.position(wave.astype(np.float64)), scale.place, f"a range of {GRID}")
    if wave.ndim != 1 or not len(pixel) or (np.diff(pixel) != 1).any() or pixel[0] < 0 or pixel[-1] >= GRID.pixels:
        raise SourceError(f"{scale.place}: {wave.shape} wavelengths; expected a range of {GRID}")
    for unit in units:
        shape = unit.image_shape
        if shape != (total, len(pixel)):
            raise SourceError(f"{unit.place}: {unit.name} is {shape}; expected {(total, len(pixel))} as FIBERMAP says")
    return int(pixel[0]), units


def _read_arm(
    file: FitsFile, units: list[Unit], rows: Rows
) -> tuple[Float32[np.ndarray, "n m"], Float32[np.ndarray, "n m"]]:
    """Read rows of one arm; flux and ivar are 0 where a bit of its mask is set, or where ivar or flux is no use."""
    if not len(rows.members):
        empty = np.zeros((0, units[0].image_shape[1]), np.float32)
        return empty, empty
    start, stop = int(rows.members.min()), int(rows.members.max()) + 1
    at = rows.members - start
    whole = len(at) == stop - start and bool((np.diff(at) == 1).all())
    with np.errstate(over="ignore"):
        images = [file.image(unit, start, stop) for unit in units]
        flux, ivar = (image.astype(np.float32, copy=False) for image in images[:2])
    flux, ivar = (flux, ivar) if whole else (flux[at], ivar[at])
    bad = ~((ivar > 0) & np.isfinite(ivar) & np.isfinite(flux))
    for mask in images[2:]:
        bad |= (mask if whole else mask[at]) != 0
    flux[bad], ivar[bad] = 0, 0
    return flux, ivar


def _sum_arm(
    file: FitsFile, arm: str, units: list[Unit], rows: Rows
) -> tuple[Float32[np.ndarray, "n m"], Float32[np.ndarray, "n m"]]:
    """Read the exposures of one arm, and give their weighted means and summed weights."""
    assert rows.unfit is not None
    pixels = units[0].image_shape[1]
    total, weight = np.zeros((2, len(rows), pixels))
    number = np.repeat(np.arange(len(rows)), np.diff(rows.edges))
    order = np.argsort(rows.members, kind="stable")
    for start in range(0, len(order), _BLOCK):
        block = np.sort(order[start : start + _BLOCK])
        one = Rows({}, rows.members[block], np.arange(len(block) + 1))
        flux, ivar = _read_arm(file, units, one)
        ivar[rows.unfit[arm][block]] = 0
        owners, begin = np.unique(number[block], return_index=True)
        doubled = ivar.astype(np.float64)
        weight[owners] += np.add.reduceat(doubled, begin)
        total[owners] += np.add.reduceat(flux * doubled, begin)
    mean = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    return mean.astype(np.float32), weight.astype(np.float32)
