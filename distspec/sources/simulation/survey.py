"""A simulated survey with truth: seeded, vectorised galaxies, quasars and stars, some with a planted anomaly.

The content of a row depends on the settings, the seed and the row's number only: not on how many rows the survey has,
nor on which of them are read together. Rows are drawn in fixed blocks and rendered in fixed chunks of a block.

The physics is in `templates` (stellar populations), `populations` (who is in the survey), `instrument` (sky,
throughput, noise) and `anomalies`; survey files are written by `write_files`.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np
from jaxtyping import Float32, Float64, Int64

from distspec.config import Simulate
from distspec.errors import SourceError
from distspec.sources import Entry, Piece
from distspec.sources.simulation.anomalies import ANOMALIES, NEEDS_LINES, Companions, plant, spoil, windows
from distspec.sources.simulation.instrument import Optics, levels, optics, reference_optics, render
from distspec.sources.simulation.populations import (
    QUASAR_Z,
    Objects,
    draw_galaxies,
    draw_quasars,
    draw_stars,
    empty_objects,
)
from distspec.sources.simulation.templates import Basis, basis
from distspec.spectra import LIGHT_SPEED, Columns, Spectra, Status, WaveGrid

__all__ = ["BLOCK_ROWS", "SDSS_GRID", "SimulatedSurvey"]

SDSS_GRID: Final = WaveGrid("log", 10**3.58, 1e-4, 3848)
"""SDSS's own sampling, 3802-9219 Å."""

BLOCK_ROWS: Final = 512
"""Rows that are drawn together, one piece of the survey."""

# Small enough that a chunk's arrays stay in the processor's cache.
_CHUNK_ROWS: Final = 64

_DEAD: Final = 0.001
"""Share of fibres that record nothing."""

_WARNED: Final = 0.005
"""Share of spectra whose redshift the pipeline is unsure of."""

# Bits that SDSS's ZWARNING and redrock's ZWARN share; the first is by far the most common one.
_SMALL_DELTA: Final = 1 << 2

_UNPLUGGED: Final = 1 << 7

_ID_BASE: Final = 39_627_000_000_000_000
"""First id: of the size of a DESI TARGETID, where a float64 holds only every eighth integer."""


@dataclass
class _Block:
    """All that is drawn for one block, before any spectrum is made."""

    objects: Objects
    companions: Companions
    kind: Int64[np.ndarray, "n"]
    dice: Float64[np.ndarray, "n 4"]
    ebv: Float64[np.ndarray, "n"]
    brightness: Float64[np.ndarray, "n"]
    snr: Float64[np.ndarray, "n"]
    dead: np.ndarray
    columns: Columns


@dataclass(frozen=True)
class SimulatedSurvey:
    """A survey that is made as it is read; it implements `Source`.

    Arguments:
        settings: how many spectra of what.
        seed: every other seed is another survey.
        grid: observed grid on which spectra are delivered.

    Raises:
        SourceError: the grid leaves the range that is modelled, 3500-10,400 Å.

    Example:
        >>> survey = SimulatedSurvey(Simulate(spectra=600), seed=1)
        >>> [block.count for block in survey.files()]
        [512, 88]
        >>> spectra, columns = survey.rows(512, 600)
        >>> spectra
        Spectra(88 on WaveGrid(log, 3801.9-9219.3 Å, 3848 pixels))
    """

    settings: Simulate
    seed: int
    grid: WaveGrid = SDSS_GRID

    def __post_init__(self) -> None:
        low, high = self.grid.wave[0], self.grid.wave[-1]
        if low < 3500.0 or high > 10400.0:
            raise SourceError(f"grid {low:.0f}-{high:.0f} Å; simulated spectra exist between 3500 and 10400 Å only")

    def on(self, grid: WaveGrid) -> "SimulatedSurvey":
        """Observe the same objects on another grid: equal truth, other pixels and other noise."""
        return replace(self, grid=grid)

    def files(self) -> list[Entry]:
        """List the blocks, in order."""
        rows = self.settings.spectra
        return [
            Entry(f"block-{start // BLOCK_ROWS:06d}", 0, 0, min(BLOCK_ROWS, rows - start))
            for start in range(0, rows, BLOCK_ROWS)
        ]

    def count(self, name: str) -> int:
        """Count the spectra of a block."""
        return min(BLOCK_ROWS, self.settings.spectra - _start(name))

    def missing(self) -> list[str]:
        """Nothing is ever missing of a simulation."""
        return []

    def identify(self, piece: Piece) -> Columns:
        """Give nothing: a simulation can always be read."""
        return {}

    def read(self, piece: Piece) -> tuple[Spectra, Columns]:
        """Make the spectra of a part of a block; see `rows`."""
        first = _start(piece.name)
        return self.rows(first + piece.start, first + piece.stop)

    def rows(self, start: int, stop: int) -> tuple[Spectra, Columns]:
        """Make the spectra of rows `start` to `stop` of the survey; any run will do, across blocks too.

        Beside the columns of every source: `truth_z` (float64, where `z` is the catalogue's value, wrong on purpose
        for one kind of anomaly), `anomaly` (str, empty for normal spectra, else one of `ANOMALIES`) and
        `anomaly_wave` (float32 [n, 4, 2], windows in the rest frame of `z`, vacuum Å, NaN where unused).

        Raises:
            SourceError: the rows are not in the survey.
        """
        flux = np.empty((stop - start, self.grid.pixels), dtype=np.float32)
        ivar = np.empty_like(flux)
        for chunk, rows, target in self._chunks(start, stop):
            block = _draw_block(self.settings, self.seed, chunk * _CHUNK_ROWS // BLOCK_ROWS)
            noiseless, variance = self._expect(block, chunk, planted=True)
            noisy, weight = self._observe(block, chunk, noiseless, variance)
            flux[target], ivar[target] = noisy[rows], weight[rows]
        numbers = np.arange(start, stop, dtype=np.int64)
        return Spectra(numbers, flux, ivar, self.grid), self.catalog(start, stop)

    def model(self, start: int, stop: int, planted: bool = True) -> Float32[np.ndarray, "n pixels"]:
        """Give the spectra of rows `start` to `stop` as they are without noise, dead fibres and masked pixels.

        Arguments:
            start: first row.
            stop: row after the last.
            planted: with the anomalies; without them the same hosts as they were before.
        """
        flux = np.empty((stop - start, self.grid.pixels), dtype=np.float32)
        for chunk, rows, target in self._chunks(start, stop):
            block = _draw_block(self.settings, self.seed, chunk * _CHUNK_ROWS // BLOCK_ROWS, planted)
            flux[target] = self._expect(block, chunk, planted)[0][rows]
        return flux

    def catalog(self, start: int, stop: int) -> Columns:
        """Give the columns of rows `start` to `stop` without making their spectra."""
        self._check(start, stop)
        parts: list[Columns] = []
        for number in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
            first = number * BLOCK_ROWS
            inside = slice(max(start - first, 0), min(stop - first, BLOCK_ROWS))
            columns = _draw_block(self.settings, self.seed, number).columns
            parts.append({name: values[inside] for name, values in columns.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start < stop <= self.settings.spectra:
            raise SourceError(f"rows {start} to {stop}; the simulated survey has rows 0 to {self.settings.spectra}")

    def _chunks(self, start: int, stop: int) -> list[tuple[int, slice, slice]]:
        """Cover rows by chunks: the chunk's number, which of its rows are asked for, and where they go."""
        self._check(start, stop)
        found = []
        for chunk in range(start // _CHUNK_ROWS, -(-stop // _CHUNK_ROWS)):
            first = chunk * _CHUNK_ROWS
            low, high = max(start, first), min(stop, first + _CHUNK_ROWS)
            found.append((chunk, slice(low - first, high - first), slice(low - start, high - start)))
        return found

    def _expect(
        self, block: _Block, chunk: int, planted: bool
    ) -> tuple[Float32[np.ndarray, "n pixels"], Float32[np.ndarray, "n pixels"]]:
        """Make one chunk's noiseless flux and its variance; always a whole chunk, so that rounding never differs."""
        first = chunk * _CHUNK_ROWS % BLOCK_ROWS
        rows = slice(first, first + _CHUNK_ROWS)
        rest = _rest_grid(self.settings.z_max)
        templates, at, reference = basis(rest), optics(self.grid, rest), reference_optics(rest)
        objects, ebv = block.objects[rows], block.ebv[rows]

        flux = render(objects, ebv, templates, at, self.grid)
        fixed = render(objects, ebv, templates, reference, None)
        if planted:
            _add_companions(block, rows, flux, fixed, templates, at, reference, self.grid)
        scale = (block.brightness[rows] / levels(fixed)).astype(np.float32)[:, None]
        flux *= scale
        fixed *= scale

        # Photons of object, sky and detector: the exposure is chosen so that the median pixel reaches the wanted
        # signal-to-noise ratio.
        typical = fixed / np.sqrt((fixed + reference.sky) / reference.efficiency)
        exposure = ((block.snr[rows] / np.median(typical, axis=1)) ** 2).astype(np.float32)
        variance = flux + at.sky
        variance /= at.efficiency
        variance /= exposure[:, None]
        if planted:
            spoil(flux, at.wave, block.kind[rows], block.dice[rows], block.columns["z"][rows])
        return flux, variance

    def _observe(
        self,
        block: _Block,
        chunk: int,
        flux: Float32[np.ndarray, "n pixels"],
        variance: Float32[np.ndarray, "n pixels"],
    ) -> tuple[Float32[np.ndarray, "n pixels"], Float32[np.ndarray, "n pixels"]]:
        """Add noise and bad pixels to a chunk."""
        first = chunk * _CHUNK_ROWS % BLOCK_ROWS
        rows = slice(first, first + _CHUNK_ROWS)
        # The grid is part of the seed: another instrument has other noise.
        rng = np.random.default_rng([self.seed, 2, chunk, self.grid.pixels, round(self.grid.first * 1000)])
        noise = rng.standard_normal(flux.shape, dtype=np.float32)
        noise *= np.sqrt(variance)
        noisy = flux + noise
        ivar = np.reciprocal(variance, out=variance)
        bad_row, bad_pixel = _bad_pixels(rng, *flux.shape)
        # A truth that lies under a mask would be none.
        spared = block.kind[rows] == ANOMALIES.index("cosmic-ray")
        kept = ~spared[bad_row]
        bad_row, bad_pixel = bad_row[kept], bad_pixel[kept]
        garbage = rng.standard_normal(bad_row.size, dtype=np.float32)
        noisy[bad_row, bad_pixel] += 30.0 * garbage * np.abs(flux[bad_row, bad_pixel])
        ivar[bad_row, bad_pixel] = 0.0
        dead = block.dead[rows]
        noisy[dead] = 0.0
        ivar[dead] = 0.0
        return noisy, ivar

    def __repr__(self) -> str:
        return f"SimulatedSurvey({self.settings.spectra} spectra, seed {self.seed}, {self.grid})"


def _rest_grid(z_max: float) -> WaveGrid:
    """Cover at rest whatever any observed grid may ask for; the same for all grids, so that truth is the same."""
    low = 3490.0 / (1.0 + max(z_max, QUASAR_Z[1]))
    return WaveGrid("log", low, 1e-4, int(np.log10(10450.0 / low) / 1e-4))


def _add_companions(
    block: _Block,
    rows: slice,
    flux: Float32[np.ndarray, "n pixels"],
    fixed: Float32[np.ndarray, "n k"],
    templates: Basis,
    at: Optics,
    reference: Optics,
    grid: WaveGrid,
) -> None:
    """Add the light of second objects to a chunk, in place, at the stated share of the first one's brightness."""
    chosen = np.flatnonzero((block.companions.rows >= rows.start) & (block.companions.rows < rows.stop))
    if not chosen.size:
        return
    owner = block.companions.rows[chosen] - rows.start
    objects, ebv = block.companions.objects[chosen], block.ebv[block.companions.rows[chosen]]
    second = render(objects, ebv, templates, at, grid)
    second_fixed = render(objects, ebv, templates, reference, None)
    factor = block.companions.share[chosen] * levels(fixed)[owner] / levels(second_fixed)
    flux[owner] += factor.astype(np.float32)[:, None] * second
    fixed[owner] += factor.astype(np.float32)[:, None] * second_fixed


def _bad_pixels(
    rng: np.random.Generator, rows: int, pixels: int
) -> tuple[Int64[np.ndarray, "m"], Int64[np.ndarray, "m"]]:
    """Choose masked pixels: single ones, about one in 200, and a run of 5-60 in one spectrum of eight."""
    singles = round(pixels / 200)
    single = rng.integers(0, pixels, (rows, singles))
    start, length = rng.integers(0, pixels, rows), rng.integers(5, 61, rows)
    length[rng.random(rows) > 0.125] = 0
    row = np.concatenate([np.repeat(np.arange(rows), singles), np.repeat(np.arange(rows), length)])
    step = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    run = np.minimum(np.repeat(start, length) + step, pixels - 1)
    return row, np.concatenate([single.ravel(), run])


@lru_cache(maxsize=8)
def _draw_block(settings: Simulate, seed: int, number: int, planted: bool = True) -> _Block:
    """Draw one whole block. The cached result must not be written to."""
    rng = np.random.default_rng([seed, 1, number])
    n = BLOCK_ROWS
    templates = basis(_rest_grid(settings.z_max))
    u = rng.random((n, 8))
    dice = rng.random((n, 4))
    kind = _deal(rng, settings.anomalies, number)
    odd = np.flatnonzero(kind >= 0)

    # Every population is drawn for every row and most of it thrown away: the draws of one row then never depend on
    # what the others are, and drawing is cheap beside rendering.
    galaxies = draw_galaxies(rng, n, settings.z_max, templates)
    quasars, quasar_label = draw_quasars(rng, n, templates)
    stars, star_label = draw_stars(rng, n, templates)
    active = draw_galaxies(rng, n, settings.z_max, templates, active=True)
    lined = np.flatnonzero(np.isin(kind, [ANOMALIES.index(name) for name in NEEDS_LINES]))
    objects, subclass = galaxies.objects, galaxies.subclass
    objects.put(lined, active.objects[lined])
    subclass[lined] = active.subclass[lined]

    name = np.select(
        [u[:, 0] < settings.quasars, u[:, 0] < settings.quasars + settings.stars], ["QSO", "STAR"], "GALAXY"
    )
    name[odd] = "GALAXY"
    for label, others, others_label in (("QSO", quasars, quasar_label), ("STAR", stars, star_label)):
        rows = np.flatnonzero(name == label)
        objects.put(rows, others[rows])
        subclass[rows] = others_label[rows]

    z, companions, found = objects.z.copy(), None, np.full((n, 4, 2), np.nan, dtype=np.float32)
    if planted and odd.size:
        hosts = replace(galaxies, objects=objects[odd], subclass=subclass[odd])
        z[odd], companions = plant(kind[odd], dice[odd], hosts, rng, settings.z_max, templates)
        objects.put(odd, hosts.objects)
        subclass[odd] = hosts.subclass
        found[odd] = windows(kind[odd], dice[odd], z[odd], hosts.objects, companions)
        companions.rows = odd[companions.rows]
    if companions is None:
        companions = Companions(np.zeros(0, dtype=np.int64), empty_objects(0, len(templates.names)), np.zeros(0))
    return _describe(settings, seed, number, _Draws(u, dice, kind, objects, companions, z, name, subclass, found))


@dataclass
class _Draws:
    """What `_draw_block` hands to `_describe`: uniform numbers, objects and labels."""

    u: Float64[np.ndarray, "n 8"]
    dice: Float64[np.ndarray, "n 4"]
    kind: Int64[np.ndarray, "n"]
    objects: Objects
    companions: Companions
    z: Float64[np.ndarray, "n"]
    name: np.ndarray
    subclass: np.ndarray
    windows: Float32[np.ndarray, "n 4 2"]


def _describe(settings: Simulate, seed: int, number: int, draws: _Draws) -> _Block:
    """Give a block its place on the sky, brightness, exposure and catalogue entries."""
    n = BLOCK_ROWS
    u = draws.u
    rng = np.random.default_rng([seed, 3, number])
    g = np.clip(rng.standard_normal((n, 4)), -3.0, 3.0)
    normal = draws.kind < 0
    dead = normal & (u[:, 1] < _DEAD)
    ebv = np.clip(0.03 * np.exp(0.6 * g[:, 0]), 0.003, 0.3)
    snr = settings.snr * 10 ** (0.22 * g[:, 1])
    # Brighter objects have better spectra; the slope is that of counts limited by the objects' own photons.
    magnitude = 17.6 - 1.6 * 0.22 * g[:, 1] + 0.35 * g[:, 2]
    # AB zero point, per unit wavelength at 6200 Å, in 1e-17 erg s⁻¹ cm⁻² Å⁻¹.
    brightness = 3.631e-20 * 10 ** (-0.4 * magnitude) * LIGHT_SPEED * 1e13 / 6200.0**2 * 1e17
    noise_z = draws.z + np.where(draws.name == "QSO", 1e-3, 2e-5) * (1.0 + draws.z) * g[:, 3]
    # A wrong redshift stays where its confusion put it; truth must not be blurred.
    catalog_z = np.where(normal, noise_z, draws.z)
    row = number * n + np.arange(n, dtype=np.int64)
    anomaly = np.array(["", *ANOMALIES])[draws.kind + 1]
    columns: Columns = {
        "id": _ID_BASE + np.int64(seed % 1000) * 10**12 + row,
        "ra": 110.0 + 150.0 * u[:, 2],
        "dec": np.degrees(np.arcsin(np.sin(np.radians(60.0)) * u[:, 3])),
        "z": catalog_z,
        "zwarn": np.select([dead, normal & (u[:, 4] < _WARNED)], [_UNPLUGGED, _SMALL_DELTA], 0).astype(np.int64),
        "class": draws.name.astype("U6"),
        "subclass": draws.subclass,
        "ebv": ebv.astype(np.float32),
        "status": np.where(dead, int(Status.FIBER), 0).astype(np.int32),
        "truth_z": draws.objects.z,
        "anomaly": anomaly,
        "anomaly_wave": draws.windows,
    }
    return _Block(draws.objects, draws.companions, draws.kind, draws.dice, ebv, brightness, snr, dead, columns)


def _deal(rng: np.random.Generator, share: float, number: int) -> Int64[np.ndarray, "n"]:
    """Deal the kinds of anomalies round-robin over all blocks, to random rows of this one; -1 for normal rows."""
    first, stop = (int(share * BLOCK_ROWS * edge + 1e-9) for edge in (number, number + 1))
    kind = np.full(BLOCK_ROWS, -1, dtype=np.int64)
    kind[rng.permutation(BLOCK_ROWS)[: stop - first]] = np.arange(first, stop) % len(ANOMALIES)
    return kind


def _start(name: str) -> int:
    """Give the first row of a block by its name.

    Raises:
        SourceError: there is no such block.
    """
    number = name.removeprefix("block-")
    if not number.isdecimal():
        raise SourceError(f"no block {name!r} in a simulated survey; expected block-000000 and so on")
    return int(number) * BLOCK_ROWS
