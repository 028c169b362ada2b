"""Planted anomalies: the limit of no strength, rows on their own, the recipe taken again, and what cannot be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distspec.config import AtWavelength, Cuts, Distance, Grid, Mean, Median, NoScale, Prepare, Simulate
from distspec.errors import ConfigError
from distspec.prepare.recipe import Recipe, luminosity_distance
from distspec.sources.simulation.anomalies import ANOMALIES
from distspec.sources.simulation.survey import SDSS_GRID, SimulatedSurvey
from distspec.spectra import Spectra, WaveGrid
from distspec.stages.evaluate.injection import GRADED, KINDS, MOVED, Injected, describe, inject
from distspec.statistics.summaries import row_mean, row_median
from distspec.store.frozen import Statistics
from tests.conftest import make_spectra, make_store

REST = Prepare()
OBSERVED = Prepare(frame="observed", grid=Grid(first=3850.0, last=9150.0, pixels=1500))
FRAMES = {"rest": REST, "observed": OBSERVED}
EVERY = [(frame, kind) for frame in FRAMES for kind in KINDS]
GRADES = [kind for kind in KINDS if GRADED[kind]]
OPEN = Cuts(coverage_min=0.0, zwarn=False)

Hosts = tuple[Spectra, np.ndarray]


def grid_of(settings: Prepare) -> WaveGrid:
    grid = settings.grid
    return WaveGrid.between(grid.scale, grid.first, grid.last, grid.pixels)


@pytest.fixture(scope="module")
def simulated() -> dict[str, Hosts]:
    """Ordinary simulated galaxies, prepared in each frame; a few pixels in a hundred are masked."""
    raw, columns = SimulatedSurvey(Simulate(spectra=64, anomalies=0.0), seed=3).rows(0, 64)
    found = {}
    for frame, settings in FRAMES.items():
        spectra, prepared = Recipe(settings, SDSS_GRID)(raw, columns)
        usable = np.flatnonzero((prepared["status"] == 0) & (prepared["class"] == "GALAXY"))[:40]
        found[frame] = spectra[usable], prepared["z"][usable]
    return found


def flat(settings: Prepare, z: Any, level: float = 1.0, ivar: float = 400.0) -> Hosts:
    """Spectra without features or noise."""
    z = np.atleast_1d(np.asarray(z, dtype=np.float64))
    grid = grid_of(settings)
    flux = np.full((len(z), grid.pixels), level, np.float32)
    redshift = z if settings.frame == "observed" else None
    return Spectra(np.arange(len(z)) + 2**40, flux, np.full_like(flux, ivar), grid, redshift), z


def plain(frame: str = "rest", **changes: Any) -> Prepare:
    """The usual grids, with nothing done after the change."""
    base = FRAMES[frame].model_copy(update={"normalize": NoScale(), "max_pixel_snr": None, "cuts": OPEN})
    return base.model_copy(update=changes)


def made(kind: str, hosts: Hosts, strength: float, settings: Prepare, seed: int = 1) -> Injected:
    """Plant; companions of blends are the hosts themselves, each beside another one."""
    spectra, z = hosts
    other = np.roll(np.arange(len(z)), 7)
    companions = Spectra(spectra.rows[other], spectra.flux[other], spectra.ivar[other], spectra.grid)
    return inject(kind, spectra, z, strength, seed, settings, companions, z[other])


def test_kinds_are_those_of_the_simulator_and_three_more() -> None:
    assert (*ANOMALIES, "blend", "redshift-error", "calibration-step") == KINDS
    assert [kind for kind in KINDS if not GRADED[kind]] == ["wrong-redshift"]
    assert len({describe(kind) for kind in KINDS}) == len(KINDS)
    assert set(MOVED) == {"wrong-redshift", "redshift-error"}


# --- laws that hold for every kind ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frame", "kind"), [pair for pair in EVERY if GRADED[pair[1]]])
def test_without_strength_the_host_is_left(frame: str, kind: str, simulated: dict[str, Hosts]) -> None:
    spectra = simulated[frame][0]
    planted = made(kind, simulated[frame], 1e-9, FRAMES[frame]).spectra
    good = planted.good & spectra.good
    # Where a companion is not known a blend is masked, and normalised over what is left.
    norm = row_median(spectra.flux, good)[:, None] if kind == "blend" else np.ones((len(spectra), 1))
    np.testing.assert_allclose((planted.flux * norm)[good], spectra.flux[good], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose((planted.ivar / norm**2)[good], spectra.ivar[good], rtol=1e-5)
    if kind != "blend":
        np.testing.assert_array_equal(planted.good, spectra.good)
    np.testing.assert_array_equal(planted.good & ~spectra.good, False)


@pytest.mark.parametrize(("frame", "kind"), EVERY)
def test_regions_lie_on_good_pixels_and_leave_most_of_the_spectrum(
    frame: str, kind: str, simulated: dict[str, Hosts]
) -> None:
    planted = made(kind, simulated[frame], 1.0, FRAMES[frame])
    assert planted.possible.mean() > 0.9
    np.testing.assert_array_equal(planted.region.any(axis=1), planted.possible)
    assert not (planted.region & ~planted.spectra.good).any()
    assert np.median(planted.share) < 0.55
    assert planted.share.max() < 0.65


@pytest.mark.parametrize(("frame", "kind"), EVERY)
def test_a_row_depends_neither_on_its_batch_nor_on_what_is_masked(
    frame: str, kind: str, simulated: dict[str, Hosts]
) -> None:
    spectra, z = (part[:9] for part in simulated[frame])
    whole = made(kind, (spectra, z), 0.7, FRAMES[frame])
    garbage = np.where(spectra.good, spectra.flux, np.float32(np.nan))
    garbage[:, ::2] = np.where(spectra.good, spectra.flux, np.float32(1e30))[:, ::2]
    other = np.roll(np.arange(9), 7)
    for row in (0, 4, 8):
        one = slice(row, row + 1)
        host = Spectra(spectra.rows[one], garbage[one], spectra.ivar[one], spectra.grid, spectra[one].redshift)
        beside = Spectra(host.rows, garbage[other[one]], spectra.ivar[other[one]], spectra.grid)
        alone = inject(kind, host, z[one], 0.7, 1, FRAMES[frame], beside, z[other[one]])
        assert alone.spectra.flux.tobytes() == whole.spectra.flux[one].tobytes()
        assert alone.spectra.ivar.tobytes() == whole.spectra.ivar[one].tobytes()
        np.testing.assert_array_equal(alone.region, whole.region[one])
        np.testing.assert_array_equal(alone.possible, whole.possible[one])


@pytest.mark.parametrize("kind", GRADES)
def test_more_strength_is_more_change(kind: str, rng: np.random.Generator) -> None:
    # Broad features and no noise: once a line has moved by its width, moving it farther changes no more.
    settings, z = REST, rng.uniform(0.05, 0.3, 12)
    hosts = flat(settings, z)[0]
    places = rng.uniform(3600.0, 8000.0, (12, 5, 1))
    bumps = np.exp(-0.5 * ((hosts.grid.wave - places) / 150.0) ** 2).sum(axis=1)
    flux = (1.0 + 0.3 * bumps) / row_median(1.0 + 0.3 * bumps, hosts.good)[:, None]
    spectra = Spectra(hosts.rows, flux.astype(np.float32), hosts.ivar, hosts.grid)
    sizes = []
    for strength in (0.1, 0.25, 0.5, 1.0, 2.0):
        planted = made(kind, (spectra, z), strength, settings)
        assert planted.possible.all()
        # Where a blend hides the host, at every strength alike, there is nothing to compare.
        difference = np.where(planted.spectra.good, planted.spectra.flux - flux, 0.0)
        sizes.append((difference**2).sum(axis=1))
    assert (np.diff(sizes, axis=0) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_dice_fall_by_row_kind_and_seed(kind: str, simulated: dict[str, Hosts]) -> None:
    spectra, z = simulated["rest"]
    same = np.zeros(8, dtype=int)
    twins = Spectra(spectra.rows[:8], spectra.flux[same], spectra.ivar[same], spectra.grid)
    once, again = (made(kind, (twins, z[same]), 1.0, REST).spectra.flux for _ in range(2))
    np.testing.assert_array_equal(once, again)
    if kind in ("sn-ia", "blend"):  # the same for all, or as the companions are
        np.testing.assert_array_equal(once, once[[0]].repeat(8, axis=0))
        return
    assert len(np.unique(once, axis=0)) > 1
    assert (made(kind, (twins, z[same]), 1.0, REST, seed=2).spectra.flux != once).any()


def test_a_kind_that_has_one_grade_looks_at_no_strength(simulated: dict[str, Hosts]) -> None:
    half, full = (made("wrong-redshift", simulated["rest"], strength, REST) for strength in (0.5, 1.0))
    np.testing.assert_array_equal(half.spectra.flux, full.spectra.flux)
    np.testing.assert_array_equal(half.region, full.region)


# --- the recipe's last steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_planted_spectra_are_normalised_and_floored_again(kind: str, simulated: dict[str, Hosts]) -> None:
    planted = made(kind, simulated["rest"], 1.0, REST)
    good = planted.spectra.good
    np.testing.assert_allclose(row_median(planted.spectra.flux, good), 1.0, rtol=1e-6)
    assert (np.abs(planted.spectra.flux) * np.sqrt(planted.spectra.ivar))[good].max() <= 50.0 * (1 + 1e-5)
    mean = REST.model_copy(update={"normalize": Mean()})
    scale = row_mean(simulated["rest"][0].flux, simulated["rest"][0].good)
    planted = made(kind, simulated["rest"], 1.0, mean)
    np.testing.assert_allclose(row_mean(planted.spectra.flux, planted.spectra.good), scale, rtol=1e-6)


def test_a_norm_that_does_not_look_at_the_changed_pixels_leaves_the_others() -> None:
    at = plain(normalize=AtWavelength(wave=5500.0, width=40.0))
    hosts = flat(at, [0.1])
    for settings in (at, plain(normalize=Distance()), plain()):
        planted = made("extreme-lines", hosts, 1.0, settings).spectra
        pixel = np.abs(hosts[0].grid.wave - 5500.0).argmin()
        assert planted.flux[0, pixel] == pytest.approx(1.0, abs=1e-6)
        assert planted.flux[0].max() > 20
    # The median is another matter: an A star changes it, and all pixels with it.
    assert made("e+a", hosts, 1.0, plain(normalize=Median())).spectra.flux[0].mean() == pytest.approx(1.0, abs=0.1)
    assert made("e+a", hosts, 1.0, plain()).spectra.flux[0].mean() == pytest.approx(2.0, abs=0.1)


def test_a_wrong_redshift_enters_all_that_the_recipe_makes_of_it() -> None:
    hosts, z = flat(plain(), np.linspace(0.1, 0.2, 6), level=1.1)
    observed = flat(plain("observed"), z)[0]
    wrong = made("redshift-error", (observed, z), 1.0, plain("observed")).spectra.redshift
    assert wrong is not None
    # The dice of a row are the same in every frame.
    scaled = plain(normalize=Median(), flux_factor=True)
    flux = made("redshift-error", (hosts, z), 1.0, scaled).spectra.flux
    np.testing.assert_allclose(flux[:, 500], 1.1 * (1 + wrong) / (1 + z), rtol=1e-6)
    flux = made("redshift-error", (hosts, z), 1.0, plain(normalize=Distance())).spectra.flux
    expected = 1.1 * (luminosity_distance(wrong) / luminosity_distance(z)) ** 2
    np.testing.assert_allclose(flux[:, 500], expected, rtol=1e-6)


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_kinds_that_a_short_grid_does_not_show_are_said_to_be() -> None:
    settings = plain(grid=Grid(first=5250.0, last=5700.0, pixels=200))
    hosts = flat(settings, np.linspace(0.2, 0.26, 10))
    absent = {"double-peaked", "extreme-lines", "blueshifted-na-d", "arm-step", "sky-residual"}
    for kind in KINDS:
        planted = made(kind, hosts, 1.0, settings)
        if kind in absent:
            assert not planted.possible.any(), kind
            assert not planted.region.any()
            assert planted.spectra.flux.tobytes() == hosts[0].flux.tobytes()
            assert planted.spectra.ivar.tobytes() == hosts[0].ivar.tobytes()
    for kind in ("e+a", "sn-ia", "cosmic-ray", "red-runaway", "calibration-step"):
        assert made(kind, hosts, 1.0, settings).possible.all(), kind


def test_without_a_redshift_only_what_happens_on_earth_or_in_front_is_possible() -> None:
    settings = plain("observed")
    hosts = flat(settings, [np.nan, 0.1])
    unknown = {kind: bool(made(kind, hosts, 1.0, settings).possible[0]) for kind in KINDS}
    here = {"m-star-overlap", "arm-step", "sky-residual", "cosmic-ray", "red-runaway", "blend", "calibration-step"}
    assert {kind for kind, possible in unknown.items() if possible} == here
    redshift = made("redshift-error", hosts, 1.0, settings).spectra.redshift
    assert redshift is not None
    assert np.isnan(redshift[0])
    assert redshift[1] != 0.1


def test_a_change_that_is_lost_in_the_noise_is_not_possible() -> None:
    clear, lost = (flat(plain(), [0.1], ivar=ivar) for ivar in (400.0, 0.1))
    assert made("blueshifted-na-d", clear, 1.0, plain()).possible.all()
    assert not made("blueshifted-na-d", lost, 1.0, plain()).possible.any()


def test_dead_spectra_and_companions_elsewhere_are_not_possible() -> None:
    hosts, z = flat(plain(), [0.1, 0.1])
    hosts.ivar[0] = 0.0
    for kind in KINDS:
        planted = made(kind, (hosts, z), 1.0, plain())
        assert not planted.possible[0]
        assert not planted.spectra.good[0].any()
    far = flat(plain(), [1.5, 1.5])
    planted = inject("blend", hosts, z, 1.0, 1, plain(), *far)
    assert not planted.possible.any()
    np.testing.assert_array_equal(planted.spectra.flux[1], hosts.flux[1])


def test_what_makes_no_sense_is_refused() -> None:
    hosts, z = flat(plain(), [0.1])
    with pytest.raises(ConfigError, match="'e-a'; expected one of e\\+a, double-peaked"):
        inject("e-a", hosts, z, 1.0, 1, plain())
    with pytest.raises(ConfigError, match="expected a positive number"):
        inject("e+a", hosts, z, 0.0, 1, plain())
    with pytest.raises(ValueError, match="expected one for each host"):
        inject("blend", hosts, z, 1.0, 1, plain())
    with pytest.raises(ValueError, match="without companion_z"):
        inject("blend", hosts, z, 1.0, 1, plain(), hosts)


def test_hosts_are_taken_before_the_statistics_of_the_sample(tmp_path: Path, rng: np.random.Generator) -> None:
    grid = WaveGrid.between("log", 3600.0, 7200.0, 120)
    spectra = make_spectra(rng, grid, 30)
    store = make_store(tmp_path / "s.zarr", spectra, shard_rows=16, chunk_rows=8, look=False)
    one = Statistics.identity(120)
    store.freeze(Statistics(30, one.keep, np.full(120, 2, np.float32), one.median, one.scatter))
    store.mark_finished()
    rows = np.array([20, 3])
    good = spectra.good[rows]
    np.testing.assert_array_equal(store.take(rows, frozen=False).flux, spectra.flux[rows])
    np.testing.assert_array_equal(store.take(rows, frozen=False).ivar, spectra.ivar[rows])
    np.testing.assert_array_equal(store.take(rows).flux[good], spectra.flux[rows][good] / 2)
