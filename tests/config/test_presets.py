"""The presets state the numbers of their papers, and prepare spectra of their surveys."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits

from distspec.config import DustColumn, DustMap, Experiment, NoDust, Scale, dump, load, presets
from distspec.prepare.recipe import Recipe
from distspec.spectra import Columns, Spectra, Status, WaveGrid
from distspec.spectra.segments import uniform_segments
from distspec.stages.ingest.sample import check, compute

SDSS = WaveGrid("log", 10**3.55, 1e-4, 4801)
DESI = WaveGrid("linear", 3600.0, 0.8, 7781)
SURVEYS = {"pae": "sdss", "vae_lime": "sdss", "comparison": "sdss", "cnn_stars": "sdss", "desi": "desi"}
SURVEYS["desi_rest"] = "desi"


def given(name: str, *overrides: str) -> Experiment:
    source = [f"ingest.source.kind={SURVEYS[name]}", "ingest.source.path=somewhere"]
    return load(name, [*source, *overrides])


def simulated(grid: WaveGrid, n: int = 60) -> tuple[Spectra, Columns]:
    """Galaxies with a line, on a survey's grid, good enough for every cut; z such that each recipe sees its range."""
    rng = np.random.default_rng(5)
    z = rng.uniform(0.05, 0.14, n)
    rest = grid.wave / (1 + z[:, None])
    flux = 20 + 3 * np.sin(rest / rng.uniform(300, 900, (n, 1))) + 30 * np.exp(-0.5 * ((rest - 5008.24) / 4) ** 2)
    sigma = rng.uniform(0.3, 0.6, (n, 1)) * np.ones(grid.pixels)
    flux += sigma * rng.normal(size=flux.shape)
    ivar = sigma**-2 * (rng.random(flux.shape) > 0.01)
    columns: Columns = {
        "id": np.arange(n),
        "ra": np.full(n, 150.0),
        "dec": np.full(n, 20.0),
        "z": z,
        "zwarn": np.zeros(n, np.int64),
        "class": np.full(n, "GALAXY"),
        "subclass": np.full(n, ""),
        "ebv": np.full(n, 0.03, np.float32),
        "status": np.zeros(n, np.int32),
    }
    return Spectra(np.arange(n), flux.astype(np.float32), ivar.astype(np.float32), grid), columns


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_there_is_a_preset_for_each_paper() -> None:
    assert set(presets()) == {"demo", *SURVEYS}


@pytest.mark.parametrize("name", SURVEYS)
def test_presets_load_with_a_source_and_come_back(name: str, tmp_path: Path) -> None:
    experiment = given(name)
    assert experiment.name == name
    check(experiment.ingest.prepare)
    file = tmp_path / "again.toml"
    file.write_text(dump(experiment), "utf-8")
    assert load(str(file)) == experiment


def numbers(name: str) -> dict[str, Any]:
    prepare = given(name).ingest.prepare
    tree = prepare.model_dump(exclude_none=True)
    return {key: value for key, value in tree.items() if key not in ("flux_factor",)}


def test_pae_is_section_2_and_table_2() -> None:
    experiment = given("pae")
    prepare = experiment.ingest.prepare
    np.testing.assert_allclose(
        Recipe(prepare, SDSS).grid.wave, np.logspace(np.log10(3388), np.log10(8318), 1000), rtol=1e-12
    )
    assert (prepare.frame, prepare.rebin, prepare.max_pixel_snr, prepare.min_pixel_snr) == ("rest", "average", 50, None)
    assert numbers("pae")["normalize"] == {"kind": "distance", "redshift": 0.1}
    cuts = prepare.cuts
    assert (cuts.z_min, cuts.z_max, cuts.coverage_min, cuts.total_snr_min) == (0.05, 0.36, 0.6, 50)
    assert (cuts.classes, cuts.zwarn, prepare.sky.mode) == (("GALAXY", "QSO"), True, "none")
    assert prepare.sample.divide_by_mean
    assert not prepare.flux_factor
    model, train = experiment.train.model, experiment.train
    assert (model.hidden, model.latents, model.scale, model.dropout) == ((800, 590), 10, "unit", 0)
    assert (train.batch, train.learning_rate, train.final_learning_rate, train.validation) == (33, 7e-4, 1.3e-5, 0.4)


def test_vae_lime_is_the_public_code() -> None:
    experiment = given("vae_lime")
    prepare = experiment.ingest.prepare
    np.testing.assert_allclose(Recipe(prepare, SDSS).grid.wave, np.linspace(3500, 7500, 4000), rtol=1e-14)
    assert (prepare.rebin, prepare.min_pixel_snr, prepare.max_pixel_snr) == ("linear", 1, None)
    assert (prepare.sky.mode, prepare.sky.windows) == ("patch", ((5565, 5590),))
    assert numbers("vae_lime")["normalize"] == {"kind": "median"}
    cuts, sample = prepare.cuts, prepare.sample
    assert (cuts.z_min, cuts.z_max, cuts.snr_min, cuts.classes) == (0.01, 0.5, 4, ("GALAXY",))
    # Fewer than a tenth of 4000 missing: 399 pass, 400 do not.
    assert np.float32(3601 / 4000) >= cuts.coverage_min > np.float32(3600 / 4000)
    assert (sample.missing_max, sample.impute, sample.snr_quantile) == (0.1, True, 0.75)
    model, train = experiment.train.model, experiment.train
    assert (model.kind, model.hidden, model.latents) == ("variational", (256, 128, 64), 12)
    assert (model.reconstruction, model.alpha, model.lam) == (3776, 0, 8.606942414688938)
    assert (train.loss, train.schedule, train.plateau) == ("mse", "plateau", 5)
    assert (train.batch, train.epochs, train.patience, train.learning_rate) == (256, 120, 10, 1e-3)
    explain, score = experiment.explain, experiment.score
    (lime,) = explain.methods
    assert (lime.samples, lime.kernel_width, lime.ridge, lime.smoothing) == (5000, 0.25, 1, 3)
    assert (lime.perturbation, explain.limit) == (Scale(factor=0.9, same_noise=True), 10_000)
    assert explain.fraction * experiment.cluster.fraction == pytest.approx(0.01, rel=1e-3)
    assert (experiment.cluster.scan, experiment.cluster.normalize, experiment.cluster.signed) == ((2, 23), "l2", False)
    assert (score.filter_velocity, score.trim_percentage, score.epsilon) == (250, 97, 1e-3)
    # Segments of 25 pixels, as 150 of the 3773 pixels that the paper keeps.
    theirs, ours = uniform_segments(3773, 150), uniform_segments(4000, lime.segments.count)
    assert np.bincount(theirs)[0] == np.bincount(ours)[0] == np.bincount(ours)[-1] == 25


def test_vae_lime_takes_the_map_of_the_paper() -> None:
    assert isinstance(given("vae_lime").ingest.prepare.dust, NoDust)
    dust = given("vae_lime", "ingest.prepare.dust.kind=sfd", "ingest.prepare.dust.path=maps").ingest.prepare.dust
    assert isinstance(dust, DustMap)
    assert (dust.path, dust.scale, dust.law, dust.r_v) == ("maps", 0.86, "F99", 3.1)


def test_comparison_is_section_2() -> None:
    prepare = given("comparison").ingest.prepare
    wave = Recipe(prepare, SDSS).grid.wave
    assert (wave[0], wave[-1], prepare.rebin) == (3700, 8000, "linear")
    np.testing.assert_allclose(np.diff(wave), 1.0, rtol=1e-9)
    assert (prepare.cuts.classes, prepare.cuts.span_min, prepare.cuts.zwarn) == (("GALAXY",), 0.99, False)
    assert prepare.sample.snr_highest == 150_000
    assert (prepare.max_pixel_snr, prepare.sky.mode, prepare.normalize.kind) == (None, "none", "median")


def test_cnn_stars_is_the_data_section() -> None:
    prepare = given("cnn_stars").ingest.prepare
    np.testing.assert_array_equal(Recipe(prepare, SDSS).grid.wave, np.arange(4000.0, 7200.0, 5.0))
    assert numbers("cnn_stars")["normalize"] == {"kind": "wavelength", "wave": 5550, "width": 20}
    assert (prepare.frame, prepare.cuts.classes, prepare.cuts.zwarn) == ("observed", ("STAR",), True)
    # S/N 20 per SDSS pixel is more in 5 Å.
    native = 5550 * (10**0.5e-4 - 10**-0.5e-4)
    assert prepare.cuts.snr_min == pytest.approx(20 * np.sqrt(5 / native), rel=2e-3)


def test_desi_keeps_the_native_pixels_in_every_bit() -> None:
    prepare = given("desi").ingest.prepare
    recipe = Recipe(prepare, DESI)
    assert recipe.grid == DESI
    spectra, columns = simulated(DESI, 40)
    out, table = recipe(spectra, columns)
    flux = np.where(spectra.ivar > 0, spectra.flux, 0)
    np.testing.assert_array_equal(out.flux, (flux / table["norm"][:, None]).astype(np.float32))
    bare = given("desi", "ingest.prepare.normalize.kind=none").ingest.prepare
    out, _ = Recipe(bare, DESI)(spectra, columns)
    assert out.flux.tobytes() == flux.tobytes()
    assert out.ivar.tobytes() == spectra.ivar.tobytes()


def test_desi_rest_is_covered_by_every_redshift_that_it_takes() -> None:
    prepare = given("desi_rest", "ingest.prepare.sky.mode=none").ingest.prepare
    recipe = Recipe(prepare, DESI)
    cuts = prepare.cuts
    assert cuts.z_min is not None
    assert cuts.z_max is not None
    assert recipe.grid.edges[0] * (1 + cuts.z_min) > DESI.edges[0]
    assert recipe.grid.edges[-1] * (1 + cuts.z_max) < DESI.edges[-1]
    assert recipe.grid.step == pytest.approx(1e-4, rel=2e-4)
    assert isinstance(prepare.dust, DustColumn)
    spectra, columns = simulated(DESI, 2)
    spectra = Spectra(spectra.rows, spectra.flux, np.ones_like(spectra.flux), DESI)
    _, table = recipe(spectra, {**columns, "z": np.array([cuts.z_min, cuts.z_max])})
    assert table["coverage"].tolist() == [1, 1]


# --- spectra ----------------------------------------------------------------------------------------------------------


def part(recipe: Recipe, spectra: Spectra, columns: Columns) -> tuple[Spectra, Columns]:
    return recipe(spectra, columns)


@pytest.mark.parametrize("name", SURVEYS)
def test_presets_prepare_spectra_and_their_sample(name: str) -> None:
    prepare = given(name).ingest.prepare
    recipe = Recipe(prepare, SDSS if SURVEYS[name] == "sdss" else DESI)
    spectra, columns = simulated(recipe.source_grid)
    if name == "cnn_stars":
        columns |= {"class": np.full(len(spectra), "STAR"), "z": np.zeros(len(spectra))}
    columns["class"][0] = "SKY?"
    columns["zwarn"][1] = 4
    out, table = recipe(spectra, columns)
    zwarn = int(Status.REDSHIFT_WARNING) if prepare.cuts.zwarn else 0
    other = int(Status.CLASS) if prepare.cuts.classes else 0
    assert table["status"].tolist() == [other, zwarn] + [0] * 58
    statistics = compute([partial(part, recipe, spectra, columns)], prepare)
    final = statistics.apply(out)
    assert np.isfinite(final.flux).all()
    assert np.isfinite(final.ivar).all()
    status = statistics.status(table["snr"], table["status"], statistics.factor(out))
    assert (status == 0).sum() == {"vae_lime": 14}.get(name, (table["status"] == 0).sum())
    if name == "pae":
        np.testing.assert_allclose(final.flux[2:].mean(), 1.0, atol=0.2)
    if name == "vae_lime":
        assert (final.ivar[:, statistics.keep] > 0).all()


def read_sdss(file: Path) -> tuple[Spectra, Columns]:
    """Put one spec file on the grid, by the least that it takes; the sources do it properly."""
    with fits.open(file) as hdus, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = {name.lower(): hdus[1].data[name] for name in hdus[1].data.names}
        row = {name.lower(): hdus[2].data[name][0] for name in hdus[2].data.names}
    pixel = np.rint((table["loglam"].astype(float) - 3.55) / 1e-4).astype(int)
    flux, ivar = np.zeros((2, 1, SDSS.pixels), np.float32)
    flux[0, pixel], ivar[0, pixel] = table["flux"], table["ivar"]
    _, columns = simulated(SDSS, 1)
    kind = str(row["class"]).strip()
    columns |= {"class": np.array([kind]), "z": np.array([float(row["z"])]), "zwarn": np.array([int(row["zwarning"])])}
    return Spectra(np.arange(1), flux, ivar, SDSS), columns


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "pae" else pytest.mark.slow)
        for name in SURVEYS
        if SURVEYS[name] == "sdss"
    ],
)
def test_presets_prepare_real_spectra(name: str, real_data: Path) -> None:
    prepare = given(name).ingest.prepare
    recipe = Recipe(prepare, SDSS)
    read = [read_sdss(file) for file in sorted((real_data / "sdss").glob("spec-*.fits"))[:40]]
    columns = {key: np.concatenate([table[key] for _, table in read]) for key in read[0][1]}
    flux, ivar = (np.concatenate([getattr(spectra, key) for spectra, _ in read]) for key in ("flux", "ivar"))
    out, table = recipe(Spectra(np.arange(len(read)), flux, ivar, SDSS), columns)
    assert np.isfinite(out.flux).all()
    assert np.isfinite(out.ivar).all()
    wanted = np.isin(columns["class"], prepare.cuts.classes)
    assert (((table["status"] & Status.CLASS) != 0) == ~wanted)[(table["status"] & Status.UNREADABLE) == 0].all()
    assert (table["status"] == 0).sum() <= wanted.sum()
    if name == "pae":
        assert (table["status"] == 0).any()
