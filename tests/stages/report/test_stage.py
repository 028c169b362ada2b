"""The report: what it says adds up, ids keep their digits, and nothing from a file can act in the page."""

import csv
import html
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distspec import explainers
from distspec.config import Dense, Experiment, load
from distspec.detectors.neural.reconstruction import SCORES
from distspec.errors import CheckpointError, ConfigError, LayoutError, ShardError, StoreError
from distspec.explainers.baselines import Baselines
from distspec.models.autoencoders.dense import DenseAutoencoder
from distspec.models.checkpoint import Checkpoint
from distspec.results.ascents import Ascents
from distspec.results.layout import (
    explain_layer,
    model_folder,
    recipe_digest,
    report_path,
    score_layer,
    store_path,
    table_path,
)
from distspec.spectra import Spectra, Status, WaveGrid
from distspec.spectra.lines.changes import changes
from distspec.stages.explain.selection import SelectedRows
from distspec.stages.explain.stage import ExplainWorker
from distspec.stages.order import STAGES
from distspec.stages.report.stage import report
from distspec.stages.score.workers import Scorer
from distspec.stages.stage import Job, Products
from distspec.store import Layer, SpectraStore, StoreSpec, field_of
from tests.support.processes import finished

HOSTILE = "<script>alert(1)</script>"
ROWS = 600
SHARD = 251
GRID = WaveGrid.between("log", 4000.0, 7000.0, 300)
FIRST_ID = 39_627_733_513_440_257  # no float64 holds it
SKY_ID = -(2**62) - 5
Made = tuple[Experiment, SpectraStore, Checkpoint, Layer, dict[str, Layer]]


def _spectra(rng: np.random.Generator) -> tuple[Spectra, dict[str, np.ndarray]]:
    """Smooth continua with Hβ and Hα; some with a bright line at 5500-5520 Å; some set aside."""
    slope = rng.normal(0.0, 0.5, (ROWS, 1))
    flux = (GRID.wave / 5500.0) ** slope
    for center in (4862.7, 6564.6):
        flux += rng.uniform(0.2, 1.0, (ROWS, 1)) * np.exp(-0.5 * ((GRID.wave - center) / 15.0) ** 2)
    kind = np.full(ROWS, "", dtype="U16")
    kind[5::60] = "extreme-lines"
    kind[9::60] = "e+a"
    window = (GRID.wave > 5495.0) & (GRID.wave < 5525.0)
    flux += 3.0 * ((kind == "extreme-lines")[:, None] & window)
    ivar = np.full(flux.shape, 400.0)
    ivar[:, 100:103] = 0.0
    ivar[7, 40:200] = 0.0
    flux += rng.normal(0.0, 0.05, flux.shape)
    flux[ivar == 0] = np.nan
    status = np.zeros(ROWS, np.int32)
    status[3] = Status.UNREADABLE
    status[9:19] = Status.LOW_SNR | Status.REDSHIFT_WARNING
    status[250] = Status.DEAD
    windows = np.full((ROWS, 4, 2), np.nan, np.float32)
    windows[kind == "extreme-lines", 0] = (5495.0, 5525.0)
    windows[kind == "e+a", 1] = (4830.0, 4900.0)
    columns: dict[str, np.ndarray] = {
        # Row 250 is a sky fibre of DESI, whose ids are negative.
        "id": np.where(np.arange(ROWS) == 250, SKY_ID, np.arange(ROWS, dtype=np.int64) + FIRST_ID),
        "ra": rng.uniform(0.0, 360.0, ROWS),
        "dec": rng.uniform(-30.0, 60.0, ROWS),
        "z": np.full(ROWS, 0.1),
        "zwarn": np.zeros(ROWS, np.int64),
        "class": np.full(ROWS, "GALAXY"),
        "subclass": np.where(kind != "", HOSTILE, "</td>"),
        "ebv": np.zeros(ROWS, np.float32),
        "status": status,
        "snr": rng.uniform(5.0, 30.0, ROWS).astype(np.float32),
        "total_snr": rng.uniform(50.0, 300.0, ROWS).astype(np.float32),
        "coverage": (ivar > 0).mean(axis=1).astype(np.float32),
        "norm": np.ones(ROWS, np.float32),
        "file": np.array([f"spec-{row // 2:04d}{HOSTILE}.fits" for row in range(ROWS)]),
        "note": np.where(status == Status.UNREADABLE, f"no FITS file {HOSTILE}", ""),
        "anomaly": kind,
        "anomaly_wave": windows,
    }
    rows = np.arange(ROWS, dtype=np.int64)
    return Spectra(rows, flux.astype(np.float32), ivar.astype(np.float32), GRID), columns


def _make(folder: Path, frame: str, truth: bool = True, overrides: tuple[str, ...] = (), usable: bool = True) -> Made:
    """Make store, model, scores and explanations as the stages do, in this process."""
    experiment = load(
        None,
        [
            "name=survey",
            f'output="{folder}"',
            f"ingest.prepare.frame={frame}",
            "ingest.source.kind=simulate",
            "explain.methods=[{kind='lime', samples=300, segments={kind='uniform', count=60}}]",
            "explain.fraction=0.03",
            "report.spectra=3",
            "report.table=10",
            'tracking.uri="postgresql://me:secret@host/db"',
            *overrides,
        ],
    )
    spectra, columns = _spectra(np.random.default_rng(7))
    if not usable:
        columns["status"][:] = Status.DEAD
    if not truth:
        del columns["anomaly"], columns["anomaly_wave"]
    elif frame == "observed":
        columns["anomaly_wave"] = columns["anomaly_wave"] / np.float32(1.1)
    recipe = recipe_digest(experiment)
    store = SpectraStore.create(
        store_path(experiment),
        StoreSpec(
            grid=GRID,
            frame=frame,
            rows=ROWS,
            shard_rows=SHARD,
            chunk_rows=50,
            columns={name: field_of(values) for name, values in columns.items()},
            digest="0123456789ab",
            recipe=recipe,
            settings={},
        ),
    )
    for shard in range(store.shards):
        part = slice(*store.base.bounds(shard))
        store.write(shard, spectra[part], {name: values[part] for name, values in columns.items()})
    checkpoint = _untrained(spectra[columns["status"] == 0], recipe)
    model_at = model_folder(experiment, store.digest)
    checkpoint = checkpoint.save(model_at)
    fields = {"latents": ("f4", (2,))} | dict.fromkeys(SCORES, ("f4", ()))
    scores = store.create_layer(score_layer(experiment, checkpoint.sha256), fields, {"model": checkpoint.sha256})
    scorer = Scorer(store.path, str(model_at), scores.name, experiment.score, "cpu")
    for shard in range(store.shards):
        scorer(shard)
    explanations = {"lime": _explain(experiment, store, scores, str(model_at), 12)} if usable else {}
    return experiment, store, checkpoint, scores, explanations


def _untrained(spectra: Spectra, recipe: str) -> Checkpoint:
    """Make a model that knows the mean spectrum and nothing else."""
    settings = Dense(hidden=(8,), latents=2)
    model = DenseAutoencoder(settings, GRID)
    # Latents reach nothing: every reconstruction is the mean, whatever the random weights.
    torch.nn.init.zeros_(model.decoder[-1].weight)
    torch.nn.init.zeros_(model.decoder[-1].bias)
    good = spectra.good
    count = np.maximum(good.sum(axis=0), 1)
    model.mean += torch.from_numpy((np.where(good, spectra.flux, 0.0).sum(axis=0) / count).astype(np.float32))
    epochs = [{"train_loss": 9.0 / n, "validation_loss": 10.0 / n, "learning_rate": 1e-3 / n} for n in range(1, 6)]
    return Checkpoint(model.eval(), settings, GRID, recipe, {"phases": {"first": epochs}})


def _explain(experiment: Experiment, store: SpectraStore, scores: Layer, model_at: str, count: int) -> Layer:
    values = scores.read("mse")
    rows = np.argsort(np.where(np.isnan(values), -np.inf, values), kind="stable")[::-1][:count].astype(np.int64)
    (method,) = experiment.explain.methods
    explainer = explainers.build(method, GRID, experiment.seed, rest=True)
    layer = store.create_layer(
        explain_layer(experiment, method, [scores]),
        {"row": ("i8", ()), "rank": ("i8", (1,)), "reason": ("string", ())} | explainer.fields(1),
        {"segment_of": explainer.segment_of.tolist(), "names": ["mse"], "method": "lime"},
        rows=count,
        shard_rows=5,
    )
    ordinary = Baselines.of(store, rows, experiment.seed, (method,))
    worker = ExplainWorker(store.path, model_at, {layer.name: method}, ordinary, experiment)
    for shard in range(layer.shards):
        part = slice(*layer.bounds(shard))
        worker((layer.name, shard, SelectedRows(rows[part], np.arange(count)[part, None])))
    return layer


def page_of(
    experiment: Experiment, store: SpectraStore, checkpoint: Checkpoint, scores: Layer, explanations: dict[str, Layer]
) -> Path:
    """Write the page of these products."""
    return report(Job(experiment, Products(store, checkpoint, scores, explanations=explanations), STAGES))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = _make(tmp_path_factory.mktemp("rest"), "rest")
    page_of(*made)
    return made


@pytest.fixture(scope="module")
def page(made: Made) -> str:
    return report_path(made[0]).read_text("utf-8")


@pytest.fixture(scope="module")
def text(page: str) -> str:
    """What a reader sees: no code, no tags, single spaces."""
    seen = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", seen)).split())  # split() takes no-break spaces too


@pytest.fixture(scope="module")
def table(made: Made) -> list[dict[str, str]]:
    with open(table_path(made[0]), encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_counts_add_up(text: str) -> None:
    assert "600 spectra in the store = 588 scored + 12 set aside" in text
    assert "the redshift pipeline raised a warning 10" in text
    assert "no pixel has a positive, finite inverse variance 1" in text
    assert "the file could not be read 1" in text
    assert "all that are set aside 12" in text


def test_files_are_counted_across_shards(text: str) -> None:
    # Rows 10-17 are four whole files. Rows 250 and 251 are one file in two shards, scored in the second only.
    assert "300 blocks: 296 with at least one scored spectrum, 4 wholly set aside." in text


def test_unreadable_files_are_named_with_their_note(text: str) -> None:
    assert f"spec-0001{HOSTILE}.fits the file could not be read no FITS file {HOSTILE}" in text


def test_ids_keep_every_digit_in_a_browser(made: Made, table: list[dict[str, str]]) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium to open the page with")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    address = report_path(made[0]).as_uri()
    shown = finished([browser, *words, address]).stdout
    assert "bk-" in shown, "the page's scripts did not run"
    seen = " ".join(re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", " ", shown, flags=re.DOTALL).split())
    for row in table[:10]:
        assert row["id"] in seen
    assert str(SKY_ID) in seen


def test_ids_keep_every_digit(made: Made, page: str, text: str, table: list[dict[str, str]]) -> None:
    rows = [int(row["row"]) for row in table]
    assert [row["id"] for row in table] == [str(FIRST_ID + row) for row in rows]
    assert any(int(row["id"]) % 8 for row in table)
    for row in table[:10]:
        assert row["id"] in text
    scripts = "".join(re.findall(r"<script\b.*?</script>", page, flags=re.DOTALL))
    assert str(FIRST_ID)[:12] not in scripts


def test_text_from_files_is_inert(page: str) -> None:
    assert HOSTILE not in page
    assert "alert(1)" not in "".join(re.findall(r"<script\b.*?</script>", page, flags=re.DOTALL))
    assert html.escape(HOSTILE) in page


def test_the_page_loads_nothing(page: str) -> None:
    body = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"<(link|img|iframe|script|object|embed)\b", body)
    assert not re.search(r"""<script[^>]*\bsrc=|@import|url\(""", body + "".join(re.findall(r"<script[^>]*>", page)))
    assert "default-src 'none'" in body
    assert len(page) < 6_000_000


def test_the_tracking_address_is_left_out(page: str) -> None:
    assert "secret" not in page
    assert "[explain]" in page


def test_the_table_is_ranked_and_complete(made: Made, table: list[dict[str, str]]) -> None:
    _, store, _, scores, explanations = made
    values = scores.read("mse")
    best = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[: len(table)]
    assert len(table) == explanations["lime"].rows == 12
    assert [int(row["row"]) for row in table] == best.tolist()
    assert [int(row["rank"]) for row in table] == list(range(1, 13))
    for name in SCORES:
        taken = scores.take(name, best)
        np.testing.assert_array_equal(np.array([row[name] for row in table], dtype=np.float32), taken)
    np.testing.assert_array_equal([float(row["ra"]) for row in table], store.column("ra", best))
    planted = [row for row in table if row["planted"] == "extreme-lines"]
    assert len(planted) == 10
    for row in planted:
        assert float(row["heaviest_from"]) < 5525.0
        assert float(row["heaviest_to"]) > 5495.0
        assert 0.0 < float(row["r2"]) <= 1.0


def test_coverage_is_reported(text: str) -> None:
    assert "Good pixels 99.0 %" in text


def test_the_truth_is_told(text: str) -> None:
    # 12 spectra are 2 % of 588: they hold all ten of the strong kind, and the score barely sees the other.
    assert "top 2 % of each score (12 spectra)" in text
    assert "extreme-lines strong 10/10" in text
    assert "e+a 0/9 0/9" in text
    assert "1 planted spectrum was set aside" in text
    assert re.search(r"Do explanations point at the right wavelengths\?.* lime mse 10/10 10/10 1\.7 %", text)
    assert re.search(r"lime of mse, kind by kind .* extreme-lines 10/10 10/10 1\.7 %", text)


def test_every_section_and_figure_is_there(page: str) -> None:
    targets = re.findall(r'<a href="#([a-z0-9-]+)"', page)
    assert {"run", "counts", "training", "scores", "truth", "anomalies", "table", "settings"} <= set(targets)
    for target in targets:
        assert f'id="{target}"' in page
    assert page.count("data-root-id") == 1 + len(SCORES) + 3


def test_nothing_else_is_left_in_the_folder(made: Made) -> None:
    left = {path.name for path in Path(made[0].output).iterdir()}
    assert left == {"store.zarr", "models", "report.html", "anomalies.csv"}


@pytest.mark.slow
def test_an_observed_frame_moves_windows_and_lines(tmp_path: Path) -> None:
    made = _make(tmp_path, "observed")
    page = page_of(*made).read_text("utf-8")
    assert "Observed wavelength in vacuum" in page
    assert re.search(r"extreme-lines</th><td[^>]*>10/10</td><td[^>]*>10/10", page)


@pytest.mark.slow
def test_a_real_survey_has_no_truth_section(tmp_path: Path) -> None:
    source = ("ingest.source.kind=sdss", f'ingest.source.path="{tmp_path}"', "ingest.prepare.dust.kind=none")
    made = _make(tmp_path, "rest", truth=False, overrides=source)
    page = page_of(*made).read_text("utf-8")
    assert 'id="truth"' not in page
    assert "300 files: 296 with" in " ".join(page.split())
    assert "skyserver.sdss.org" in page


def test_a_survey_without_a_usable_spectrum_still_gets_its_page(tmp_path: Path) -> None:
    made = _make(tmp_path, "rest", usable=False)
    page = page_of(*made).read_text("utf-8")
    assert "No spectrum was scored." in page
    assert "… and 500 more." in page
    assert len(table_path(made[0]).read_text("utf-8").splitlines()) == 1


@pytest.mark.slow
def test_without_an_explanation_the_card_says_so(made: Made, tmp_path: Path) -> None:
    experiment, store, checkpoint, scores, _ = made
    moved = experiment.model_copy(update={"output": str(tmp_path)})
    page = page_of(moved, store, checkpoint, scores, {}).read_text("utf-8")
    assert page.count("This spectrum was not explained") == 3


@pytest.mark.slow
def test_another_score_falls_back_on_the_explanation_there_is(made: Made, tmp_path: Path) -> None:
    experiment, store, checkpoint, scores, explanations = made
    settings = experiment.report.model_copy(update={"score": "chi2"})
    moved = experiment.model_copy(update={"output": str(tmp_path), "report": settings})
    page = page_of(moved, store, checkpoint, scores, explanations).read_text("utf-8")
    assert "<b>lime</b>, of the score mse: the heaviest region" in page
    assert "Top anomalies by chi2" in page


@pytest.mark.slow
def test_a_list_of_spectra_is_shown_in_the_place_of_the_top(made: Made, tmp_path: Path) -> None:
    experiment, store, checkpoint, scores, explanations = made
    layer = explanations["lime"]
    listed = store.create_layer("explain-lime-list", layer.fields, layer.attributes, rows=2, shard_rows=2)
    fields = {name: layer.read(name)[[5, 2]] for name in layer.fields}
    listed.write(0, fields)
    changes = {"ids": "mine.txt", "ascent": None}
    settings = experiment.explain.model_copy(update=changes)
    moved = experiment.model_copy(update={"output": str(tmp_path), "explain": settings})
    page = page_of(moved, store, checkpoint, scores, {"lime": listed}).read_text("utf-8")
    assert "Spectra of a list, by mse" in page
    assert re.findall(r'<span class="rank">#(\d+)</span>', page) == ["3", "6"]
    with open(table_path(moved), encoding="utf-8", newline="") as stream:
        assert [int(line["row"]) for line in csv.DictReader(stream)] == fields["row"][::-1].tolist()


def test_an_unknown_score_is_refused_by_name(made: Made) -> None:
    experiment = made[0]
    wrong = experiment.model_copy(update={"report": experiment.report.model_copy(update={"score": "entropy"})})
    with pytest.raises(ConfigError, match=r"'entropy'; there are mse, .*chi2"):
        page_of(wrong, *made[1:])


def test_another_models_scores_are_refused(made: Made) -> None:
    experiment, store, checkpoint, scores, explanations = made
    with pytest.raises(CheckpointError, match="was not made by model"):
        page_of(experiment, store, replace(checkpoint, sha256="f" * 64), scores, explanations)


@pytest.mark.slow
def test_a_failed_write_leaves_the_old_page(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    before = report_path(made[0]).read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(StoreError, match="No space left"):
        page_of(*made)
    assert report_path(made[0]).read_bytes() == before
    assert not list(Path(made[0].output).glob(".*partial"))


def test_a_row_that_is_neither_scored_nor_set_aside_is_refused(made: Made) -> None:
    experiment, store, checkpoint, scores, explanations = made
    lost = store.create_layer("score-lost", scores.fields, scores.attributes)
    for shard in range(scores.shards):
        values = dict(zip(scores.fields, scores.read_shard(shard, *scores.fields), strict=True))
        if shard == 1:
            values["chi2"] = np.where(np.arange(len(values["chi2"])) == 4, np.float32(np.nan), values["chi2"])
        lost.write(shard, values)
    with pytest.raises(ShardError, match=r"row 255 .* is not set aside but has no score chi2") as caught:
        page_of(experiment, store, checkpoint, lost, explanations)
    assert caught.value.rows == (251, 502)


def test_an_explanation_of_another_grid_is_refused(made: Made) -> None:
    experiment, store, checkpoint, scores, explanations = made
    layer = Layer(explanations["lime"]._group, explanations["lime"].name)
    layer.attributes["segment_of"] = [0, 1, 2]
    with pytest.raises(LayoutError, match="3 pixels; the store keeps 300"):
        page_of(experiment, store, checkpoint, scores, {"lime": layer})


# --- a model with all there is ---------------------------------------------------------------------------------------


def _seen(page: str) -> str:
    seen = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", seen)).split())


@pytest.fixture(scope="module")
def told(whole: tuple[Experiment, Products]) -> str:
    return _seen(whole[1].report.read_text("utf-8"))


def test_a_card_tells_its_way_to_higher_probability(whole: tuple[Experiment, Products], told: str) -> None:
    experiment, made = whole
    page = made.report.read_text("utf-8")
    ways = Ascents(made.ascents)
    scores = made.scores.read("density")
    best = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")[: experiment.report.spectra]
    for row in best.tolist():
        way = ways.find(row)
        assert way.steps > 0
        start, end = (f"{value:.4g}".replace("-", "−") for value in way.log_prob)
        assert f"log p rises from {start} to {end} nats in {way.steps} step" in told
        for name, _ in way.classes:
            assert name in told
        strongest = changes(way.growth, made.store.grid)[0]
        assert strongest.label in told
    assert told.count("On the way to higher probability") == len(best)
    assert page.count("data-root-id") > 4 + 10 + 2 * len(best)
    for section in ("compare", "bias", "errors", "evaluation"):
        assert f'id="{section}"' in page
    assert told.count("The score pca is decided by") == len(best)
    # What each window size of Inverse Multiscale Occlusion says has a panel.
    assert page.count('"64 px","16 px","1 px"') == len(best)
    assert told.count("combined by the other power of the scatter over baselines") == len(best)
    assert ("where it was cut off" in told) == any(ways.find(row).unfinished for row in best.tolist())


def test_phases_have_plain_names_in_their_order(told: str) -> None:
    places = [
        told.index(f" {name} ", told.index(" Training First"))
        for name in ("First network", "Second network", "Density of the latents", "Density after relabelling")
    ]
    assert places == sorted(places)


def test_the_errors_are_tabulated_as_the_checkpoint_has_them(whole: tuple[Experiment, Products], told: str) -> None:
    facts = whole[1].checkpoint.facts["accuracy"]
    assert "MSE RMSE Mean difference" in told
    at = told.index("MSE RMSE Mean difference")
    for name in ("mean", "std", "min", "25 %", "50 %", "75 %", "max"):
        cells = [f"{facts['statistics'][name][key]:.3g}".replace("-", "−") for key in ("mse", "rmse", "difference")]
        at = told.index(f"{name} {' '.join(cells)}", at)
    assert f"is {facts['r2']:.4g}".replace("-", "−") in told
    for part in facts["snr_bins"]:
        assert f"{part['from']:.3g} to {part['to']:.3g} {part['spectra']} {part['rmse']:.3g}" in told


def test_the_density_section_counts_classes_before_and_after(whole: tuple[Experiment, Products], told: str) -> None:
    facts = whole[1].checkpoint.facts["density"]
    assert "In the catalogue After relabelling Left it" in told
    for name, counts in facts["classes"].items():
        assert f"{name} {counts['catalogue']:,} {counts['fitted']:,} " in told
    share = facts["relabelled"]
    assert f"Relabelled {100 * share:{'.0f' if share >= 0.1 or share == 0 else '.2g'}} % of the training" in told
    assert f"4 layers of {whole[1].checkpoint.density.flow.shape['directions']} directions" in told


def test_the_table_has_the_most_probable_class(whole: tuple[Experiment, Products], told: str) -> None:
    experiment, made = whole
    with open(table_path(experiment), encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    posterior = made.scores.take("posterior", np.array([int(row["row"]) for row in rows]))
    names = made.checkpoint.density.names
    assert [row["likeliest_class"] for row in rows] == [names[number] for number in posterior.argmax(axis=1)]
    np.testing.assert_allclose([float(row["class_probability"]) for row in rows], posterior.max(axis=1), rtol=1e-5)
    assert "Likeliest class" in told
    followed = set(made.ascents.read("row").tolist())
    for row in rows:
        assert (row["steps"] != "") == (int(row["row"]) in followed)
    assert any(row["grows"] or row["fades"] for row in rows)


def test_without_a_density_there_is_neither_way_nor_section(text: str, page: str, table: list[dict[str, str]]) -> None:
    assert 'id="density"' not in page
    for words in ("higher probability", "half way", "Likeliest", "Relabelled", "How well it reconstructs"):
        assert words not in text
    assert not {"likeliest_class", "steps", "grows"} & set(table[0])
    assert "Autoencoder" in text
    assert "First network" not in text
