"""Every kind of autoencoder goes the whole way: trained, kept, loaded, scored."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distspec.config import Experiment
from distspec.errors import ConfigError
from distspec.models.checkpoint import Checkpoint
from distspec.pipeline import Products, run
from tests.support.small import small

KINDS: dict[str, dict[str, Any]] = {
    "convolutional": {"kind": "convolutional", "channels": [4, 4]},
    "variational": {"kind": "variational", "hidden": [32], "latents": 4, "reconstruction": 240.0},
    "redshifted": {"kind": "redshifted", "latents": 3, "hidden": [8], "z_max": 0.6, "rest_pixels": 200},
}


def experiment_of(kind: str, output: Path) -> Experiment:
    grid = {"scale": "log", "first": 3900.0, "last": 9000.0, "pixels": 240}
    prepare = {"frame": "observed", "grid": grid, "cuts": {"z_min": -0.01, "z_max": 0.55}}
    return small(
        output,
        ingest={"source": {"kind": "simulate", "spectra": 150, "anomalies": 0.05}, "prepare": prepare},
        train={"model": KINDS[kind], "epochs": 1, "loss": "mse" if kind == "convolutional" else "chi2"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_kept_and_scored_with(kind: str, tmp_path: Path) -> None:
    experiment = experiment_of(kind, tmp_path / "out")
    run(experiment, "ingest")
    run(experiment, "train")
    made = run(experiment, "score")
    assert made.checkpoint is not None
    assert made.scores is not None
    assert Checkpoint.load(made.checkpoint.folder).settings.kind == kind
    usable = made.store.column("status") == 0
    assert usable.sum() > 50
    for name in ("mse", "chi2"):
        assert (np.isfinite(made.scores.read(name)) == usable).all()
    table = made.checkpoint.facts["accuracy"]
    assert table["unit"] == ("flux scaled to [0, 1]" if kind == "convolutional" else "flux as prepared")
    assert table["statistics"]["min"]["mse"] <= table["statistics"]["50 %"]["mse"] <= table["statistics"]["max"]["mse"]
    assert table["spectra"] == sum(part["spectra"] for part in table["snr_bins"])


@pytest.mark.slow
def test_the_preset_cnn_stars_goes_from_lamost_files_to_its_table_of_errors(
    tmp_path: Path, real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from distspec.cli import app

    source = ["ingest.source.kind=lamost", f"ingest.source.path={real_data / 'lamost_dr1'}", f"output={tmp_path}"]
    for verb in ("ingest", "train"):
        app([verb, "cnn_stars", *source, "train.epochs=3", "runtime.workers=1"], result_action="return_value")
    told = capsys.readouterr().out
    assert "validation spectra, flux scaled to [0, 1]; R²" in told
    assert [line.split()[0] for line in told.splitlines() if line.startswith(("mean ", "std", "min", "max"))] == [
        "mean",
        "std",
        "min",
        "max",
    ]
    assert told.count("mean RMSE") == 3


def test_a_model_in_the_observed_frame_is_refused_at_rest(done: tuple[Experiment, Products]) -> None:
    experiment, made = done
    model = {"train": experiment.train.model_copy(update={"model": experiment_of("redshifted", Path("x")).train.model})}
    from distspec.stages.train.stage import train

    with pytest.raises(ConfigError, match="ingest with prepare.frame = 'observed'"):
        train(experiment.model_copy(update=model), made.store)
