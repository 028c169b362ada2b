"""What belongs to the whole sample, frozen: statistics that are applied to every read, and what its layer adds.

`Statistics` are taken once over the usable spectra of a store, by `distspec ingest`; they are then frozen and applied
to every spectrum read from it, those added later included. Usable means status 0 by the recipe, before the S/N
threshold that is found here. What only a look over all rows can tell of each (duplicates, too low S/N, the factor
that normalizes it again) is a layer. `SampleRecord` is both as they lie in a store.
"""

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import numpy as np
import zarr
from jaxtyping import Bool, Float32, Int32, Shaped

from distspec.errors import LayoutError, PartialShardError, StoreError
from distspec.spectra import Spectra, Status
from distspec.statistics.summaries import row_mean, row_median
from distspec.store.coding import Fields
from distspec.store.layer import Layer, layer_group, open_layer
from distspec.store.places import place_of

__all__ = ["BLOCK", "FLOAT32", "SAMPLE_FIELDS", "SAMPLE_LAYER", "Again", "SampleRecord", "Statistics", "factor_of"]

SAMPLE_LAYER = "second-look"

SAMPLE_FIELDS: Fields = {"status": ("i4", ()), "factor": ("f4", ())}
"""Bits that are added to the status of a row, and what its spectrum is multiplied by."""

_COPY = "put them back from a copy, or make the store again"

FLOAT32 = np.finfo(np.float32)

BLOCK = 512
"""Spectra whose temporaries are held at once."""

Again = Literal["none", "median", "mean"]
"""What of the kept pixels of a spectrum becomes 1."""

RENORMALIZE: tuple[Again, ...] = ("none", "median", "mean")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Frozen statistics of a sample, and what they do to a spectrum.

    The order is that of Ortiz & Boquien 2025 (public code, `imputing.py`), with the division of Böhm, Kim & Juneau 2023
    (section 2) behind it: drop wavelengths; normalize each spectrum again over those kept; fill masked pixels; divide
    by the mean spectrum. All statistics are of renormalized and not yet divided spectra. Filling before or after the
    division comes to the same, since the filled value is divided too.

    Arguments:
        rows: number of usable spectra behind the statistics; 0 where none were needed.
        keep: False at wavelengths that are masked in every spectrum.
        mean: what spectra are divided by; 1 without division, 0 where the mean spectrum cannot divide (pixel masked).
        median: value of a filled pixel; NaN where masked pixels stay masked.
        scatter: its error, half the 16-84 % range of the sample at that wavelength: an imputed value is known as well
            as the sample scatters.
        snr_min: smallest `snr` of a spectrum that is used.
        renormalize: what of the kept pixels of a spectrum becomes 1.
    """

    rows: int
    keep: Bool[np.ndarray, "pixels"]
    mean: Float32[np.ndarray, "pixels"]
    median: Float32[np.ndarray, "pixels"]
    scatter: Float32[np.ndarray, "pixels"]
    snr_min: float = -np.inf
    renormalize: Again = "none"

    @classmethod
    def identity(cls, pixels: int) -> "Statistics":
        """Give the statistics that leave every spectrum as it is."""
        one, unknown = np.ones(pixels, np.float32), np.full(pixels, np.nan, np.float32)
        return cls(0, np.ones(pixels, bool), one, unknown, unknown)

    @cached_property
    def is_identity(self) -> bool:
        """Whether `apply` changes nothing."""
        return bool(self.keep.all() and self.renormalize == "none" and not self._divides and not self._fills.any())

    @cached_property
    def _divides(self) -> bool:
        return bool((self.mean != 1).any())

    @cached_property
    def _kept(self) -> Bool[np.ndarray, "pixels"]:
        return self.keep & (self.mean > 0)

    @cached_property
    def _filling(self) -> Float32[np.ndarray, "2 pixels"]:
        """Flux and ivar of a filled pixel, in the unit of the result; both 0 where there is none."""
        known = self._kept & np.isfinite(self.median) & (self.scatter > 0)
        mean, scatter = self.mean.astype(np.float64), np.where(known, self.scatter, 1.0)
        flux = np.where(known, self.median, 0.0) / np.where(known, mean, 1.0)
        ivar = np.where(known, (mean / scatter) ** 2, 0.0)
        sound = (np.abs(flux) <= FLOAT32.max) & (ivar >= FLOAT32.tiny) & (ivar <= FLOAT32.max)
        return np.asarray(np.where(sound, [flux, ivar], 0.0), np.float32)

    @cached_property
    def _fills(self) -> Bool[np.ndarray, "pixels"]:
        return np.asarray(self._filling[1] > 0)

    def factor(self, spectra: Spectra) -> Float32[np.ndarray, "n"]:
        """Give what normalizes each spectrum again over the kept wavelengths: 1 / its median (or mean) there.

        It takes a sort of every spectrum, so it is made once and stored. NaN where there is no positive scale; 1 where
        no wavelength was dropped, or the recipe normalizes otherwise.
        """
        self._check(spectra)
        factor = np.ones(len(spectra), np.float32)
        if self.renormalize == "none":
            return factor
        for start in range(0, len(spectra), BLOCK):
            rows = slice(start, start + BLOCK)
            factor[rows] = factor_of(spectra.flux[rows], (spectra.ivar[rows] > 0) & self.keep, self.renormalize)
        return factor

    def apply(self, spectra: Spectra, factor: Float32[np.ndarray, "n"] | None = None) -> Spectra:
        """Bring prepared spectra to what a model sees.

        Arguments:
            spectra: as they stand in the store.
            factor: their `factor`, if it was stored; else it is computed.

        Returns:
            The spectra with dropped wavelengths masked (flux and ivar 0), renormalized, divided, and filled. A spectrum
            without any good pixel, or whose factor is NaN, is masked as a whole and never filled.

        Raises:
            ValueError: the spectra are on a grid of another length.
        """
        self._check(spectra)
        if self.is_identity:
            return spectra
        good = (spectra.ivar > 0) & self._kept
        flux, ivar = np.where(good, spectra.flux, 0), np.where(good, spectra.ivar, 0)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if self.renormalize != "none":
                scale = (self.factor(spectra) if factor is None else factor).astype(np.float64)
                flux *= scale.astype(np.float32)[:, None]
                ivar *= (scale**-2).astype(np.float32)[:, None]
            if self._divides:
                divisor = np.where(self._kept, self.mean, np.float32(1))
                flux /= divisor
                ivar *= divisor * divisor
            # Also False for the NaN of a spectrum without a factor, and where float32 overflowed.
            good &= (np.abs(flux) <= FLOAT32.max) & (ivar >= FLOAT32.tiny) & (ivar <= FLOAT32.max)
        flux[~good] = 0
        ivar[~good] = 0
        if self._fills.any():
            empty = ~good & self._fills & good.any(axis=1)[:, None]
            flux, ivar = np.where(empty, self._filling[0], flux), np.where(empty, self._filling[1], ivar)
        return Spectra(spectra.rows, flux, ivar, spectra.grid, spectra.redshift)

    def status(
        self,
        snr: Float32[np.ndarray, "n"],
        status: Int32[np.ndarray, "n"],
        factor: Float32[np.ndarray, "n"] | None = None,
    ) -> Int32[np.ndarray, "n"]:
        """Add LOW_SNR below the threshold (a tie passes), and NO_SCALE where the `factor` is NaN.

        Spectra that the recipe left with too few pixels, or none, get neither.
        """
        judged = status & int(Status.UNUSABLE | Status.LOW_COVERAGE) == 0
        added = np.where(judged & (snr < np.float32(self.snr_min)), int(Status.LOW_SNR), 0)
        if factor is not None:
            added |= np.where(judged & np.isnan(factor), int(Status.NO_SCALE), 0)
        return np.asarray(status | added, np.int32)

    def _check(self, spectra: Spectra) -> None:
        if spectra.grid.pixels != len(self.keep):
            raise ValueError(f"spectra of {spectra.grid.pixels} pixels; these statistics are of {len(self.keep)}")

    def to_arrays(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Give plain arrays that `from_arrays` turns back into equal statistics."""
        arrays = {name: getattr(self, name) for name in ("keep", "mean", "median", "scatter")}
        return arrays | {
            "rows": np.array([self.rows], np.int64),
            "snr_min": np.array([self.snr_min], np.float32),
            "renormalize": np.array([RENORMALIZE.index(self.renormalize)], np.int8),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, Shaped[np.ndarray, "..."]]) -> "Statistics":
        """Take what `to_arrays` gave.

        Raises:
            ValueError: an array is missing, or its shape or a value is impossible.
        """
        wanted = {field.name for field in fields(cls)}
        if wanted - set(arrays):
            raise ValueError(f"statistics without {', '.join(sorted(wanted - set(arrays)))}")
        pixels = arrays["keep"].shape
        if len(pixels) != 1 or any(arrays[name].shape != pixels for name in ("mean", "median", "scatter")):
            raise ValueError(f"statistics of shapes { {name: array.shape for name, array in arrays.items()} }")
        kind = int(arrays["renormalize"].ravel()[0])
        if not 0 <= kind < len(RENORMALIZE):
            raise ValueError(f"statistics with renormalize = {kind}; expected 0, 1 or 2")
        mean, median, scatter = (arrays[name].astype(np.float32) for name in ("mean", "median", "scatter"))
        rows, snr_min = int(arrays["rows"].ravel()[0]), float(arrays["snr_min"].ravel()[0])
        return cls(rows, arrays["keep"].astype(bool), mean, median, scatter, snr_min, RENORMALIZE[kind])

    @cached_property
    def digest(self) -> str:
        """Name these statistics: 12 hexadecimal digits of the SHA-256 of their arrays."""
        sha = hashlib.sha256()
        for name, array in sorted(self.to_arrays().items()):
            sha.update(f"{name} {array.dtype.str} {array.shape} ".encode())
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()[:12]

    def __repr__(self) -> str:
        parts = [f"{self.rows} spectra", f"{int(self._kept.sum())} of {len(self.keep)} pixels kept"]
        parts += [f"{self.renormalize} again"] * (self.renormalize != "none")
        parts += ["divided by mean"] * self._divides + ["filled"] * bool(self._fills.any())
        parts += [f"snr >= {self.snr_min:g}"] * bool(np.isfinite(self.snr_min))
        return f"Statistics({', '.join(parts)})"


def factor_of(
    flux: Float32[np.ndarray, "n pixels"], good: Bool[np.ndarray, "n pixels"], kind: Again
) -> Float32[np.ndarray, "n"]:
    """Give 1 / the median or mean of the good pixels of each spectrum; NaN where that is no scale."""
    scale = row_median(flux, good) if kind == "median" else row_mean(flux, good)
    sound = (scale > FLOAT32.tiny) & (scale <= FLOAT32.max)
    return np.where(sound, 1.0 / np.where(sound, scale, 1.0), np.nan).astype(np.float32)


class SampleRecord:
    """What a store keeps of its whole sample.

    Arguments:
        root: group of the store.
    """

    def __init__(self, root: zarr.Group) -> None:
        self._root = root
        self._path = place_of(root)
        self.reload()

    def reload(self) -> None:
        """Read again the frozen statistics and open the layer, or keep what is wrong with them."""
        meta = self._root.attrs["distspec"]
        self._statistics, self._sample_damage = _read_statistics(self._root, meta.get("sample"))
        self._layer: Layer | None = None
        self._layer_damage = ""
        place = f"{self._path}/layers/{SAMPLE_LAYER}"
        try:
            layers = layer_group(self._root)
            if SAMPLE_LAYER in layers and "distspec" in layers[SAMPLE_LAYER].attrs:
                self._layer = open_layer(layers, SAMPLE_LAYER)
        except Exception as error:  # whatever zarr makes of damaged JSON
            self._layer_damage = f"{place} is damaged ({' '.join(repr(error).split())})"
        if meta.get("look") and self._layer is None and not self._layer_damage:
            self._layer_damage = f"{place} is missing"
        if self._layer_damage:
            self._layer_damage += "; `distspec ingest --mend`, then `distspec ingest`, make it again"

    @property
    def damage(self) -> list[str]:
        """What is wrong with the statistics and the layer."""
        return [problem for problem in (self._sample_damage, self._layer_damage) if problem]

    @property
    def statistics(self) -> Statistics | None:
        """The frozen statistics; None where the recipe asks for none.

        Raises:
            LayoutError: they are damaged.
        """
        if self._sample_damage:
            raise LayoutError(self._sample_damage)
        return self._statistics

    @property
    def is_frozen(self) -> bool:
        """True once the statistics are settled, if only that there are none."""
        return "sample" in self._root.attrs["distspec"]

    def freeze(self, statistics: Statistics | None) -> None:
        """Keep the statistics of the sample.

        Raises:
            StoreError: other statistics are frozen already.
        """
        meta = self._root.attrs["distspec"]
        digest = None if statistics is None else statistics.digest
        if "sample" in meta:
            if meta["sample"] != digest:
                raise StoreError(f"{self._path} has frozen statistics {meta['sample']}; they cannot be changed")
            return
        if statistics is not None:
            group = self._root.create_group("sample", overwrite=True)
            for name, values in statistics.to_arrays().items():
                group.create_array(name, data=np.asarray(values))
        self._root.attrs["distspec"] = dict(meta) | {"sample": digest}
        self.reload()

    @property
    def layer(self) -> Layer | None:
        """The layer, where it is there and sound."""
        return self._layer

    @property
    def has_layer(self) -> bool:
        """True where an earlier look over all rows found something to keep."""
        return self._layer is not None or bool(self._root.attrs["distspec"].get("look"))

    def layer_below(self, stop: int, rows: int) -> Layer | None:
        """Give the layer for rows below `stop` of `rows`, None where there was nothing to keep.

        Raises:
            LayoutError: it is lost or damaged.
            PartialShardError: the look over all rows did not get as far.
        """
        if self._layer_damage:
            raise LayoutError(self._layer_damage)
        if self._layer is not None and stop > self._layer.rows:
            raise PartialShardError(
                f"rows {self._layer.rows}-{rows} of {self._path} are not settled; run `distspec ingest` to finish"
            )
        return self._layer

    def covers(self, parts: tuple[int, ...]) -> bool:
        """Tell whether the look over all rows of these parts is done."""
        if self._root.attrs["distspec"].get("looked") != list(parts):
            return False
        return self._layer is None or not self._layer.pending()

    def mark_finished(self, parts: tuple[int, ...]) -> None:
        """Say that the look over all rows of these parts is done, by a layer or because nothing asked for one."""
        self.reload()
        marks = {"looked": list(parts), "look": self._layer is not None}
        self._root.attrs["distspec"] = dict(self._root.attrs["distspec"]) | marks

    def forget_layer(self) -> None:
        """Let the next ingest make the layer again, where it is lost; what it finds does not change."""
        if not self._layer_damage:
            return
        meta = dict(self._root.attrs["distspec"])
        meta.pop("looked", None)
        meta.pop("look", None)
        self._root.attrs["distspec"] = meta
        layer_group(self._root).create_group(SAMPLE_LAYER, overwrite=True)
        self.reload()


def _read_statistics(root: zarr.Group, digest: str | None) -> tuple[Statistics | None, str]:
    """Read the frozen statistics of that digest; or say what is wrong with them."""
    if not digest:
        return None, ""
    place = f"{place_of(root)}/sample"
    try:
        group = root["sample"]
        found = Statistics.from_arrays({name: group[name][...] for name in group.array_keys()})
    except Exception as error:  # whatever zarr, its codecs and the statistics make of damage
        return None, f"the frozen statistics in {place} are damaged ({' '.join(repr(error).split())}); {_COPY}"
    if found.digest != digest:
        return None, f"the frozen statistics in {place} are {found.digest}; expected {digest}: damaged; {_COPY}"
    return found, ""
