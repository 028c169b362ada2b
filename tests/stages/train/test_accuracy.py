"""The table of errors against a plain computation."""

import numpy as np
import torch

from distspec import models
from distspec.config import Convolutional, Experiment
from distspec.models.training.feed import Feed
from distspec.models.training.group import ALONE
from distspec.pipeline import Products
from distspec.stages.train.accuracy import as_text, measure
from distspec.statistics.summaries import TABLE_ROWS


def test_the_table_is_what_numpy_says(whole: tuple[Experiment, Products]) -> None:
    experiment, made = whole
    table = made.checkpoint.facts["accuracy"]
    rows = np.flatnonzero(Feed(made.store.path, experiment.train, experiment.seed).validation)
    assert table["spectra"] == len(rows)
    spectra = made.store.take(rows)
    good = spectra.ivar > 0
    flux = np.where(good, spectra.flux, 0.0)
    with torch.no_grad():
        model = made.checkpoint.model(torch.from_numpy(flux.astype(np.float32)), torch.from_numpy(spectra.ivar))[0]
    residual = [row[mask].astype(float) for row, mask in zip(spectra.flux - model.numpy(), good, strict=True)]
    mse = np.array([np.mean(row**2) for row in residual])
    errors = {"mse": mse, "rmse": np.sqrt(mse), "difference": np.array([row.mean() for row in residual])}
    quartiles = {"25 %": 25, "50 %": 50, "75 %": 75}
    of = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}
    of |= {name: lambda e, q=q: np.percentile(e, q) for name, q in quartiles.items()}
    assert table["statistics"].keys() == of.keys()
    for name, function in of.items():
        for key, values in errors.items():
            np.testing.assert_allclose(table["statistics"][name][key], function(values), rtol=1e-4, atol=1e-7)
    mean = flux.sum(axis=0) / np.maximum(good.sum(axis=0), 1)
    total = (np.where(good, spectra.flux - mean, 0.0).astype(float) ** 2).sum()
    np.testing.assert_allclose(table["r2"], 1 - sum((row**2).sum() for row in residual) / total, rtol=1e-4)
    order = np.argsort(made.store.column("snr", rows), kind="stable")
    for part, chosen in zip(table["snr_bins"], np.array_split(order, 3), strict=True):
        assert part["spectra"] == len(chosen)
        np.testing.assert_allclose(part["rmse"], np.sqrt(mse[chosen]).mean(), rtol=1e-4)


def test_errors_of_a_convolutional_model_are_those_of_scaled_flux(whole: tuple[Experiment, Products]) -> None:
    experiment, made = whole
    torch.manual_seed(1)
    model = models.build(Convolutional(channels=(4, 2)), made.store.grid).eval()
    feed = Feed(made.store.path, experiment.train, experiment.seed)
    found = measure(model, (feed,), ALONE)
    spectra = made.store.take(np.flatnonzero(feed.validation))
    flux = np.where(spectra.good, spectra.flux, 0.0).astype(np.float32)
    with torch.no_grad():
        left = flux - model(torch.from_numpy(flux), torch.from_numpy(spectra.ivar))[0].numpy()
    largest = flux.max(axis=1)
    assert largest.min() > 1.1
    expected = [((one[good] / top) ** 2).mean() for one, good, top in zip(left, spectra.good, largest, strict=True)]
    np.testing.assert_allclose(found.mse, expected, rtol=1e-4)
    assert found.unit == "flux scaled to [0, 1]"


def test_as_text_it_has_a_line_for_each_statistic_and_third(whole: tuple[Experiment, Products]) -> None:
    table = whole[1].checkpoint.facts["accuracy"]
    lines = as_text(table).splitlines()
    assert lines[0].startswith(f"errors of {table['spectra']} validation spectra")
    assert f"R² {table['r2']:.4f}" in lines[0]
    assert [line.split("  ")[0] for line in lines[2:9]] == list(TABLE_ROWS)
    assert sum(line.startswith("S/N") for line in lines) == 3
    assert as_text({"spectra": 0}) == "no spectrum was kept for validation"
