"""The simulated survey: reproducible, with true noise, true labels and honest windows; and the files it writes."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from distspec.config import Simulate
from distspec.errors import SourceError
from distspec.sources import Piece
from distspec.sources.simulation.anomalies import ANOMALIES, SEEN, SHOWN, STRONG
from distspec.sources.simulation.populations import NARROW, draw_galaxies, kauffmann, kewley
from distspec.sources.simulation.survey import BLOCK_ROWS, SDSS_GRID, SimulatedSurvey
from distspec.sources.simulation.templates import basis
from distspec.spectra import Columns, Spectra, Status, WaveGrid
from distspec.spectra.lines.wavelengths import EMISSION
from tests.support.survey_files import DESI_ARMS, sdss_identity, write_desi, write_sdss

WAVE = SDSS_GRID.wave
REST = WaveGrid("log", 1000.0, 1e-4, 10000)


@pytest.fixture(scope="module")
def survey() -> SimulatedSurvey:
    return SimulatedSurvey(Simulate(spectra=2048, anomalies=0.1), seed=5)


@pytest.fixture(scope="module")
def batch(survey: SimulatedSurvey) -> tuple[Spectra, Columns]:
    return survey.rows(0, 2048)


@pytest.fixture(scope="module")
def model(survey: SimulatedSurvey) -> np.ndarray:
    return survey.model(0, 2048)


@pytest.fixture(scope="module")
def hosts(survey: SimulatedSurvey) -> np.ndarray:
    """The noiseless spectra before anything was planted."""
    return survey.model(0, 2048, planted=False)


def mean_near(flux: np.ndarray, z: np.ndarray, low: float, high: float) -> np.ndarray:
    """Mean of each spectrum over a rest-frame range, as F_nu up to a constant."""
    rest = WAVE / (1 + z[:, None])
    inside = (rest >= low) & (rest <= high)
    return (flux * rest**2 * inside).sum(axis=1) / inside.sum(axis=1)


def test_same_seed_same_survey(survey: SimulatedSurvey, batch: tuple[Spectra, Columns]) -> None:
    again, columns = pickle.loads(pickle.dumps(survey)).rows(0, 2048)
    assert np.array_equal(again.flux, batch[0].flux)
    assert np.array_equal(again.ivar, batch[0].ivar)
    for name, values in columns.items():
        np.testing.assert_array_equal(values, batch[1][name], err_msg=name)
    other = SimulatedSurvey(survey.settings, seed=6).rows(0, 10)[0]
    assert not np.array_equal(other.flux, again.flux[:10])


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (63, 65), (100, 117), (500, 530), (1023, 1025)])
def test_any_range_is_a_slice_of_the_whole(
    survey: SimulatedSurvey, batch: tuple[Spectra, Columns], start: int, stop: int
) -> None:
    spectra, columns = survey.rows(start, stop)
    assert np.array_equal(spectra.rows, np.arange(start, stop))
    assert np.array_equal(spectra.flux, batch[0].flux[start:stop])
    assert np.array_equal(spectra.ivar, batch[0].ivar[start:stop])
    for name, values in columns.items():
        np.testing.assert_array_equal(values, batch[1][name][start:stop], err_msg=name)


def test_a_longer_survey_begins_with_the_shorter_one(survey: SimulatedSurvey) -> None:
    short = SimulatedSurvey(survey.settings.model_copy(update={"spectra": 700}), survey.seed)
    assert [(entry.name, entry.count) for entry in short.files()] == [("block-000000", 512), ("block-000001", 188)]
    assert short.count("block-000001") == 188
    ours, theirs = short.read(Piece("block-000001", 0, 188)), survey.rows(512, 700)
    assert np.array_equal(ours[0].flux, theirs[0].flux)
    np.testing.assert_array_equal(ours[1]["anomaly_wave"], theirs[1]["anomaly_wave"])


def test_rows_outside_are_refused(survey: SimulatedSurvey) -> None:
    for start, stop in ((2040, 2049), (5, 5), (-1, 3)):
        with pytest.raises(SourceError, match="rows"):
            survey.rows(start, stop)
    with pytest.raises(SourceError, match="3500"):
        survey.on(WaveGrid("linear", 3000.0, 1.0, 100))


def test_another_grid_has_the_same_truth(survey: SimulatedSurvey, model: np.ndarray) -> None:
    arm = survey.on(DESI_ARMS["R"])
    assert all(np.array_equal(arm.catalog(0, 64)[k], survey.catalog(0, 64)[k]) for k in ("id", "z", "class", "anomaly"))
    fine, coarse = arm.model(0, 64), model[:64]
    plain = ~np.isin(survey.catalog(0, 64)["anomaly"], ["cosmic-ray", "sky-residual"])
    # A band without strong gradients, wide enough that the sampling cannot matter.
    for low, high in ((5900.0, 6500.0), (6600.0, 7600.0)):
        a = fine[:, (arm.grid.wave > low) & (arm.grid.wave < high)].mean(axis=1)
        b = np.array(
            [np.trapezoid(f[m], WAVE[m]) / np.ptp(WAVE[m]) for m in [(low < WAVE) & (high > WAVE)] for f in coarse]
        )
        np.testing.assert_allclose(a[plain], b[plain], rtol=0.02)


def test_noise_is_what_ivar_says(batch: tuple[Spectra, Columns], model: np.ndarray) -> None:
    spectra, columns = batch
    normal = columns["anomaly"] == ""
    pull = ((spectra.flux - model) * np.sqrt(spectra.ivar))[normal]
    good = spectra.good[normal]
    assert np.mean(pull[good] ** 2) == pytest.approx(1.0, abs=0.01)
    assert np.mean(pull[good]) == pytest.approx(0.0, abs=0.005)
    # At every wavelength, under sky lines too.
    by_pixel = (pull**2 * good).sum(axis=0) / good.sum(axis=0)
    assert by_pixel.min() > 0.8
    assert by_pixel.max() < 1.25


def test_signal_to_noise_and_sky(batch: tuple[Spectra, Columns]) -> None:
    spectra, columns = batch
    used = np.flatnonzero(columns["status"] == 0)[:1000]
    snr = np.array(
        [np.median(spectra.flux[i][g] * np.sqrt(spectra.ivar[i][g])) for i in used for g in [spectra.good[i]]]
    )
    assert np.median(snr) == pytest.approx(20.0, rel=0.06)
    assert np.std(np.log10(snr)) == pytest.approx(0.22, abs=0.03)
    line, beside = (np.median(spectra.ivar[used, np.argmin(np.abs(WAVE - w))]) for w in (5578.9, 5545.0))
    assert beside > 4 * line


def test_masked_pixels_and_dead_fibers() -> None:
    survey = SimulatedSurvey(Simulate(spectra=4096), seed=1)
    columns = survey.catalog(0, 4096)
    dead = np.flatnonzero(columns["status"] != 0)
    assert 1 <= dead.size <= 12
    assert set(columns["status"][dead]) == {int(Status.FIBER)}
    assert (columns["anomaly"][dead] == "").all()
    one = survey.rows(int(dead[0]), int(dead[0]) + 1)[0]
    assert not one.ivar.any()
    spectra = survey.rows(0, 512)[0]
    alive = columns["status"][:512] == 0
    assert 0.004 < 1 - spectra.good[alive].mean() < 0.012
    assert np.isfinite(spectra.flux).all()
    assert (spectra.ivar >= 0).all()
    wrong = np.abs(spectra.flux - survey.model(0, 512))[alive][~spectra.good[alive]]
    assert np.median(wrong) > 50  # garbage under the mask, so that nobody can use it unnoticed


def test_columns_have_the_types_of_every_source(batch: tuple[Spectra, Columns]) -> None:
    columns = batch[1]
    kinds = {name: values.dtype for name, values in columns.items()}
    assert kinds["id"] == kinds["zwarn"] == np.int64
    assert kinds["ra"] == kinds["dec"] == kinds["z"] == kinds["truth_z"] == np.float64
    assert kinds["ebv"] == kinds["anomaly_wave"] == np.float32
    assert kinds["status"] == np.int32
    assert {kinds[name].kind for name in ("class", "subclass", "anomaly")} == {"U"}
    assert len(set(columns["id"].tolist())) == 2048
    assert columns["id"].min() > 2**53
    assert len(set(columns["id"].astype(np.float64))) < 2048  # a float would confuse them
    assert (columns["ebv"] > 0).all()
    assert (np.abs(columns["dec"]) <= 90).all()


def test_labels_are_sdss_labels(batch: tuple[Spectra, Columns]) -> None:
    columns = batch[1]
    kind, label = columns["class"], columns["subclass"]
    assert set(kind) == {"GALAXY", "QSO", "STAR"}
    known = {"", "STARFORMING", "STARBURST", "AGN"}
    known |= {f"{name} BROADLINE".strip() for name in known}
    assert set(label[kind != "STAR"]) <= known
    assert {"", "STARFORMING", "STARBURST", "AGN", "AGN BROADLINE"} <= set(label[kind == "GALAXY"])
    assert set(label[kind == "QSO"]) <= {"BROADLINE", "AGN BROADLINE"}
    assert {"F9", "K1", "M3", "WD"} <= set(label[kind == "STAR"])
    assert np.mean(kind == "QSO") == pytest.approx(0.08 * 0.9, abs=0.02)
    assert np.mean(kind == "STAR") == pytest.approx(0.07 * 0.9, abs=0.02)


def test_redshifts_follow_the_class(batch: tuple[Spectra, Columns]) -> None:
    columns = batch[1]
    z, kind = columns["z"], columns["class"]
    assert z[kind == "GALAXY"].min() > 0
    assert z[kind == "GALAXY"].max() <= 0.4 + 1e-3
    assert np.abs(z[kind == "STAR"]).max() < 1.1e-3
    assert 0.35 < np.mean(z[kind == "QSO"] < 0.8) < 0.65
    right = columns["anomaly"] != "wrong-redshift"
    assert np.abs(z - columns["truth_z"])[right].max() < 0.02
    assert np.abs(z - columns["truth_z"])[~right].min() > 0.005


def test_line_ratios_follow_the_branches() -> None:
    templates = basis(REST)
    galaxies = draw_galaxies(np.random.default_rng(1), 4000, 0.4, templates)
    flux = {name: galaxies.objects.narrow[:, i] for i, name in enumerate(NARROW)}
    n2 = np.log10(flux["[N II] 6585"] / flux["H alpha"])
    o3 = np.log10(flux["[O III] 5008"] / flux["H beta"])
    forming = np.isin(galaxies.subclass, ["STARFORMING", "STARBURST"])
    agn = np.char.startswith(galaxies.subclass, "AGN")
    assert forming.sum() > 1000
    assert agn.sum() > 200
    assert (o3[forming] < kauffmann(n2[forming])).all()
    assert (o3[agn] > kewley(n2[agn])).all()
    for strong, weak, ratio in (("[O III] 5008", "[O III] 4960", 2.98), ("[N II] 6585", "[N II] 6550", 3.05)):
        # Dust reddens even within a doublet, by a few per cent at most.
        np.testing.assert_allclose(flux[strong] / flux[weak], ratio, rtol=0.04)
    decrement = flux["H alpha"] / flux["H beta"]
    clear = forming & (galaxies.objects.dust == 0)
    np.testing.assert_allclose(decrement[clear], 2.86, rtol=1e-6)
    assert (decrement[forming & (galaxies.objects.dust > 0.05)] > 3.0).all()


def test_equivalent_width_of_h_alpha_in_the_spectrum(model: np.ndarray, batch: tuple[Spectra, Columns]) -> None:
    columns = batch[1]
    starburst = (columns["subclass"] == "STARBURST") & (columns["anomaly"] == "") & (columns["truth_z"] < 0.38)
    starburst &= columns["class"] == "GALAXY"
    z = columns["truth_z"][starburst]
    rest = WAVE / (1 + z[:, None])
    flux, step = model[starburst], rest * np.log(10) * 1e-4
    side = ((rest > 6480) & (rest < 6520)) | ((rest > 6620) & (rest < 6660))
    level = (flux * side).sum(axis=1) / side.sum(axis=1)
    inside = np.abs(rest - EMISSION["H alpha"]) < 30
    width = ((flux / level[:, None] - 1) * step * inside).sum(axis=1)
    # The limit for this label is 50 Å in H alpha; [N II] adds to what is measured here, the stars' own line takes away.
    assert width.min() > 40
    assert width.max() < 250


def test_old_galaxies_have_the_larger_break(model: np.ndarray, batch: tuple[Spectra, Columns]) -> None:
    columns = batch[1]
    z = columns["truth_z"]
    # D4000 of Balogh et al. (1999).
    seen = (columns["class"] == "GALAXY") & (columns["anomaly"] == "") & (z > 0.02)
    d4000 = mean_near(model[seen], z[seen], 4000, 4100) / mean_near(model[seen], z[seen], 3850, 3950)
    label = columns["subclass"][seen]
    assert 1.6 < np.median(d4000[label == ""]) < 2.2
    assert 1.0 < np.median(d4000[label == "STARBURST"]) < 1.4
    assert (
        np.median(d4000[label == "STARBURST"])
        < np.median(d4000[label == "STARFORMING"])
        < np.median(d4000[label == ""])
    )


def test_flux_is_reddened_by_the_milky_way(survey: SimulatedSurvey) -> None:
    from astropy import units
    from dust_extinction.parameter_averages import F99

    from distspec.sources.simulation.instrument import optics
    from distspec.sources.simulation.survey import _rest_grid

    curve = optics(SDSS_GRID, _rest_grid(0.4)).reddening
    np.testing.assert_allclose(10 ** (-0.4 * curve * 0.1), F99(Rv=3.1).extinguish(WAVE * units.AA, Ebv=0.1), rtol=1e-5)


def test_broadening_keeps_the_light_and_wipes_out_the_detail() -> None:
    templates = basis(REST)
    sharp, blurred = templates.flux[0], templates.flux[3]
    wave = templates.grid.wave
    region = (wave > 4100) & (wave < 5400)
    assert sharp[region].mean() == pytest.approx(blurred[region].mean(), rel=0.02)
    assert np.abs(np.diff(sharp[region])).sum() > 1.5 * np.abs(np.diff(blurred[region])).sum()


def test_kinds_are_planted_in_equal_number() -> None:
    survey = SimulatedSurvey(Simulate(spectra=16 * BLOCK_ROWS, anomalies=0.02), seed=3)
    columns = survey.catalog(0, survey.settings.spectra)
    counts = [int((columns["anomaly"] == kind).sum()) for kind in ANOMALIES]
    assert sum(counts) == int(0.02 * survey.settings.spectra)
    assert max(counts) - min(counts) <= 1
    assert (columns["class"][columns["anomaly"] != ""] == "GALAXY").all()
    assert set(STRONG) <= set(ANOMALIES)
    assert len(ANOMALIES) == 13


def test_no_anomalies_on_request() -> None:
    columns = SimulatedSurvey(Simulate(spectra=600, anomalies=0.0), seed=3).catalog(0, 600)
    assert (columns["anomaly"] == "").all()
    assert np.isnan(columns["anomaly_wave"]).all()


def test_windows_lie_where_they_can_be_seen(batch: tuple[Spectra, Columns]) -> None:
    columns = batch[1]
    odd = columns["anomaly"] != ""
    found, z = columns["anomaly_wave"].astype(np.float64), columns["z"]
    assert np.isnan(found[~odd]).all()
    low, high = found[odd][..., 0], found[odd][..., 1]
    used = ~np.isnan(low)
    assert used[:, 0].all()
    assert (high[used] > low[used]).all()
    assert low[used].min() >= SHOWN[0] - 0.01
    assert high[used].max() <= SHOWN[1] + 0.01
    stretch = np.broadcast_to(1 + z[odd][:, None], low.shape)[used]
    assert (low[used] * stretch).min() >= SEEN[0] - 0.01
    assert (high[used] * stretch).max() <= SEEN[1] + 0.01


# Kinds that leave the rest of the spectrum alone, and the share of the change that must lie inside the windows. The
# doublets and higher Balmer lines of the emission-line kinds have no window of their own.
LOCAL = {
    "double-peaked": 0.70,
    "extreme-lines": 0.70,
    "blueshifted-na-d": 0.85,
    "arm-step": 0.98,
    "sky-residual": 0.95,
    "cosmic-ray": 0.98,
    "red-runaway": 0.85,
}


@pytest.mark.parametrize("kind", LOCAL)
def test_change_lies_in_the_windows(survey: SimulatedSurvey, model: np.ndarray, hosts: np.ndarray, kind: str) -> None:
    columns = survey.catalog(0, 2048)
    shares = []
    for row in np.flatnonzero(columns["anomaly"] == kind)[:8]:
        with_it, without = model[row].astype(np.float64), hosts[row].astype(np.float64)
        if kind in ("extreme-lines", "blueshifted-na-d"):
            # These also have other stars or more dust: the smooth part is not what the windows are about.
            with_it, without = (f - running_median(f) for f in (with_it, without))
        change = (with_it / np.median(without) - without / np.median(without)) ** 2
        rest = WAVE / (1 + columns["z"][row])
        shown = (rest > SHOWN[0]) & (rest < SHOWN[1])
        if kind == "blueshifted-na-d":
            shown &= (rest > 5700) & (rest < 6000)
        inside = np.zeros_like(shown)
        for low, high in columns["anomaly_wave"][row]:
            inside |= (rest >= low) & (rest <= high)
        shares.append((change * inside * shown).sum() / (change * shown).sum())
    assert np.median(shares) > LOCAL[kind]


def running_median(flux: np.ndarray) -> np.ndarray:
    from scipy.ndimage import median_filter

    return median_filter(flux, 151, mode="nearest")


def spectra_of(kind: str, survey: SimulatedSurvey, model: np.ndarray) -> tuple[np.ndarray, np.ndarray, Columns]:
    """Rest-frame wavelengths (by the true redshift), fluxes and columns of one kind."""
    columns = survey.catalog(0, 2048)
    rows = np.flatnonzero(columns["anomaly"] == kind)
    assert rows.size > 5
    chosen = {name: values[rows] for name, values in columns.items()}
    return WAVE / (1 + chosen["truth_z"][:, None]), model[rows], chosen


def depth_at(rest: np.ndarray, flux: np.ndarray, center: float, half: float, side: float) -> np.ndarray:
    """One minus flux around a line over flux at both sides."""
    line = np.abs(rest - center) < half
    beside = (np.abs(rest - center) > side) & (np.abs(rest - center) < 1.5 * side)
    return 1 - (flux * line).sum(axis=1) / line.sum(axis=1) * beside.sum(axis=1) / (flux * beside).sum(axis=1)


def test_post_starbursts_have_balmer_lines_and_no_emission(survey: SimulatedSurvey, model: np.ndarray) -> None:
    rest, flux, columns = spectra_of("e+a", survey, model)
    assert (depth_at(rest, flux, 4102.9, 8, 50) > 0.2).all()
    assert (depth_at(rest, flux, 6564.6, 8, 50)[columns["z"] < 0.36] > 0.1).all()
    assert (depth_at(rest, flux, 3728.5, 5, 12) > -0.15).all()
    assert set(columns["subclass"]) == {""}


def test_cosmic_rays_stand_high_and_narrow(
    batch: tuple[Spectra, Columns], model: np.ndarray, hosts: np.ndarray
) -> None:
    columns = batch[1]
    for row in np.flatnonzero(columns["anomaly"] == "cosmic-ray"):
        change, level = model[row] - hosts[row], np.median(hosts[row])
        assert change.max() > 20 * level
        assert 1 <= (change > 0.01 * level).sum() <= 3
        assert batch[0].ivar[row, change.argmax()] > 0  # never under a mask


def test_arm_steps_are_large(survey: SimulatedSurvey, model: np.ndarray, hosts: np.ndarray) -> None:
    columns = survey.catalog(0, 2048)
    for row in np.flatnonzero(columns["anomaly"] == "arm-step"):
        ratio = model[row] / hosts[row]
        steps = np.unique(np.round(ratio, 3))
        assert 1.35 < steps.max() / steps.min() < 1.9


def test_featureless_blue_has_no_feature(survey: SimulatedSurvey, model: np.ndarray) -> None:
    _, flux, columns = spectra_of("featureless-blue", survey, model)
    # The Milky Way's dust bends the law a little; no line or break may remain.
    for one in np.log(flux.astype(np.float64)):
        x = np.log(WAVE)
        assert np.abs(one - np.polyval(np.polyfit(x, one, 4), x)).max() < 0.01
        assert np.polyfit(x, one, 1)[0] < -1.7
    assert set(columns["class"]) == {"GALAXY"}


def test_extreme_lines_are_extreme(survey: SimulatedSurvey, model: np.ndarray) -> None:
    rest, flux, columns = spectra_of("extreme-lines", survey, model)
    step = rest * np.log(10) * 1e-4
    line = np.abs(rest - EMISSION["[O III] 5008"]) < 12
    beside = (np.abs(rest - 5100) < 40) & ~line
    level = (flux * beside).sum(axis=1) / beside.sum(axis=1)
    assert (((flux / level[:, None] - 1) * step * line).sum(axis=1) > 300).all()
    assert set(columns["subclass"]) == {"STARBURST"}


def test_double_peaks_are_two(survey: SimulatedSurvey, model: np.ndarray) -> None:
    rest, flux, _ = spectra_of("double-peaked", survey, model)
    velocity = (rest / EMISSION["[O III] 5008"] - 1) * 299792.458
    for v, f in zip(velocity, flux, strict=True):
        near = np.abs(v) < 700
        v, f = v[near], f[near]
        top = (f[1:-1] > f[:-2]) & (f[1:-1] > f[2:])
        peaks = v[1:-1][top & (f[1:-1] > f.min() + 0.4 * np.ptp(f))]
        assert len(peaks) == 2
        assert 250 < np.ptp(peaks) < 700


def test_outflows_absorb_blueward_of_sodium(survey: SimulatedSurvey, model: np.ndarray) -> None:
    columns = survey.catalog(0, 2048)
    for row in np.flatnonzero(columns["anomaly"] == "blueshifted-na-d"):
        low, high = columns["anomaly_wave"][row, 0]
        assert 5860 < low < high < 5902
        rest = WAVE / (1 + columns["z"][row])
        inside, beside = (rest > low) & (rest < high), np.abs(np.abs(rest - 5890) - 70) < 20
        assert model[row, inside].mean() < 0.88 * model[row, beside].mean()


def test_a_second_redshift_and_a_wrong_one_lie_in_range(survey: SimulatedSurvey, model: np.ndarray) -> None:
    for kind in ("two-galaxies", "wrong-redshift"):
        columns = survey.catalog(0, 2048)
        rows = np.flatnonzero(columns["anomaly"] == kind)
        assert (columns["z"][rows] <= 0.4).all()
        for row in rows:
            # A line that does not belong to the catalogue's redshift stands in at least one window.
            rest = WAVE / (1 + columns["z"][row])
            heights = []
            for low, high in columns["anomaly_wave"][row]:
                inside, around = (rest > low) & (rest < high), (rest > low - 60) & (rest < high + 60)
                if inside.any():
                    heights.append(model[row, inside].max() / np.median(model[row, around]))
            assert max(heights) > 1.2


def test_supernova_has_the_silicon_trough(survey: SimulatedSurvey, model: np.ndarray) -> None:
    rest, flux, _ = spectra_of("sn-ia", survey, model)
    trough = np.abs(rest - 6140) < 25
    sides = (np.abs(rest - 5980) < 20) | (np.abs(rest - 6340) < 20)
    assert ((flux * trough).sum(1) / trough.sum(1) < 0.92 * (flux * sides).sum(1) / sides.sum(1)).all()


def test_m_star_bands_stay_in_the_observed_frame(survey: SimulatedSurvey, model: np.ndarray) -> None:
    rows = np.flatnonzero(survey.catalog(0, 2048)["anomaly"] == "m-star-overlap")
    before, after = np.abs(WAVE - 7035) < 15, np.abs(WAVE - 7085) < 15
    assert (model[rows][:, after].mean(axis=1) < 0.92 * model[rows][:, before].mean(axis=1)).all()


def test_sdss_files(survey: SimulatedSurvey, batch: tuple[Spectra, Columns], tmp_path: Path) -> None:
    rows = range(505, 520)
    paths = write_sdss(survey, tmp_path, rows)
    assert len(paths) == len(rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(p.name for p in paths), "truth.ecsv"])
    truth = Table.read(tmp_path / "truth.ecsv")
    for number, (path, row) in enumerate(zip(paths, rows, strict=True)):
        plate, mjd, fiber, name = sdss_identity(row)
        assert path.name == f"spec-{plate:04d}-{mjd}-{fiber:04d}.fits"
        with fits.open(path) as file:
            head, coadd, catalog = file[0].header, file["COADD"].data, file["SPECOBJ"].data[0]
            assert head["VACUUM"] is True
            assert (head["PLATEID"], head["MJD"], head["FIBERID"]) == (plate, mjd, fiber)
            assert coadd.names == ["flux", "loglam", "ivar", "and_mask", "or_mask", "wdisp", "sky", "model"]
            assert [coadd.columns[c].format for c in coadd.names] == ["E", "E", "E", "J", "J", "E", "E", "E"]
            np.testing.assert_array_equal(coadd["flux"], batch[0].flux[row])
            np.testing.assert_array_equal(coadd["ivar"], batch[0].ivar[row])
            np.testing.assert_allclose(coadd["loglam"], np.log10(WAVE), rtol=1e-7)
            assert ((coadd["and_mask"] != 0) == (batch[0].ivar[row] == 0)).all()
            assert catalog["SPECOBJID"].strip() == name == truth["id"].astype(str)[number]
            for key, column in (("CLASS", "class"), ("SUBCLASS", "subclass"), ("ZWARNING", "zwarn")):
                assert catalog[key] == batch[1][column][row]
            assert catalog["Z"] == np.float32(batch[1]["z"][row])
            assert catalog["PLUG_RA"] == head["PLUG_RA"] == batch[1]["ra"][row]
    np.testing.assert_array_equal(truth["anomaly_wave"], batch[1]["anomaly_wave"][505:520])
    # Astropy shows an empty text of an ECSV file as a masked one.
    assert list(np.ma.filled(truth["anomaly"], "")) == list(batch[1]["anomaly"][505:520])


@pytest.mark.filterwarnings("ignore")
def test_sdss_files_open_in_specutils(survey: SimulatedSurvey, batch: tuple[Spectra, Columns], tmp_path: Path) -> None:
    specutils = pytest.importorskip("specutils")
    path = write_sdss(survey, tmp_path, range(1, 2))[0]
    spectrum = specutils.Spectrum.read(path, format="SDSS-III/IV spec")
    np.testing.assert_allclose(spectrum.spectral_axis.value, WAVE, rtol=1e-6)
    np.testing.assert_allclose(spectrum.flux.value, batch[0].flux[1], rtol=1e-6)


def test_desi_files(survey: SimulatedSurvey, tmp_path: Path) -> None:
    paths = write_desi(survey, tmp_path, range(100, 230), targets_per_file=60)
    assert [p.name for p in paths] == [f"coadd-main-dark-{i:05d}.fits" for i in range(3)]
    columns = survey.catalog(100, 230)
    with fits.open(paths[1]) as coadd, fits.open(tmp_path / "redrock-main-dark-00001.fits") as redrock:
        names = [h.name for h in coadd][1:]
        assert names == ["FIBERMAP"] + [f"{a}_{k}" for a in "BRZ" for k in ("WAVELENGTH", "FLUX", "IVAR", "MASK")]
        fibermap, zbest = coadd["FIBERMAP"].data, redrock["REDSHIFTS"].data
        here = slice(60, 120)
        assert fibermap.columns["TARGETID"].format == "K"
        np.testing.assert_array_equal(fibermap["TARGETID"], columns["id"][here])
        np.testing.assert_array_equal(zbest["TARGETID"], columns["id"][here])
        np.testing.assert_array_equal(zbest["Z"], columns["z"][here])
        np.testing.assert_array_equal(zbest["SPECTYPE"], columns["class"][here])
        assert set(fibermap["OBJTYPE"]) == {"TGT"}
        np.testing.assert_array_equal(fibermap["EBV"], columns["ebv"][here])
        assert ((fibermap["COADD_FIBERSTATUS"] != 0) == (columns["status"][here] != 0)).all()
        for arm, grid in DESI_ARMS.items():
            spectra = survey.on(grid).rows(160, 220)[0]
            np.testing.assert_array_equal(coadd[f"{arm}_FLUX"].data, spectra.flux)
            np.testing.assert_array_equal(coadd[f"{arm}_IVAR"].data, spectra.ivar)
            np.testing.assert_allclose(coadd[f"{arm}_WAVELENGTH"].data, grid.wave)
            assert ((coadd[f"{arm}_MASK"].data != 0) == (spectra.ivar == 0)).all()
            good = spectra.good
            pull = (spectra.flux - survey.on(grid).model(160, 220)) * np.sqrt(spectra.ivar)
            assert np.mean(pull[good] ** 2) == pytest.approx(1.0, abs=0.02)
    truth = Table.read(tmp_path / "truth.ecsv")
    np.testing.assert_array_equal(truth["id"], columns["id"])


def test_writers_refuse_what_cannot_be_written(survey: SimulatedSurvey, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="consecutive"):
        write_desi(survey, tmp_path, range(0, 100, 2))
    with pytest.raises(SourceError, match="sampled"):
        write_sdss(survey.on(DESI_ARMS["B"]), tmp_path)
    with pytest.raises(SourceError, match="fewer rows"):
        sdss_identity(20_000_000)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_file_leaves_nothing(
    survey: SimulatedSurvey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_desi(survey, tmp_path, range(10))
    assert not list(tmp_path.iterdir())
