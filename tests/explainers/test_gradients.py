"""Gradient methods have known answers on linear scores, and integrated ones are complete."""

from typing import Any

import numpy as np
import pytest

from distspec.config import ExpectedGradients, Gradient, GradientInput, IntegratedGradients
from distspec.errors import ConfigError
from distspec.explainers.gradients import GradientExplainer
from distspec.models.checkpoint import Checkpoint
from distspec.spectra import Spectra
from tests.support.asked import Asked, all_good, linear, of_model

pytestmark = pytest.mark.numeric

ALL = [
    Gradient(),
    GradientInput(),
    IntegratedGradients(),
    IntegratedGradients(baseline="reconstruction"),
    ExpectedGradients(baselines=3),
]


def near(spectra: Spectra, count: int) -> list[Spectra]:
    return [all_good(spectra)[[1, 5, 9]]] * count


@pytest.mark.parametrize("settings", ALL, ids=lambda one: f"{one.kind}-{getattr(one, 'baseline', '')}")
def test_of_a_linear_score_every_weight_is_known(spectra: Spectra, rng: np.random.Generator, settings: Any) -> None:
    slopes, some = rng.normal(size=300), all_good(spectra)[:4]
    scores = linear(slopes)
    scores._reconstruct = lambda s: np.full_like(s.flux, 0.5)
    found = GradientExplainer(settings, some.grid).explain(scores, some, near(spectra, 4))
    expected = {
        "gradient-": slopes * np.ones_like(some.flux),
        "gradient_input-": slopes * some.flux,
        "integrated_gradients-zero": slopes * some.flux,
        "integrated_gradients-reconstruction": slopes * (some.flux - 0.5),
        "expected_gradients-": slopes * (some.flux - all_good(spectra).flux[[1, 5, 9]].mean(axis=0)),
    }[f"{settings.kind}-{getattr(settings, 'baseline', '')}"]
    np.testing.assert_allclose(found.weights[:, 0], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["mse", "chi2", "relative_filtered", "mse_trimmed"])
def test_integrated_gradients_add_up_to_the_score(spectra: Spectra, checkpoint: Checkpoint, name: str) -> None:
    scores, some = of_model(checkpoint, name), spectra[:3]
    for settings in (IntegratedGradients(steps=200), IntegratedGradients(steps=200, baseline="reconstruction")):
        found = GradientExplainer(settings, some.grid).explain(scores, some)
        flux = np.zeros_like(some.flux) if settings.baseline == "zero" else scores.reconstruct(some)
        change = scores(some)[:, 0] - scores(Spectra(some.rows, flux, some.ivar, some.grid))[:, 0]
        # A trimmed score jumps where other pixels are left out, which no gradient sees.
        tolerance = 1e-2 if name != "mse_trimmed" else 0.2
        np.testing.assert_allclose(found.weights[:, 0].sum(axis=1), change, rtol=tolerance)
        np.testing.assert_allclose(
            found.more["missing"][:, 0], found.weights[:, 0].sum(axis=1) - change, atol=2e-3 * np.abs(change).max()
        )


def test_expected_gradients_are_the_mean_over_baselines(spectra: Spectra, checkpoint: Checkpoint) -> None:
    scores, some, others = of_model(checkpoint, "mse"), all_good(spectra)[[7]], all_good(spectra)[[1, 5, 9]]
    together = GradientExplainer(ExpectedGradients(baselines=3), some.grid).explain(scores, some, [others])
    each = [
        GradientExplainer(ExpectedGradients(baselines=1), some.grid).explain(scores, some, [others[[j]]]).weights
        for j in range(3)
    ]
    np.testing.assert_allclose(together.weights, np.mean(each, axis=0), rtol=1e-4, atol=1e-6)


def test_from_itself_nothing_is_odd(spectra: Spectra) -> None:
    some = all_good(spectra)[[7]]
    scores = linear(np.arange(300.0))
    found = GradientExplainer(ExpectedGradients(baselines=2), some.grid).explain(scores, some, [some[[0, 0]]])
    assert (found.weights == 0).all()


@pytest.mark.parametrize("settings", ALL, ids=lambda one: f"{one.kind}-{getattr(one, 'baseline', '')}")
def test_masked_pixels_have_no_weight_and_no_influence(spectra: Spectra, checkpoint: Checkpoint, settings: Any) -> None:
    scores, some = of_model(checkpoint, "mse", "chi2"), spectra[:3]
    first = GradientExplainer(settings, some.grid).explain(scores, some, near(spectra, 3))
    assert (first.weights.transpose(0, 2, 1)[~some.good] == 0).all()
    assert np.isfinite(first.weights).all()
    assert np.abs(first.weights).max(axis=2).min() > 0
    other = Spectra(some.rows, np.where(some.good, some.flux, np.float32(np.nan)), some.ivar, some.grid)
    again = GradientExplainer(settings, some.grid).explain(scores, other, near(spectra, 3))
    assert again.weights.tobytes() == first.weights.tobytes()


def test_a_score_without_a_gradient_is_refused(spectra: Spectra, checkpoint: Checkpoint) -> None:
    class Blind(Asked):
        def gradient_of(self, name: str, spectra: Spectra) -> Any:
            raise ConfigError(f"score {name!r} has no gradient")

    with pytest.raises(ConfigError, match="score0"):
        GradientExplainer(Gradient(), spectra.grid).explain(Blind(lambda s: s.flux[:, 0]), spectra[:2])
