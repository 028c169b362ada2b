"""The probabilistic autoencoder on a simulated survey: how well it fits and inpaints, and how steady its ranks are.

Run by hand: `python tests/bench/pae_survey.py --keep /tmp/pae`; README.md here says what is measured.
"""

import argparse
import json
import shutil
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from distspec.config import Experiment, load
from distspec.models.autoencoders.dense import TwoStage
from distspec.models.checkpoint import Checkpoint
from distspec.models.training.feed import Feed
from distspec.pipeline import Products, run
from distspec.prepare.recipe import Recipe
from distspec.results.scores import score_names
from distspec.results.truth import has_truth
from distspec.sources.simulation.survey import SimulatedSurvey
from distspec.spectra import Spectra

Values = np.ndarray[Any, Any]

HOLES = ((20, 3), (40, 2))
"""Width in pixels and number of the regions that are masked in each spectrum, to be inpainted."""


def main() -> None:
    """Train with each seed on one store, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spectra", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--keep", help="folder for store and models; none removes them")
    parser.add_argument("--json")
    parser.add_argument("overrides", nargs="*", help="settings such as train.epochs=40")
    options = parser.parse_args()
    folder = Path(options.keep or tempfile.mkdtemp(prefix="distspec-bench-"))
    try:
        found = measure(options, folder)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


def settings(options: argparse.Namespace, folder: Path, seed: int) -> Experiment:
    """Give the experiment of one seed; the survey and the validation set are the same for all."""
    given = [
        "name='pae-survey'",
        f"output={folder / f'seed-{seed}'}",
        "seed=7",
        f"ingest.store={folder / 'store.zarr'}",
        "ingest.source.kind=simulate",
        f"ingest.source.spectra={options.spectra}",
        "ingest.prepare.dust.kind=column",
        "ingest.prepare.dust.scale=1.0",
        "train.model.hidden=[256, 128]",
        "train.second.epochs=20",
        "train.density.kind=sliced",
        f"train.seed={seed}",
        f"tracking.uri=sqlite:///{folder.resolve()}/mlflow.db",
    ]
    return load(None, [*given, *options.overrides])


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the stages and compare with the truth, and the seeds with each other."""
    folder.mkdir(parents=True, exist_ok=True)
    runs: dict[int, Products] = {}
    found: dict[str, Any] = {"spectra": options.spectra, "seeds": {}}
    for seed in options.seeds:
        experiment = settings(options, folder, seed)
        Path(experiment.output).mkdir(parents=True, exist_ok=True)
        begun = time.perf_counter()
        for stage in ("ingest", "train", "score"):
            runs[seed] = run(experiment, stage)
        seconds = time.perf_counter() - begun
        assert runs[seed].checkpoint is not None
        found["seeds"][seed] = describe(experiment, runs[seed], runs[seed].checkpoint) | {"seconds": round(seconds)}
    found["spearman"] = agreement(runs)
    return found


def describe(experiment: Experiment, made: Products, checkpoint: Checkpoint) -> dict[str, Any]:
    """Measure one model on its validation spectra."""
    phases = checkpoint.facts["phases"]
    feed = Feed(made.store.path, experiment.train, experiment.seed)
    rows = np.flatnonzero(feed.validation)
    told: dict[str, Any] = {"validation_spectra": len(rows)}
    told["chi2_per_pixel"] = min(epoch["validation_loss"] for epoch in phases["first"])
    normal = made.store.column("anomaly", rows) == "" if has_truth(made.store) else np.ones(len(rows), bool)
    assert made.scores is not None
    told["chi2_of_normal_spectra_median"] = float(np.median(made.scores.read("chi2")[rows[normal]]))
    mse = min(epoch["validation_loss"] for epoch in phases["second"])
    with torch.inference_mode():
        signal = np.mean([float(batch[0].square().mean()) for batch in feed.validation_batches()])
    told |= {"second_mse": mse, "second_mse_of_signal": mse / float(signal)}
    told["density"] = {
        "layers": len(phases["density"]),
        "classes": len(checkpoint.density.names) if checkpoint.density is not None else 0,
        "validation_log_prob": max(layer["validation_log_prob"] for layer in phases["density"]),
    }
    return told | {"inpainting": inpainting(experiment, made, checkpoint, rows[normal][:2_000])}


def inpainting(experiment: Experiment, made: Products, checkpoint: Checkpoint, rows: Values) -> dict[str, float]:
    """Mask regions of normal spectra and compare what the model puts there with the truth without noise."""
    spectra, truth = made.store.take(rows), noiseless(experiment, made, rows)
    rng = np.random.default_rng(0)
    pixels = spectra.grid.pixels
    hole = np.zeros((len(rows), pixels), bool)
    for width, count in HOLES:
        for start in rng.integers(pixels // 20, pixels - pixels // 20 - width, (count, len(rows))):
            hole[np.arange(len(rows))[:, None], start[:, None] + np.arange(width)] = True
    ivar = np.where(hole, np.float32(0), spectra.ivar)
    judged = hole & spectra.good & np.isfinite(truth)
    flux, weights = torch.from_numpy(np.where(ivar > 0, spectra.flux, 0).astype(np.float32)), torch.from_numpy(ivar)
    assert isinstance(checkpoint.model, TwoStage)
    with torch.inference_mode():
        first = checkpoint.model.first(flux, weights)[0].numpy()
        second = checkpoint.model(flux, weights)[0].numpy()
    place = np.arange(pixels)
    linear = np.stack([np.interp(place, place[w > 0], f[w > 0]) for f, w in zip(spectra.flux, ivar, strict=True)])

    def rms(guess: Values) -> float:
        return float(np.sqrt(np.mean((guess - truth)[judged] ** 2)))

    return {
        "pixels": int(judged.sum()),
        "interpolation_rms": rms(linear),
        "first_rms": rms(first),
        "second_rms": rms(second),
    }


def noiseless(experiment: Experiment, made: Products, rows: Values) -> Values:
    """Prepare the survey's spectra without noise as the store's were, in the same unit."""
    survey = SimulatedSurvey(experiment.ingest.source, experiment.seed)  # type: ignore[arg-type]
    recipe = Recipe(experiment.ingest.prepare, survey.grid)
    truth = np.full((len(rows), made.store.grid.pixels), np.nan, np.float32)
    norm = made.store.column("norm", rows)
    for place, row in enumerate(rows.tolist()):
        columns = survey.catalog(row, row + 1)
        flux = survey.model(row, row + 1)
        one = Spectra(np.array([row]), flux, np.full_like(flux, 1e12), survey.grid)
        prepared, told = recipe(one, columns)
        truth[place] = prepared.flux[0] * told["norm"][0] / norm[place]
    return truth


def agreement(runs: dict[int, Products]) -> dict[str, dict[str, float]]:
    """Give Spearman's correlation of each score's ranks between every two seeds, over all and in the upper tenth."""
    found: dict[str, dict[str, float]] = {}
    for one, two in combinations(runs, 2):
        first, second = runs[one].scores, runs[two].scores
        assert first is not None and second is not None
        for name in score_names(first):
            a, b = first.read(name), second.read(name)
            known = np.isfinite(a) & np.isfinite(b)
            a, b = a[known], b[known]
            upper = a >= np.quantile(a, 0.9)
            size = max(1, len(a) // 100)
            shared = np.intersect1d(np.argsort(a)[-size:], np.argsort(b)[-size:]).size / size
            found[f"{name} {one}-{two}"] = {
                "all": float(spearmanr(a, b).statistic),
                "upper tenth": float(spearmanr(a[upper], b[upper]).statistic),
                "top 1 % shared": float(shared),
            }
    return found


if __name__ == "__main__":
    main()
