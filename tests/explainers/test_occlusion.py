"""Occlusion has known answers: Algorithm 1 word for word, linear scores, and captum on small models."""

from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation
from captum.attr import Occlusion as CaptumOcclusion
from hypothesis import given
from hypothesis import strategies as st

from distspec.config import Ablation, Imo, Occlusion
from distspec.explainers.occlusion import AblationExplainer, ImoExplainer, _sliding, chunks, combine
from distspec.models.checkpoint import Checkpoint
from distspec.spectra import Spectra, WaveGrid
from tests.support.asked import Asked, all_good, linear, of_model

pytestmark = pytest.mark.numeric

WINDOWS = (1, 4, 16, 64)


def imo(spectra: Spectra, **settings: Any) -> ImoExplainer:
    return ImoExplainer(Imo(**({"windows": WINDOWS, "baselines": 3} | settings)), spectra.grid)


def algorithm_1(score: Any, x: np.ndarray, baselines: np.ndarray, windows: tuple[int, ...]) -> Any:
    """Shen & Melchior's Algorithm 1 as written, for log p = -score."""
    log_p = lambda y: -float(score(y[None])[0])  # noqa: E731
    n, told = len(x), []
    for window in windows:
        each = np.zeros((len(baselines), n))
        for j, reconstructed in enumerate(baselines):
            p_j = log_p(reconstructed)
            for i in range(0, n, window):
                y = reconstructed.copy()
                y[i : min(i + window, n)] = x[i : min(i + window, n)]
                each[j, i : i + window] = (p_j - log_p(y)) / len(y[i : min(i + window, n)])
        told.append((each.mean(axis=0), each.var(axis=0)))
    means, variances = (np.stack(part) for part in zip(*told, strict=True))
    return means, (means / variances).sum(axis=0) / (1 / variances).sum(axis=0)


# --- Inverse Multiscale Occlusion ------------------------------------------------------------------------------------


def test_chunks_are_counted_as_the_paper_counts_them() -> None:
    counts = [int(chunks(7781, window)[-1]) + 1 for window in (1, 4, 16, 64, 256)]
    assert counts == [7781, 1946, 487, 122, 31]
    assert sum(counts) == 10_367
    shifted = chunks(100, 16, 21)
    assert np.bincount(shifted).tolist() == [5, 16, 16, 16, 16, 16, 15]
    assert np.bincount(chunks(100, 16, 32)).tolist() == np.bincount(chunks(100, 16)).tolist()


@given(pixels=st.integers(1, 400), window=st.integers(1, 500), offset=st.integers(0, 600))
def test_chunks_partition_the_pixels(pixels: int, window: int, offset: int) -> None:
    found = chunks(pixels, window, offset)
    assert found[0] == 0
    assert set(np.diff(found)) <= {0, 1}
    assert np.bincount(found).max() <= window


@pytest.mark.slow
def test_algorithm_1_word_for_word_gives_the_same(spectra: Spectra, checkpoint: Checkpoint, device: str) -> None:
    some, near = all_good(spectra)[[30]], all_good(spectra)[[1, 5, 9]]
    for name in ("chi2", "relative_trimmed"):
        scores = of_model(checkpoint, name, device=device)
        found = imo(spectra).explain(scores, some, [near])

        def plain(flux: np.ndarray, scores: Any = scores) -> np.ndarray:
            ivar = np.repeat(some.ivar, len(flux), axis=0)
            return scores(Spectra(np.zeros(len(flux), int), flux, ivar, some.grid))[:, 0]

        means, whole = algorithm_1(plain, some.flux[0], scores.ordinary(near, some), WINDOWS)
        size = np.abs(means).max()
        np.testing.assert_allclose(found.more["windows"][0, 0], means, rtol=1e-2, atol=2e-4 * size)
        np.testing.assert_allclose(found.weights[0, 0], whole, rtol=2e-2, atol=2e-4 * size)


def test_of_a_linear_score_every_number_is_known(spectra: Spectra, rng: np.random.Generator) -> None:
    slopes = rng.normal(size=300)
    some, near = all_good(spectra)[[3]], all_good(spectra)[:3]
    found = imo(spectra).explain(linear(slopes), some, [near])
    change = slopes * (some.flux.astype(np.float64) - near.flux)
    means, spreads = [], []
    for window in WINDOWS:
        cut = chunks(300, window)
        each = np.stack([np.bincount(cut, weights=row) / np.bincount(cut) for row in change])[:, cut]
        means.append(each.mean(axis=0))
        spreads.append(each.std(axis=0))
    np.testing.assert_allclose(found.more["windows"][0, 0], means, atol=2e-5)
    for name, power in (("weights", 2), ("other", 1)):
        expected = combine(np.array(means), np.array(spreads), power)
        values = found.weights if name == "weights" else found.more["other"]
        np.testing.assert_allclose(values[0, 0], expected, atol=2e-4, rtol=1e-3)
    turned = imo(spectra, weight="deviation").explain(linear(slopes), some, [near])
    np.testing.assert_array_equal(turned.weights, found.more["other"])
    np.testing.assert_array_equal(turned.more["other"], found.weights)
    # The windows of one size add up to what the whole spectrum changes.
    for level in found.more["windows"][0, 0]:
        assert level.sum() == pytest.approx(change.mean(axis=0).sum(), rel=1e-3)


def test_combination_is_the_weighted_mean() -> None:
    mean, spread = np.array([[1.0, 2.0], [3.0, 8.0]]), np.array([[1.0, 1.0], [2.0, 1.0]])
    np.testing.assert_allclose(combine(mean, spread, 2), [(1 + 3 / 4) / (1 + 1 / 4), 5.0], rtol=1e-5)
    np.testing.assert_allclose(combine(mean, spread, 1), [(1 + 3 / 2) / (1 + 1 / 2), 5.0], rtol=1e-5)
    # Where all baselines agree there is no spread, and the size that is sure decides.
    np.testing.assert_allclose(combine(mean, np.array([[0.0, 0.0], [1.0, 1.0]]), 2), [1.0, 2.0], rtol=1e-4)
    np.testing.assert_allclose(combine(mean, np.zeros((2, 2)), 2), [2.0, 5.0])
    # A size that no baseline answers to, as where a score has steps, says nothing; nor do all of them together.
    silent = np.array([[0.0, 0.0], [3.0, 0.0]]), np.array([[0.0, 0.0], [2.0, 0.0]])
    np.testing.assert_allclose(combine(*silent, 2), [3.0, 0.0])


def test_sliding_windows_wider_than_the_spectrum_are_the_spectrum() -> None:
    np.testing.assert_array_equal(_sliding(5, 9, 1), np.zeros((1, 5)))
    # Of windows of 4 every 2 pixels, those that overlap lie in different ways.
    np.testing.assert_array_equal(_sliding(7, 4, 2), [[0, 0, 0, 0, 2, 2, 2], [-1, -1, 1, 1, 1, 1, -1]])


def test_a_spectrum_that_is_its_own_baseline_is_not_odd(spectra: Spectra) -> None:
    some = all_good(spectra)[[3]]
    found = imo(spectra).explain(linear(np.arange(300.0)), some, [some[[0, 0, 0]]])
    assert (found.weights == 0).all()
    assert (found.more["windows"] == 0).all()


def test_masked_pixels_stay_the_baselines_and_have_no_weight(spectra: Spectra, checkpoint: Checkpoint) -> None:
    scores = of_model(checkpoint, "mse", "chi2")
    near = [spectra[[1, 5, 9]], spectra[[2, 6, 7]]]
    some = spectra[[20, 31]]
    first = imo(spectra).explain(scores, some, near)
    assert np.isfinite(first.weights).all()
    assert (first.weights.transpose(0, 2, 1)[~some.good] == 0).all()
    for garbage in (np.nan, np.inf, 1e30):
        other = Spectra(some.rows, np.where(some.good, some.flux, np.float32(garbage)), some.ivar, some.grid)
        again = imo(spectra).explain(scores, other, near)
        assert again.weights.tobytes() == first.weights.tobytes()
    # A chunk's length is that of its good pixels: a linear score has the same mean per pixel with a gap as without.
    ones = np.ones(300)
    gap = some.ivar.copy()
    gap[:, 100:110] = 0
    holed = Spectra(some.rows, np.full_like(some.flux, 3.0), np.where(gap > 0, 1, 0).astype(np.float32), some.grid)
    flat = Spectra(some.rows, np.ones_like(some.flux), np.ones_like(some.flux), some.grid)
    found = imo(spectra, baselines=2).explain(linear(ones), holed, [flat, flat])
    np.testing.assert_allclose(found.weights[:, 0][holed.good], 2.0, rtol=1e-4)


def test_neither_batch_nor_order_changes_a_bit(spectra: Spectra, checkpoint: Checkpoint) -> None:
    scores = of_model(checkpoint, "mse", "relative")
    near = [spectra[[1, 5, 9]]] * 4
    together = imo(spectra).explain(scores, spectra[[20, 31, 8, 2]], near)
    alone = imo(spectra).explain(scores, spectra[[8]], near[:1])
    assert alone.weights.tobytes() == together.weights[[2]].tobytes()
    turned = imo(spectra).explain(scores, spectra[[2, 8, 31, 20]], near)
    assert turned.weights[::-1].tobytes() == together.weights.tobytes()


@pytest.mark.parametrize("exact", [True, False])
def test_fast_and_general_path_agree(spectra: Spectra, checkpoint: Checkpoint, exact: bool) -> None:
    near, some = [spectra[[1, 5, 9]]], spectra[[20]]
    scores = of_model(checkpoint, "mse", "chi2", "relative_filtered", exact=exact)
    found = imo(spectra).explain(scores, some, near).more["windows"]
    plain = of_model(checkpoint, "mse", "chi2", "relative_filtered", exact=False)
    expected = imo(spectra).explain(plain, some, near).more["windows"]
    for k in range(3):
        np.testing.assert_allclose(found[0, k], expected[0, k], atol=2e-4 * np.abs(expected[0, k]).max())


# --- ablation and occlusion ------------------------------------------------------------------------------------------


def torch_score(checkpoint: Checkpoint, like: Spectra) -> Any:
    ivar = torch.from_numpy(like.ivar)

    def score(flux: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            made, _ = checkpoint.model(flux, ivar.expand_as(flux))
            return (flux - made).square().sum(dim=1).sqrt()

    return score


def test_ablation_equals_captums(spectra: Spectra, checkpoint: Checkpoint) -> None:
    some = all_good(spectra)[[4]]
    found = AblationExplainer(Ablation(), some.grid).explain(of_model(checkpoint, "mse"), some)
    theirs = FeatureAblation(torch_score(checkpoint, some)).attribute(
        torch.from_numpy(some.flux), baselines=0.0, perturbations_per_eval=50
    )
    np.testing.assert_allclose(found.weights[:, 0], theirs, atol=2e-5)


@pytest.mark.parametrize(("window", "stride"), [(16, 1), (16, 16), (7, 3), (300, 1), (4, 2)])
def test_occlusion_equals_captums(spectra: Spectra, checkpoint: Checkpoint, window: int, stride: int) -> None:
    some = all_good(spectra)[[4]]
    settings = Occlusion(window=window, stride=stride)
    found = AblationExplainer(settings, some.grid).explain(of_model(checkpoint, "mse"), some)
    theirs = CaptumOcclusion(torch_score(checkpoint, some)).attribute(
        torch.from_numpy(some.flux),
        sliding_window_shapes=(window,),
        strides=(stride,),
        baselines=0.0,
        perturbations_per_eval=50,
    )
    np.testing.assert_allclose(found.weights[:, 0], theirs, atol=2e-4)


def test_every_pixel_is_in_a_window(spectra: Spectra) -> None:
    for pixels in (5, 64, 101):
        grid = WaveGrid("linear", 4000.0, 1.0, pixels)
        flux = np.full((1, pixels), 2.0, np.float32)
        some = Spectra(np.arange(1), flux, np.ones_like(flux), grid)
        for window, stride in ((1, 1), (8, 3), (8, 8), (200, 50)):
            explainer = AblationExplainer(Occlusion(window=window, stride=stride), grid)
            weights = explainer.explain(linear(np.ones(pixels)), some).weights[0, 0]
            assert (weights > 0).all()
            assert weights.max() <= 2 * window + 1e-4


def test_against_the_reconstruction_only_what_differs_counts(spectra: Spectra) -> None:
    some = all_good(spectra)[:2]
    scores = Asked(lambda s: np.square(s.flux - 1).sum(axis=1), reconstruct=lambda s: np.ones_like(s.flux))
    found = AblationExplainer(Ablation(baseline="reconstruction"), some.grid).explain(scores, some)
    np.testing.assert_allclose(found.weights[:, 0], np.square(some.flux - 1), atol=1e-5)


def test_masked_pixels_are_not_occluded(spectra: Spectra, checkpoint: Checkpoint) -> None:
    scores = of_model(checkpoint, "mse", "chi2")
    for settings in (Ablation(), Occlusion(stride=4), Occlusion(baseline="reconstruction")):
        explainer = AblationExplainer(settings, spectra.grid)
        first = explainer.explain(scores, spectra[:3])
        other = Spectra(
            spectra.rows[:3],
            np.where(spectra.good[:3], spectra.flux[:3], np.float32(np.nan)),
            spectra.ivar[:3],
            spectra.grid,
        )
        assert explainer.explain(scores, other).weights.tobytes() == first.weights.tobytes()
        assert (first.weights.transpose(0, 2, 1)[~spectra.good[:3]] == 0).all()
