"""Parquet tables with a spectrum a row: lists in columns, Multimodal Universe structs, HATS and nested-pandas trees.

All spectra must lie on one uniform grid, logarithmic or linear, in vacuum; it is recognized from the first ones. They
may begin and end anywhere on it, run backwards, have gaps or be padded: pixels are placed by their wavelengths and
nothing is resampled. A spectrum that does not fit is set aside with the reason in the column `note`; the others of its
file are read all the same. Rows are decoded a few at a time, from those columns only that are needed.

References:
    Multimodal Universe, https://arxiv.org/abs/2412.02527; columns of its DESI table,
    https://huggingface.co/datasets/UniverseTBD/mmu_desi_edr_sv3
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float32, Float64, Int64, Shaped

from distspec.config import Table
from distspec.errors import SourceError
from distspec.sources import Entry, Piece
from distspec.sources.files.parquet import Run, open_parquet, parquet_files, reading
from distspec.sources.files.places import Files
from distspec.sources.uniform import grid_between, on_grid, place_pixels, uniform_grid
from distspec.spectra import Columns, Spectra, Status, WaveGrid

__all__ = ["SpectrumTable"]

_FIRST_ROWS = 512
"""Spectra of the first file from which the grid is recognized."""

_WAVES = ("lambda", "wavelength", "wave", "loglam")
_IDS = ("object_id", "targetid", "specobjid", "obsid", "id")
_SCALARS = {
    "ra": ("ra", "target_ra", "plug_ra"),
    "dec": ("dec", "target_dec", "plug_dec"),
    "z": ("z", "redshift"),
    "zwarn": ("zwarn", "zwarning"),
    "class": ("class", "spectype"),
    "subclass": ("subclass", "subtype"),
    "ebv": ("ebv",),
}
_UNITS = {"Angstrom": 1.0, "nm": 10.0, "micron": 1e4}
_SURELY_ANGSTROM = (1000.0, 2600.0, 100_000.0)
"""Wavelengths are Å beyond doubt where the least is above the first and the greatest between the other two: numbers
from 1000 to 2600 could as well be near-infrared nm."""


@dataclass(frozen=True)
class _Names:
    """Where things are in the tables of one source.

    Arguments:
        spectrum: the column of structs that holds the arrays, or None for columns of the table itself.
        listed: whether that column holds lists of structs, not structs of lists.
        arrays: names of `flux`, `wave` and `ivar` or `error`, perhaps `mask`, by these roles.
        scalars: names of the columns that there are, by role, `id` among them.
        text_id: whether ids are text.
    """

    spectrum: str | None
    listed: bool
    arrays: dict[str, str]
    scalars: dict[str, str]
    text_id: bool

    @property
    def array_columns(self) -> list[str]:
        """What to read for the arrays."""
        if self.spectrum is None:
            return list(self.arrays.values())
        return [self.spectrum] if self.listed else [f"{self.spectrum}.{name}" for name in self.arrays.values()]


class SpectrumTable:
    """A Parquet file, a folder of them, or a HATS catalog.

    Columns beyond those of every source: `note` (text), why a row is set aside. `id` is text, or int64 where the
    table holds integers that fit. A mask is true, or not 0, where a pixel is bad.

    Arguments:
        settings: where the tables lie, and the names of what they hold.
    """

    def __init__(self, settings: Table) -> None:
        self.settings = settings
        self._files = Files(settings.path, "Parquet tables with a spectrum a row")
        self._run: Run | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the file that is open.
        return SpectrumTable, (self.settings,)

    def __repr__(self) -> str:
        return f"SpectrumTable({self.settings.path!r})"

    @cached_property
    def _listed(self) -> list[Entry]:
        return parquet_files(self._files)

    @cached_property
    def _names(self) -> _Names:
        return self._resolve(self._listed[0].name)

    def _resolve(self, name: str) -> _Names:
        place = self._files.place(name)
        with reading(place), open_parquet(self._files, name) as file:
            return _resolve(file.schema_arrow, self.settings, place)

    @cached_property
    def _first_waves(self) -> list[Float64[np.ndarray, "m"]]:
        """Wavelengths of the first spectra, in the unit of the table; NaN where padded."""
        name = self._listed[0].name
        waves: list[Float64[np.ndarray, "m"]] = []
        with reading(self._files.place(name)):
            run = Run(self._files, name, self._names.array_columns)
            for batch in run.take(0, _FIRST_ROWS):
                lengths, values = _array(batch, self._names, "wave")
                waves += [part for part in np.split(values, np.cumsum(lengths)[:-1]) if np.isfinite(part).any()]
            run.close()
        if not waves:
            raise SourceError(f"{self._place}: no wavelengths in the first {_FIRST_ROWS} rows; expected spectra")
        return waves

    @property
    def _place(self) -> str:
        return self._files.place(self._listed[0].name)

    @cached_property
    def _unit(self) -> str:
        if self.settings.wave_unit is not None:
            return self.settings.wave_unit
        return _recognize_unit(self._names.arrays["wave"], self._first_waves[0], self._place)

    @cached_property
    def grid(self) -> WaveGrid:
        """Observed-frame grid, in the range of the first spectra or of the settings.

        Raises:
            SourceError: the first file cannot be read, or its wavelengths are on no uniform grid or of unclear unit.
        """
        waves = [_to_angstrom(wave, self._unit) for wave in self._first_waves]
        grid = uniform_grid(waves[0])
        if grid is None:
            raise SourceError(
                f"{self._place}: the wavelengths of the first spectrum repeat, are uniform neither in λ nor in log λ, "
                "or are too few to tell; expected one uniform grid for all spectra"
            )
        # One that lies elsewhere, perhaps in another unit, must not stretch the range.
        fitting = [wave for wave in waves if on_grid(grid, wave)[1][np.isfinite(wave)].all()]
        first = self.settings.first or min(float(np.nanmin(wave)) for wave in fitting)
        last = self.settings.last or max(float(np.nanmax(wave)) for wave in fitting)
        if first >= last:
            raise SourceError(f"source.first = {first:g}, source.last = {last:g} Å; expected a range of {grid}")
        return grid_between(grid, first, last)

    def files(self) -> list[Entry]:
        """List the data files by name; only the first is opened, to know the grid.

        Raises:
            SourceError: there is no Parquet file, or the first is not a table of spectra that can be understood.
        """
        _ = self.grid
        return self._listed

    def count(self, name: str) -> int:
        """Count the rows of a file from its footer.

        Raises:
            SourceError: it is damaged or not Parquet.
        """
        with reading(self._files.place(name)), open_parquet(self._files, name) as file:
            return int(file.metadata.num_rows)

    def missing(self) -> list[str]:
        """Nothing can be missing: the tables are the catalog."""
        return []

    def identify(self, piece: Piece) -> Columns:
        """Give the catalog values of rows whose arrays cannot be read."""
        place = self._files.place(piece.name)
        try:
            with reading(place):
                run = Run(self._files, piece.name, list(self._names.scalars.values()))
                tables = [_columns(batch, self._names, self.settings) for batch in run.take(piece.start, piece.stop)]
                run.close()
        except SourceError:
            return {}
        if sum(len(table["id"]) for table in tables) != len(piece):
            return {}
        return {name: np.concatenate([table[name] for table in tables]) for name in tables[0] if name != "note"}

    def read(self, piece: Piece) -> tuple[Spectra, Columns]:
        """Read a run of rows of one file.

        Raises:
            SourceError: the file is damaged, or its columns differ from those of the first.
        """
        place = self._files.place(piece.name)
        flux, ivar = np.zeros((2, len(piece), self.grid.pixels), np.float32)
        tables: list[Columns] = []
        done = 0
        try:
            with reading(place):
                for batch in self._open(piece.name).take(piece.start, piece.stop):
                    rows = slice(done, done + batch.num_rows)
                    flux[rows], ivar[rows], reasons = self._spectra(batch)
                    columns = _columns(batch, self._names, self.settings)
                    _set_aside(columns, ivar[rows], reasons, place, piece.start + done)
                    tables.append(columns)
                    done += batch.num_rows
        except SourceError:
            self._close()
            raise
        if done != len(piece):
            raise SourceError(f"{place}: {done} rows from {piece.start} on; expected {len(piece)}")
        rows_read = np.arange(piece.start, piece.stop, dtype=np.int64)
        columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        return Spectra(rows_read, flux, ivar, self.grid), columns

    def _open(self, name: str) -> Run:
        """Open a file, or go on with the one that is open: pieces of a file are mostly read one after the other."""
        if self._run is None or self._run.name != name:
            self._close()
            if self._resolve(name) != self._names:
                raise SourceError(f"{self._files.place(name)}: has other columns or kinds of them than the first file")
            names = self._names
            self._run = Run(self._files, name, [*names.array_columns, *names.scalars.values()])
        return self._run

    def _close(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None

    def _spectra(
        self, batch: Any
    ) -> tuple[Float32[np.ndarray, "n pixels"], Float32[np.ndarray, "n pixels"], list[str]]:
        """Place the spectra of some rows on the grid; says why where that cannot be done."""
        arrays = {role: _array(batch, self._names, role) for role in self._names.arrays}
        lengths = arrays["flux"][0]
        reasons = ["a spectrum without pixels" if length == 0 else "" for length in lengths]
        for role, (others, _) in arrays.items():
            for row in np.flatnonzero((others != lengths) & (lengths > 0)):
                reasons[row] = reasons[row] or f"{lengths[row]} pixels of flux and {others[row]} of {role}"
        fits = np.array([not reason for reason in reasons], bool)
        if not fits.any():
            return *np.zeros((2, len(lengths), self.grid.pixels), np.float32), reasons
        kept = {
            role: values if fits.all() else values[np.repeat(fits, count)] for role, (count, values) in arrays.items()
        }
        wave = _to_angstrom(kept["wave"], self._unit)
        placed, weight, faults = place_pixels(self.grid, lengths[fits], wave, kept["flux"], _ivar(kept))
        flux, ivar = np.zeros((2, len(lengths), self.grid.pixels), np.float32)
        flux[fits], ivar[fits] = placed, weight
        for row, fault in zip(np.flatnonzero(fits), faults, strict=True):
            reasons[row] = fault
        return flux, ivar, reasons


def _recognize_unit(name: str, wave: Float64[np.ndarray, "m"], place: str) -> str:
    """Tell the unit of wavelengths where their values allow only one.

    Raises:
        SourceError: they allow several, or none.
    """
    low, high = np.nanmin(wave), np.nanmax(wave)
    least, between, most = _SURELY_ANGSTROM
    if name.lower().startswith("log") and np.log10(least) <= low and high <= np.log10(most):
        return "log10(Angstrom)"
    if least <= low and between <= high <= most:
        return "Angstrom"
    raise SourceError(
        f"{place}: {name} from {low:g} to {high:g}, in a unit that is not clear; expected Å, "
        "else source.wave_unit = 'Angstrom', 'nm', 'micron' or 'log10(Angstrom)'"
    )


def _to_angstrom(wave: Float64[np.ndarray, "m"], unit: str) -> Float64[np.ndarray, "m"]:
    with np.errstate(over="ignore"):
        return np.asarray(10.0**wave if unit == "log10(Angstrom)" else wave * _UNITS[unit])


def _resolve(schema: Any, settings: Table, place: str) -> _Names:
    """Find the columns that settings name, or that tables of spectra usually have."""
    spectrum = _find(schema.names, (settings.spectrum or "spectrum",), place)
    fields = None if spectrum is None else _fields(schema.field(spectrum).type)
    if fields is None and settings.spectrum is not None:
        found = "missing" if spectrum is None else str(schema.field(spectrum).type)
        raise SourceError(f"{place}: column {settings.spectrum!r} is {found}; expected a struct of lists")
    if fields is None:
        spectrum, fields = None, {field.name: field.type for field in schema}
    listed = spectrum is not None and not pa.types.is_struct(schema.field(spectrum).type)
    arrays = _resolve_arrays(fields, listed, settings, place)
    scalars = {role: name for role, wanted in _SCALARS.items() if (name := _find(schema.names, wanted, place))}
    wanted_id = (settings.id,) if settings.id else _IDS
    identity = _find(schema.names, wanted_id, place)
    if identity is None:
        raise SourceError(f"{place}: no column {' or '.join(wanted_id)}; name the column of ids with source.id")
    kind = schema.field(identity).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_floating(kind) or pa.types.is_nested(kind):
        raise SourceError(f"{place}: {identity} is {kind}; expected ids as integers or text, for a float loses digits")
    if "zwarn" in scalars and pa.types.is_boolean(schema.field(scalars["zwarn"]).type) and settings.zwarn_true is None:
        raise SourceError(
            f"{place}: {scalars['zwarn']} is true or false, which has been published with either meaning; "
            "expected source.zwarn_true = 'bad' or 'good'"
        )
    text = not pa.types.is_integer(kind) or pa.types.is_uint64(kind)
    return _Names(spectrum, listed, arrays, {"id": identity} | scalars, text)


def _resolve_arrays(fields: dict[str, Any], listed: bool, settings: Table, place: str) -> dict[str, str]:
    """Find the arrays by their roles among the fields of a struct, or the columns of the table."""
    noise = ("error", settings.error) if settings.error is not None else ("ivar", settings.ivar or "ivar")
    roles = {"flux": (settings.flux,), "wave": (settings.wave,) if settings.wave else _WAVES, noise[0]: (noise[1],)}
    arrays = {}
    for role, wanted in (roles | {"mask": ("mask",)}).items():
        found = _find(list(fields), wanted, place)
        if found is None and role == "mask":
            continue
        if found is None:
            hint = "; where there are standard deviations, name them with source.error" if role == "ivar" else ""
            raise SourceError(
                f"{place}: no array {' or '.join(wanted)}; there are {', '.join(list(fields)[:20])}{hint}"
            )
        kind = fields[found]
        inner = kind if listed else getattr(kind, "value_type", None) if _is_list(kind) else None
        if inner is None or not (
            pa.types.is_integer(inner) or pa.types.is_floating(inner) or pa.types.is_boolean(inner)
        ):
            raise SourceError(f"{place}: {found} is {kind}; expected a list of numbers in each row")
        arrays[role] = found
    if "air" in arrays["wave"].lower().replace("-", "_").split("_"):
        raise SourceError(f"{place}: {arrays['wave']} is in air by its name; expected wavelengths in vacuum")
    return arrays


def _find(names: list[str], wanted: tuple[str, ...], place: str) -> str | None:
    """Give the first of the wanted names that is there, as it is written there.

    Raises:
        SourceError: two columns differ only in case, and neither is written as wanted.
    """
    for want in wanted:
        found = [name for name in names if name.lower() == want.lower()]
        if len(found) > 1 and want not in found:
            raise SourceError(f"{place}: columns {' and '.join(found)}; expected one of that name")
        if found:
            return want if want in found else found[0]
    return None


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _fields(kind: Any) -> dict[str, Any] | None:
    """Give the fields of a struct, or of the structs in a list; None for any other type."""
    inner = kind.value_type if _is_list(kind) else kind
    return {field.name: field.type for field in inner} if pa.types.is_struct(inner) else None


def _array(batch: Any, names: _Names, role: str) -> tuple[Int64[np.ndarray, "n"], Shaped[np.ndarray, "m"]]:
    """Give one array of all rows of a batch: how long each is (0 where it is missing), and their values in a row.

    Values are float64 wavelengths (NaN where there is none), a mask that is True where bad, or float32.
    """
    name = names.arrays[role]
    column = batch.column(names.spectrum or name)
    if names.listed:
        lengths, inner = pc.list_value_length(column), column.flatten()
        values = inner.flatten()[inner.type.get_field_index(name)]
    else:
        # Unlike `field`, `flatten` heeds the struct's own missing values.
        lists = column if names.spectrum is None else column.flatten()[column.type.get_field_index(name)]
        lengths, values = pc.list_value_length(lists), lists.flatten()
    counts = pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if role == "mask":
        numbers = pc.fill_null(pc.cast(values, pa.float64()), 1.0).to_numpy(zero_copy_only=False)
        return counts, numbers != 0
    kind = pa.float64() if role == "wave" else pa.float32()
    numbers = pc.fill_null(pc.cast(values, kind, safe=False), np.nan).to_numpy(zero_copy_only=False)
    return counts, np.where(np.isfinite(numbers) & (numbers > 0), numbers, np.nan) if role == "wave" else numbers


def _ivar(arrays: dict[str, Shaped[np.ndarray, "m"]]) -> Float32[np.ndarray, "m"]:
    """Give the inverse variance, 0 where masked."""
    if "error" in arrays:
        error = arrays["error"].astype(np.float64)
        with np.errstate(divide="ignore", over="ignore"):
            ivar = np.where((error > 0) & np.isfinite(error), error, np.inf) ** -2.0
            ivar = ivar.astype(np.float32)
    else:
        ivar = arrays["ivar"]
    return np.where(arrays["mask"], np.float32(0), ivar) if "mask" in arrays else ivar


def _columns(batch: Any, names: _Names, settings: Table) -> Columns:
    """Give the catalog values of some rows."""
    count = batch.num_rows

    def numbers(role: str, missing: float) -> Float64[np.ndarray, "n"]:
        if role not in names.scalars:
            return np.full(count, missing)
        values = pc.fill_null(pc.cast(batch.column(names.scalars[role]), pa.float64(), safe=False), missing)
        return np.asarray(values.to_numpy(zero_copy_only=False))

    def text(role: str) -> Shaped[np.ndarray, "n"]:
        if role not in names.scalars:
            return np.full(count, "")
        values = pc.fill_null(pc.cast(batch.column(names.scalars[role]), pa.string()), "")
        return np.char.strip(values.to_numpy(zero_copy_only=False).astype(np.str_))

    z = numbers("z", np.nan)
    z = np.where(np.isfinite(z) & (z > -1), z, np.nan)
    warnings = numbers("zwarn", 0.0)
    if "zwarn" in names.scalars and settings.zwarn_true == "good" and _is_flag(batch.column(names.scalars["zwarn"])):
        warnings = 1 - warnings
    ids = batch.column(names.scalars["id"])
    identity = (
        text("id") if names.text_id else pc.fill_null(pc.cast(ids, pa.int64()), -1).to_numpy(zero_copy_only=False)
    )
    nameless = pc.is_null(ids).to_numpy(zero_copy_only=False)
    status = np.where(np.isnan(z), int(Status.NO_REDSHIFT), 0) | np.where(nameless, int(Status.UNREADABLE), 0)
    return {
        "id": identity,
        "ra": numbers("ra", np.nan),
        "dec": numbers("dec", np.nan),
        "z": z,
        "zwarn": np.nan_to_num(warnings).astype(np.int64),
        "class": text("class"),
        "subclass": text("subclass"),
        "ebv": numbers("ebv", np.nan).astype(np.float32),
        "status": status.astype(np.int32),
        "note": np.where(nameless, "a row without an id; expected one", ""),
    }


def _is_flag(column: Any) -> bool:
    return bool(pa.types.is_boolean(column.type))


def _set_aside(
    columns: Columns, ivar: Float32[np.ndarray, "n pixels"], reasons: list[str], place: str, first: int
) -> None:
    """Note in the columns which spectra cannot be used, and why; their ivar becomes 0."""
    for row, reason in enumerate(reasons):
        if reason:
            columns["status"][row] |= np.int32(Status.UNREADABLE)
    notes = [reason or str(note) for reason, note in zip(reasons, columns["note"], strict=True)]
    columns["note"] = np.array([f"{place} row {first + row}: {note}" if note else "" for row, note in enumerate(notes)])
    unreadable = columns["status"] & int(Status.UNREADABLE) != 0
    ivar[unreadable] = 0
    columns["status"][~unreadable & ~ivar.any(axis=1)] |= np.int32(Status.DEAD)
