"""Statistics of a sample: brute force over all rows, whatever the cut, and the same treatment for what comes later."""

import pickle
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distspec.config import AtWavelength, Grid, Mean, Median, NoScale, Prepare, Sample
from distspec.errors import ConfigError
from distspec.spectra import Columns, Spectra, Status, WaveGrid
from distspec.stages.ingest.sample import Block, check, compute
from distspec.store.frozen import Statistics

pytestmark = pytest.mark.numeric

PIXELS = 40
GRID = WaveGrid("linear", 4000.0, 2.0, PIXELS)


def recipe(normalize: Any = None, **sample: Any) -> Prepare:
    grid = Grid(scale="linear", first=4000.0, last=4000.0 + 2 * (PIXELS - 1), pixels=PIXELS)
    return Prepare(grid=grid, normalize=normalize or Median(), sample=Sample(**sample))


def survey(seed: int = 1, rows: int = 83, missing: float = 0.08) -> tuple[Spectra, Columns]:
    """Spectra of which some wavelengths miss often, some rows are set aside, and masked flux is rubbish."""
    rng = np.random.default_rng(seed)
    flux = (1 + 0.3 * rng.normal(size=(rows, PIXELS)) + np.linspace(0, 1, PIXELS)).astype(np.float32)
    flux = np.abs(flux) + np.float32(0.01)
    share = np.full(PIXELS, missing / 2)
    share[[0, 1, 2, 17, 39]] = 0.6
    ivar = np.where(rng.random(flux.shape) < share, 0, rng.uniform(1, 9, flux.shape)).astype(np.float32)
    flux[ivar == 0] = rng.choice([np.nan, 1e30, -np.inf], (ivar == 0).sum())
    status = np.where(rng.random(rows) < 0.15, int(Status.REDSHIFT_WARNING), 0).astype(np.int32)
    snr = np.round(rng.uniform(2, 30, rows), 1).astype(np.float32)
    return Spectra(np.arange(rows), flux, ivar, GRID), {"status": status, "snr": snr}


def given_part(spectra: Spectra, columns: Columns, rows: slice) -> tuple[Spectra, Columns]:
    return spectra[rows], {name: column[rows] for name, column in columns.items()}


def blocks_of(spectra: Spectra, columns: Columns, where: Sequence[int] = (10, 11, 50)) -> list[Block]:
    edges = [0, *where, len(spectra)]
    return [partial(given_part, spectra, columns, slice(a, b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]


# --- brute force ------------------------------------------------------------------------------------------------------


def test_ortiz_and_boquien_in_their_own_order() -> None:
    """imputing.py: drop wavelengths by the share of NaN, divide by the own nanmedian, fill by the nanmedian."""
    spectra, columns = survey()
    used = columns["status"] == 0
    data = np.where(spectra.ivar > 0, spectra.flux, np.nan)
    keep = np.count_nonzero(~np.isfinite(data[used]), axis=0) < 0.1 * used.sum()
    theirs = data[:, keep]
    theirs = theirs / np.nanmedian(theirs, axis=1, keepdims=True)
    fill = np.nanmedian(theirs[used], axis=0)
    filled = np.where(np.isnan(theirs), fill, theirs).astype(np.float32)

    statistics = compute(blocks_of(spectra, columns), recipe(missing_max=0.1, impute=True))
    ours = statistics.apply(spectra, statistics.factor(spectra))
    assert (statistics.keep == keep).all()
    assert 0 < keep.sum() < PIXELS
    np.testing.assert_allclose(ours.flux[:, keep], filled, rtol=3e-7)
    assert not ours.flux[:, ~keep].any()
    assert not ours.ivar[:, ~keep].any()
    low, high = np.nanquantile(theirs[used].astype(np.float64), [0.16, 0.84], axis=0)
    np.testing.assert_allclose(statistics.scatter[keep], (high - low) / 2, rtol=1e-5)
    was_masked = (spectra.ivar == 0) & keep
    sigma = np.broadcast_to((high - low) / 2, filled.shape)
    np.testing.assert_allclose(ours.ivar[:, keep][was_masked[:, keep]] ** -0.5, sigma[was_masked[:, keep]], rtol=1e-5)
    assert statistics.rows == used.sum()


def test_renormalized_errors_follow_the_flux() -> None:
    spectra, columns = survey()
    statistics = compute(blocks_of(spectra, columns), recipe(missing_max=0.1))
    ours = statistics.apply(spectra)
    both = (spectra.ivar > 0) & statistics.keep
    assert ((ours.ivar > 0) == both).all()
    before, after = (np.where(both, s.flux, 0) * np.sqrt(s.ivar) * both for s in (spectra, ours))
    np.testing.assert_allclose(after, before, rtol=1e-6)
    good = np.where(both, ours.flux, np.nan)
    np.testing.assert_allclose(np.nanmedian(good, axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("normalize", "again"), [(Median(), True), (Mean(), True), (NoScale(), False), (AtWavelength(wave=4020.0), False)]
)
def test_only_a_median_or_mean_is_taken_again(normalize: Any, again: bool) -> None:
    spectra, columns = survey()
    statistics = compute(blocks_of(spectra, columns), recipe(normalize, missing_max=0.1))
    factor = statistics.factor(spectra)
    good = np.where((spectra.ivar > 0) & statistics.keep, spectra.flux, np.nan)
    scale = np.nanmean(good, axis=1) if normalize == Mean() else np.nanmedian(good, axis=1)
    np.testing.assert_allclose(factor, 1 / scale if again else np.ones(len(spectra)), rtol=1e-6)
    assert factor.dtype == np.float32


def test_mean_spectrum_divides_flux_and_error() -> None:
    spectra, columns = survey()
    used = columns["status"] == 0
    statistics = compute(blocks_of(spectra, columns), recipe(NoScale(), divide_by_mean=True))
    good = spectra.ivar > 0
    mean = np.nanmean(np.where(good, spectra.flux, np.nan)[used].astype(np.float64), axis=0)
    np.testing.assert_allclose(statistics.mean, mean, rtol=1e-6)
    ours = statistics.apply(spectra)
    np.testing.assert_allclose(ours.flux, np.where(good, spectra.flux, 0) / statistics.mean, rtol=1e-6)
    np.testing.assert_allclose(ours.ivar, spectra.ivar * statistics.mean**2, rtol=1e-6)
    assert statistics.factor(spectra).tolist() == [1.0] * len(spectra)


def test_all_steps_together_fill_and_divide() -> None:
    spectra, columns = survey()
    together = compute(blocks_of(spectra, columns), recipe(missing_max=0.1, impute=True, divide_by_mean=True))
    apart = compute(blocks_of(spectra, columns), recipe(missing_max=0.1, impute=True))
    first, second = apart.apply(spectra), together.apply(spectra)
    keep = together.keep
    np.testing.assert_allclose(second.flux[:, keep], first.flux[:, keep] / together.mean[keep], rtol=1e-6)
    np.testing.assert_allclose(second.ivar[:, keep], first.ivar[:, keep] * together.mean[keep] ** 2, rtol=1e-5)
    assert not second.flux[:, ~keep].any()


@pytest.mark.parametrize("share", [0.25, 0.5, 0.7, 0.75, 0.9])
def test_threshold_leaves_the_highest_bin_of_the_paper(share: float) -> None:
    """train_sets.py: sort by S/N, floor(N / 4) in a bin; the spectra at and above the threshold are the last bin."""
    spectra, columns = survey(rows=203)
    snr = np.random.default_rng(3).permutation(203).astype(np.float32)  # no ties
    columns["snr"] = snr
    statistics = compute(blocks_of(spectra, columns), recipe(snr_quantile=share))
    used = columns["status"] == 0
    status = statistics.status(snr, columns["status"])
    assert (status == 0).sum() == int(np.floor((1 - share) * used.sum() + 1e-9))
    assert snr[status == 0].min() > snr[(status == Status.LOW_SNR) & used].max()
    assert ((status & Status.REDSHIFT_WARNING) == columns["status"]).all()
    assert statistics.is_identity  # a threshold changes no pixel


def test_highest_takes_all_ties() -> None:
    spectra, columns = survey(rows=60)
    columns["status"][:] = 0
    columns["snr"] = np.repeat(np.arange(6, dtype=np.float32) - 2, 10)
    for wanted, taken in [(1, 10), (10, 10), (11, 20), (59, 60), (60, 60), (1000, 60)]:
        statistics = compute(blocks_of(spectra, columns), recipe(snr_highest=wanted))
        assert (statistics.status(columns["snr"], columns["status"]) == 0).sum() == taken
    assert statistics.snr_min == -np.inf


# --- laws -------------------------------------------------------------------------------------------------------------

EVERYTHING = recipe(missing_max=0.1, impute=True, divide_by_mean=True, snr_quantile=0.3)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    where=st.lists(st.integers(0, 83), max_size=9).map(sorted),
    order=st.randoms(use_true_random=False),
    parallel=st.integers(1, 5),
)
def test_the_cut_changes_no_bit(where: list[int], order: Any, parallel: int) -> None:
    spectra, columns = survey()
    whole = compute(blocks_of(spectra, columns, ()), EVERYTHING, scheduler="synchronous", parallel=1)
    blocks = blocks_of(spectra, columns, where)
    order.shuffle(blocks)
    assert compute(blocks, EVERYTHING, scheduler="synchronous", parallel=parallel).digest == whole.digest


def table(columns: Columns) -> Columns:
    return columns


@pytest.mark.slow
def test_threads_processes_and_tables_change_no_bit() -> None:
    spectra, columns = survey()
    whole = compute(blocks_of(spectra, columns, ()), EVERYTHING, scheduler="synchronous")
    blocks = blocks_of(spectra, columns)
    calls = []

    def count(part: Block) -> tuple[Spectra, Columns]:
        calls.append(1)
        return part()

    tables = [partial(table, columns)]
    counted = [partial(count, block) for block in blocks]
    assert compute(counted, EVERYTHING, tables=tables).digest == whole.digest
    assert len(calls) == 4 * len(blocks)  # one pass for the wavelengths, three for mean and quantiles
    assert compute(pickle.loads(pickle.dumps(blocks)), EVERYTHING, scheduler="processes").digest == whole.digest


def test_passes_that_are_not_needed_are_not_made() -> None:
    spectra, columns = survey()

    def refuse() -> tuple[Spectra, Columns]:
        raise AssertionError("read for nothing")

    assert compute([refuse], recipe()).is_identity
    threshold = compute([refuse], recipe(snr_highest=9), tables=[partial(table, columns)])
    assert np.isfinite(threshold.snr_min)
    assert compute([refuse], recipe()).apply(spectra) is spectra


def test_what_comes_later_gets_the_same_treatment() -> None:
    spectra, columns = survey()
    statistics = compute(blocks_of(spectra, columns), EVERYTHING)
    kept = Statistics.from_arrays(statistics.to_arrays())
    assert kept.digest == statistics.digest
    assert (kept.snr_min, kept.renormalize, kept.rows) == (statistics.snr_min, "median", statistics.rows)
    later, _ = survey(seed=8, rows=31)
    whole = kept.apply(later)
    for rows in (slice(0, 1), slice(7, 20), np.array([30, 2])):
        part = kept.apply(later[rows], kept.factor(later)[rows])
        assert part.flux.tobytes() == whole.flux[rows].tobytes()
        assert part.ivar.tobytes() == whole.ivar[rows].tobytes()
    assert len(kept.apply(later[:0])) == 0


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, 1e30, -3e38])
def test_a_masked_pixel_changes_no_bit(rubbish: float) -> None:
    spectra, columns = survey()
    flux = np.where(spectra.ivar > 0, spectra.flux, np.float32(rubbish))
    other = Spectra(spectra.rows, flux, spectra.ivar, GRID)
    first, second = (compute(blocks_of(each, columns), EVERYTHING) for each in (spectra, other))
    assert first.digest == second.digest
    assert first.apply(spectra).flux.tobytes() == first.apply(other).flux.tobytes()


def test_rows_that_are_set_aside_count_for_nothing() -> None:
    spectra, columns = survey()
    flux = spectra.flux.copy()
    flux[columns["status"] != 0] = 77.0
    other = Spectra(spectra.rows, flux, spectra.ivar, GRID)
    assert (
        compute(blocks_of(spectra, columns), EVERYTHING).digest == compute(blocks_of(other, columns), EVERYTHING).digest
    )


def test_a_spectrum_without_pixels_or_scale_is_never_filled() -> None:
    spectra, columns = survey()
    statistics = compute(blocks_of(spectra, columns), EVERYTHING)
    flux, ivar = np.ones((3, PIXELS), np.float32), np.ones((3, PIXELS), np.float32)
    ivar[0] = 0
    flux[1] = -1
    given_spectra = Spectra(np.arange(3), flux, ivar, GRID, np.array([0.1, 0.2, np.nan]))
    factor = statistics.factor(given_spectra)
    out = statistics.apply(given_spectra, factor)
    assert np.isnan(factor).tolist() == [True, True, False]
    assert not out.flux[:2].any()
    assert not out.ivar[:2].any()
    assert (out.ivar[2] > 0).sum() == statistics.keep.sum()
    assert out.redshift is given_spectra.redshift
    status = np.array([int(Status.DEAD), 0, 0], np.int32)
    snr = np.full(3, 99.0, np.float32)
    assert statistics.status(snr, status, factor).tolist() == [Status.DEAD, Status.NO_SCALE, 0]


def test_extreme_values_stay_finite() -> None:
    spectra, columns = survey()
    flux, ivar = spectra.flux.copy(), np.maximum(spectra.ivar, np.float32(1))
    flux[~np.isfinite(flux)] = 1
    flux[0, 5], flux[1] = 1e30, 3e38
    flux[2], ivar[2] = 1e-38, 3e38
    ivar[3], ivar[4] = 1e-44, 3e38
    extreme = Spectra(spectra.rows, flux, ivar, GRID)
    statistics = compute(blocks_of(extreme, columns), EVERYTHING)
    out = statistics.apply(extreme)
    assert np.isfinite(out.flux).all()
    assert np.isfinite(out.ivar).all()
    assert ((out.ivar == 0) <= (out.flux == 0)).all()


def test_where_the_mean_is_not_positive_pixels_are_masked() -> None:
    spectra, columns = survey()
    flux = np.ones_like(spectra.flux)
    flux[:, 3], flux[:, 4] = -0.5, 1e-7
    level = Spectra(spectra.rows, flux, np.ones_like(flux), GRID)
    statistics = compute(blocks_of(level, columns), recipe(NoScale(), divide_by_mean=True, impute=True))
    out = statistics.apply(level)
    assert np.flatnonzero(out.ivar[0] == 0).tolist() == [3, 4]
    # A sample without scatter could only be filled with an infinite weight: such pixels stay masked.
    ivar = np.ones_like(flux)
    ivar[:, 9] = 0
    assert not statistics.apply(Spectra(spectra.rows, flux, ivar, GRID)).ivar[:, 9].any()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_spectra() -> None:
    """Fifty blocks of 1.3 MB each; a block and the summaries of its temporaries fit in far less than all."""
    pixels, rows = 160, 1000
    grid = WaveGrid("linear", 4000.0, 2.0, pixels)

    def block(seed: int) -> tuple[Spectra, Columns]:
        flux = np.random.default_rng(seed).uniform(0.5, 2, (rows, pixels)).astype(np.float32)
        columns = {"status": np.zeros(rows, np.int32), "snr": np.ones(rows, np.float32)}
        return Spectra(np.arange(rows), flux, np.ones_like(flux), grid), columns

    settings = Prepare(
        grid=Grid(scale="linear", first=4000.0, last=4000.0 + 2 * (pixels - 1), pixels=pixels), sample=EVERYTHING.sample
    )
    peaks = []
    for count in (5, 50):
        blocks: list[Callable[[], tuple[Spectra, Columns]]] = [partial(block, seed) for seed in range(count)]
        tracemalloc.start()
        compute(blocks, settings, scheduler="synchronous", parallel=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 0.5 * 50 * rows * pixels * 8


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (recipe(snr_quantile=0.5, snr_highest=3), "give one threshold"),
        (recipe(missing_max=0.0), "drops every wavelength"),
        (recipe(missing_max=0.1).model_copy(update={"flux_factor": True}), "undoes prepare.flux_factor"),
    ],
)
def test_settings_without_meaning_are_refused(prepare: Prepare, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(prepare)


@pytest.mark.parametrize(
    ("sample", "rows", "says"),
    [
        ({"impute": True}, 9, "impute needs 10 usable spectra or more; there are 9"),
        ({"divide_by_mean": True}, 0, "divide_by_mean needs 1 usable"),
        ({"missing_max": 0.1}, 0, "missing_max needs 1 usable"),
        ({"snr_quantile": 0.1}, 0, "snr_quantile needs 1 usable"),
        ({"snr_highest": 5}, 0, "snr_highest needs 1 usable"),
    ],
)
def test_too_few_spectra_are_refused(sample: dict[str, Any], rows: int, says: str) -> None:
    spectra, columns = survey()
    columns["status"][:] = 2
    columns["status"][:rows] = 0
    with pytest.raises(ConfigError, match=says):
        compute(blocks_of(spectra, columns), recipe(NoScale(), **sample))


def test_samples_that_give_nothing_are_refused() -> None:
    spectra, columns = survey()
    with pytest.raises(ConfigError, match="no spectra"):
        compute([], recipe(impute=True))
    with pytest.raises(ConfigError, match=r"leaves no wavelength: every one is masked in 0\.\d+ of the spectra"):
        compute(blocks_of(*survey(missing=0.9)), recipe(missing_max=0.1))
    dark = Spectra(spectra.rows, -np.ones_like(spectra.flux), np.ones_like(spectra.flux), GRID)
    with pytest.raises(ConfigError, match="positive at no wavelength"):
        compute(blocks_of(dark, columns), recipe(NoScale(), divide_by_mean=True))


def test_statistics_of_another_grid_are_refused() -> None:
    spectra, _ = survey()
    with pytest.raises(ValueError, match="spectra of 40 pixels; these statistics are of 41"):
        Statistics.identity(41).apply(spectra)
    arrays = Statistics.identity(40).to_arrays()
    with pytest.raises(ValueError, match="statistics without mean"):
        Statistics.from_arrays({name: array for name, array in arrays.items() if name != "mean"})
    with pytest.raises(ValueError, match="statistics of shapes"):
        Statistics.from_arrays(arrays | {"mean": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match="renormalize = 7"):
        Statistics.from_arrays(arrays | {"renormalize": np.array([7])})
    assert "40 of 40 pixels kept" in repr(Statistics.identity(40))
