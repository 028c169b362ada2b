"""The loss is that of the paper, term by term; scores and validation losses do not depend on chance."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distspec.config import Variational
from distspec.models.autoencoders.dense import Batch
from distspec.models.autoencoders.variational import VariationalAutoencoder, kl_divergence, mean_discrepancy
from distspec.spectra import WaveGrid

pytestmark = pytest.mark.numeric

GRID = WaveGrid("linear", 4000.0, 50.0, 50)


def make(**settings: Any) -> VariationalAutoencoder:
    torch.manual_seed(1)
    model = VariationalAutoencoder(Variational(**{"hidden": (20, 12), "latents": 3, **settings}), GRID)
    model.settle(torch.linspace(0.5, 1.5, 50))
    return model.eval()


# --- architecture ----------------------------------------------------------------------------------------------------


def test_the_published_network_has_its_number_of_parameters() -> None:
    model = VariationalAutoencoder(Variational(), WaveGrid("linear", 3600.0, 1.0, 3773))
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_020_693
    widths = [(layer.in_features, layer.out_features) for layer in model.decoder if isinstance(layer, nn.Linear)]
    assert widths == [(12, 64), (64, 128), (128, 256), (256, 3773)]
    assert isinstance(model.decoder[-1], nn.Linear)


@pytest.mark.parametrize("hidden", [(), (5,), (9, 7)])
def test_the_decoder_mirrors_the_encoder(hidden: tuple[int, ...], batch: tuple[Tensor, Tensor]) -> None:
    flux, latents = make(hidden=hidden)(*batch)
    assert flux.shape == (16, 50)
    assert latents.shape == (16, 3)


def test_the_model_can_be_described_without_memory() -> None:
    with torch.device("meta"):
        state = VariationalAutoencoder(Variational(), GRID).state_dict()
    assert state["mean"].device.type == "meta"


# --- the terms of the loss -------------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_a_plain_loop(rng: np.random.Generator) -> None:
    mean, log_variance = rng.normal(size=(2, 7, 4))
    terms = [
        -0.5 * (1 + log_variance[i, j] - mean[i, j] ** 2 - np.exp(log_variance[i, j]))
        for i in range(7)
        for j in range(4)
    ]
    found = kl_divergence(torch.from_numpy(mean), torch.from_numpy(log_variance))
    assert found.item() == pytest.approx(np.mean(terms), rel=1e-12)
    assert kl_divergence(torch.zeros(3, 4), torch.zeros(3, 4)).item() == 0


def test_the_discrepancy_is_that_of_a_plain_loop(rng: np.random.Generator) -> None:
    prior, sample = rng.normal(size=(9, 4)), 0.5 + 2 * rng.normal(size=(6, 4))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[np.exp(-np.mean((x - y) ** 2) / 4) for y in b] for x in a]))

    expected = kernel(prior, prior) + kernel(sample, sample) - 2 * kernel(prior, sample)
    found = mean_discrepancy(torch.from_numpy(prior), torch.from_numpy(sample))
    assert found.item() == pytest.approx(expected, rel=1e-10)
    far = mean_discrepancy(torch.from_numpy(prior + 1e4).float(), torch.from_numpy(sample + 1e4).float())
    assert far.item() == pytest.approx(expected, abs=1e-3)


def test_equal_samples_have_no_discrepancy() -> None:
    sample = torch.randn(20, 3)
    assert mean_discrepancy(sample, sample).item() == pytest.approx(0, abs=1e-6)


def reconstruction_term(model: VariationalAutoencoder, batch: tuple[Tensor, Tensor], kind: str) -> Tensor:
    """The first term by itself, with the noise that the loss draws in evaluation."""
    flux, ivar = batch
    mean, log_variance = model.posterior(flux, ivar)
    noise, prior = model._normal(mean)
    sample = mean + torch.exp(0.5 * log_variance) * noise
    good = (ivar > 0).float()
    weight = good * (ivar if kind == "chi2" else 1)
    each = ((flux - model.decode(sample)).square() * weight).sum(dim=1) / good.sum(dim=1)
    alpha, lam = model.settings.alpha, model.settings.lam
    total = model.settings.reconstruction * each.mean() + (1 - alpha) * kl_divergence(mean, log_variance)
    return total + (alpha + lam - 1) * mean_discrepancy(prior, sample)


@pytest.mark.parametrize("kind", ["mse", "chi2"])
@pytest.mark.parametrize(("alpha", "lam"), [(0.0, 8.6), (0.0, 1.0), (1.0, 1.0), (0.25, 3.0)])
def test_the_loss_is_the_weighted_sum(kind: Any, alpha: float, lam: float, batch: tuple[Tensor, Tensor]) -> None:
    model = make(alpha=alpha, lam=lam, reconstruction=50.0)
    total, count = model.loss(Batch(*batch), kind=kind)
    assert count == 16
    torch.testing.assert_close(total / count, reconstruction_term(model, batch, kind))


def test_lambda_of_one_drops_the_discrepancy(batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError("not to be computed")

    monkeypatch.setattr("distspec.models.autoencoders.variational.mean_discrepancy", refuse)
    make(lam=1.0).loss(Batch(*batch))
    with pytest.raises(AssertionError):
        make(lam=2.0).loss(Batch(*batch))


def test_gradients_are_finite_and_reach_every_weight(batch: tuple[Tensor, Tensor]) -> None:
    model = make().train()
    total, _ = model.loss(Batch(*batch))
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("log_variance", [-1e4, 90.0, 1e4])
def test_an_extreme_variance_neither_overflows_nor_stops_learning(
    log_variance: float, batch: tuple[Tensor, Tensor]
) -> None:
    model = make(reconstruction=1e-20).train()
    with torch.no_grad():
        model.head_log_variance.bias.fill_(log_variance)
    total, _ = model.loss(Batch(*batch), kind="mse")
    total.backward()
    gradient = model.head_log_variance.bias.grad
    assert torch.isfinite(total)
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    # Downhill is towards an ordinary variance.
    assert (gradient.sign() == (1 if log_variance > 0 else -1)).all()


# --- chance ----------------------------------------------------------------------------------------------------------


def test_scores_and_validation_losses_are_deterministic(batch: tuple[Tensor, Tensor]) -> None:
    model = make()
    before = [*model(*batch), *model.loss(Batch(*batch))]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    after = [*model(*batch), *model.loss(Batch(*batch))]
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one, two)
    mean, _ = model.posterior(*batch)
    assert torch.equal(model.encode(*batch), mean)
    assert torch.equal(model.decode(mean), before[0])


def test_training_samples_from_the_global_generator(batch: tuple[Tensor, Tensor]) -> None:
    model = make().train()
    totals = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        totals.append(model.loss(Batch(*batch))[0].item())
    assert totals[0] == totals[1] != totals[2]
    assert torch.equal(model(*batch)[0], model.eval()(*batch)[0])


# --- masked pixels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30, 0.0])
def test_a_masked_pixel_has_no_influence(garbage: float, batch: tuple[Tensor, Tensor]) -> None:
    flux, ivar = batch
    model = make()
    found = []
    for values in (flux, torch.where(ivar > 0, flux, garbage)):
        model.zero_grad()
        totals = [model.loss(Batch(values, ivar), kind=kind)[0] for kind in ("mse", "chi2")]
        sum(totals).backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found.append([*model(values, ivar), *totals, gradients])
    for one, two in zip(*found, strict=True):
        assert torch.isfinite(two).all()
        assert torch.equal(one, two)


def test_a_masked_pixel_enters_as_the_mean_spectrum(batch: tuple[Tensor, Tensor]) -> None:
    flux, ivar = batch
    model = make()
    filled = torch.where(ivar > 0, flux, model.mean)
    assert torch.equal(model.encode(flux, ivar), model.encode(filled, torch.ones_like(ivar)))
    dead = model.loss(Batch(torch.full_like(flux, torch.nan), torch.zeros_like(ivar)))[0]
    assert torch.isfinite(dead)


def test_the_network_learns_a_few_smooth_spectra() -> None:
    phase = torch.linspace(0, 3, 50)
    flux = torch.sin(phase + torch.arange(6.0)[:, None])
    ivar = torch.full_like(flux, 100.0)
    ivar[:, 20] = 0
    model = make(reconstruction=5000.0).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        total, count = model.loss(Batch(flux, ivar), kind="mse")
        (total / count).backward()
        optimizer.step()
    model.eval()
    assert (model(flux, ivar)[0] - flux).square().mean().sqrt() < 0.1


def test_the_model_runs_in_16_bits(batch: tuple[Tensor, Tensor], device: str) -> None:
    flux, ivar = (values.to(device) for values in batch)
    model = make().to(device)
    expected = model(flux, ivar)[0]
    with torch.autocast(device, dtype=torch.bfloat16):
        found = model(flux, ivar)
        total, _ = model.loss(Batch(flux, ivar))
        total.backward()
    assert found[0].dtype == found[1].dtype == total.dtype == torch.float32
    torch.testing.assert_close(found[0], expected, rtol=0.05, atol=0.02)
