"""The network is the published one, a masked pixel does not exist for it, and without hidden layers it is PCA."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from torch import Tensor, nn

from distspec.config import Dense, Score, Train
from distspec.detectors.neural.reconstruction import SCORES
from distspec.detectors.neural.scores import ModelScores
from distspec.models.autoencoders.dense import DenseAutoencoder, TwoStage, masked_chi2
from distspec.models.checkpoint import Checkpoint
from distspec.models.training.feed import Feed
from distspec.spectra import Spectra, WaveGrid
from distspec.store import SpectraStore

pytestmark = pytest.mark.numeric


def grid_of(pixels: int) -> WaveGrid:
    return WaveGrid("linear", 4000.0, 1.0, pixels)


@pytest.fixture
def model() -> DenseAutoencoder:
    torch.manual_seed(1)
    model = DenseAutoencoder(Dense(hidden=(20, 12), latents=3), grid_of(50))
    model.mean += torch.linspace(0.5, 1.5, 50)
    model.scale *= torch.linspace(0.8, 2.0, 50)
    return model.eval()


def layers(model: DenseAutoencoder) -> list[tuple[int, int]]:
    return [
        (layer.in_features, layer.out_features)
        for layer in (*model.encoder, *model.decoder)
        if isinstance(layer, nn.Linear)
    ]


# --- architecture ----------------------------------------------------------------------------------------------------


def test_the_published_network_has_its_number_of_parameters() -> None:
    model = DenseAutoencoder(Dense(hidden=(800, 590), latents=10), grid_of(1000))
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_559_590
    widths = [1000, 800, 590, 10, 590, 800, 1000]
    assert layers(model) == list(itertools.pairwise(widths))


def test_the_default_network_is_the_published_one() -> None:
    assert layers(DenseAutoencoder(Dense(), grid_of(1000))) == layers(
        DenseAutoencoder(Dense(hidden=(800, 590), latents=10), grid_of(1000))
    )


@settings(deadline=None)
@given(hidden=st.lists(st.integers(1, 9), max_size=3), latents=st.integers(1, 5), pixels=st.integers(1, 30))
def test_the_decoder_mirrors_the_encoder(hidden: list[int], latents: int, pixels: int) -> None:
    model = DenseAutoencoder(Dense(hidden=tuple(hidden), latents=latents), grid_of(pixels))
    widths = [pixels, *hidden, latents]
    assert layers(model) == list(itertools.pairwise(widths + widths[-2::-1]))
    flux, latent = model(torch.ones(2, pixels), torch.ones(2, pixels))
    assert flux.shape == (2, pixels)
    assert latent.shape == (2, latents)


@pytest.mark.parametrize(("name", "kind"), [("relu", nn.ReLU), ("leaky_relu", nn.LeakyReLU)])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_activation_and_dropout_follow_hidden_layers_alone(name: Any, kind: type, dropout: float) -> None:
    model = DenseAutoencoder(Dense(hidden=(8, 6), latents=2, activation=name, dropout=dropout), grid_of(10))
    between = [kind, nn.Dropout] if dropout else [kind]
    expected = [nn.Linear, *between, nn.Linear, *between, nn.Linear]
    for stack in (model.encoder, model.decoder):
        assert [type(layer) for layer in stack] == expected


def test_latents_and_output_take_either_sign(model: DenseAutoencoder, batch: tuple[Tensor, Tensor]) -> None:
    # ReLU on the last layers would forbid one of them, LeakyReLU would break the law of the last linear layer.
    flux, latents = model(*batch)
    assert (latents < 0).any()
    assert (latents > 0).any()
    last = model.decoder[-1]
    hidden = model.decoder[:-1](latents)
    expected = (hidden @ last.weight.T + last.bias) * model.scale + model.mean
    torch.testing.assert_close(flux, expected)
    model.mean -= 100
    assert (model.decode(latents) < 0).all()


def test_without_hidden_layers_the_model_is_affine() -> None:
    model = DenseAutoencoder(Dense(hidden=(), latents=2), grid_of(10))
    first, second = torch.randn(2, 1, 10)
    ones = torch.ones(1, 10)
    middle = model((first + second) / 2, ones)[0]
    torch.testing.assert_close(middle, (model(first, ones)[0] + model(second, ones)[0]) / 2)


def test_the_statistics_travel_with_the_weights_and_are_not_trained(model: DenseAutoencoder) -> None:
    assert {"mean", "scale"} <= model.state_dict().keys()
    assert {"mean", "scale"}.isdisjoint(dict(model.named_parameters()))


def test_a_model_of_centred_spectra_gives_back_the_mean() -> None:
    model = DenseAutoencoder(Dense(hidden=(5,), latents=2), grid_of(10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.mean += torch.arange(10.0)
    model.scale *= 7
    assert (model(torch.randn(3, 10), torch.ones(3, 10))[0] == torch.arange(10.0)).all()


def test_scaled_statistics_scale_the_reconstruction(model: DenseAutoencoder, batch: tuple[Tensor, Tensor]) -> None:
    flux, ivar = batch
    before, latents = model(flux, ivar)
    model.mean *= 4
    model.scale *= 4
    after, same = model(4 * flux, ivar)
    torch.testing.assert_close(same, latents)
    torch.testing.assert_close(after, 4 * before)


def test_the_model_runs_on_the_device(model: DenseAutoencoder, batch: tuple[Tensor, Tensor], device: str) -> None:
    expected = model(*batch)
    found = model.to(device)(*(values.to(device) for values in batch))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)


# --- masked pixels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30, 0.0])
def test_a_masked_pixel_has_no_influence(model: DenseAutoencoder, batch: tuple[Tensor, Tensor], garbage: float) -> None:
    flux, ivar = batch
    other = torch.where(ivar > 0, flux, garbage)
    for one, two in zip(model(flux, ivar), model(other, ivar), strict=True):
        assert torch.isfinite(two).all()
        assert torch.equal(one, two)


def test_a_masked_pixel_enters_as_the_mean(model: DenseAutoencoder, batch: tuple[Tensor, Tensor]) -> None:
    flux, ivar = batch
    filled = torch.where(ivar > 0, flux, model.mean)
    assert torch.equal(model.encode(flux, ivar), model.encode(filled, torch.ones_like(ivar)))
    # A good pixel does count.
    assert not torch.equal(model.encode(flux, ivar), model.encode(flux, torch.ones_like(ivar)))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_masked_pixels_change_no_gradient(
    model: DenseAutoencoder, batch: tuple[Tensor, Tensor], garbage: float
) -> None:
    def gradients(flux: Tensor, ivar: Tensor) -> list[Tensor]:
        model.zero_grad()
        masked_chi2(flux, ivar, model(flux, ivar)[0])[0].backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    flux, ivar = batch
    for one, two in zip(gradients(flux, ivar), gradients(torch.where(ivar > 0, flux, garbage), ivar), strict=True):
        assert torch.isfinite(two).all()
        assert torch.equal(one, two)


def test_a_gradient_reaches_every_parameter(model: DenseAutoencoder, batch: tuple[Tensor, Tensor]) -> None:
    chi2, pixels = masked_chi2(*batch[:2], model(*batch)[0])
    (chi2 / pixels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


# --- chi-squared -----------------------------------------------------------------------------------------------------


def test_chi2_has_the_known_answer() -> None:
    flux = torch.tensor([[1.0, 2.0, float("nan")], [0.0, -1.0, 3.0]])
    ivar = torch.tensor([[4.0, 0.25, 0.0], [1.0, 0.0, 9.0]])
    reconstruction = torch.tensor([[2.0, 0.0, 5.0], [0.5, 8.0, 2.0]])
    chi2, pixels = masked_chi2(flux, ivar, reconstruction)
    assert chi2.item() == 4 * 1 + 0.25 * 4 + 0.25 + 9
    assert pixels.item() == 4


@settings(deadline=None)
@given(cut=st.integers(0, 16))
def test_chi2_adds_up_over_batches(cut: int) -> None:
    generator = torch.Generator().manual_seed(5)
    flux, ivar, reconstruction = torch.rand(3, 16, 50, generator=generator, dtype=torch.float64)
    ivar[ivar < 0.1] = 0
    whole = masked_chi2(flux, ivar, reconstruction)
    parts = [masked_chi2(flux[s], ivar[s], reconstruction[s]) for s in (slice(0, cut), slice(cut, None))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], rtol=1e-12, atol=0)
    assert parts[0][1] + parts[1][1] == whole[1]


def test_chi2_of_masked_spectra_is_zero() -> None:
    chi2, pixels = masked_chi2(torch.full((2, 5), torch.nan), torch.zeros(2, 5), torch.ones(2, 5))
    assert chi2.item() == 0
    assert pixels.item() == 0


# --- a linear model is PCA -------------------------------------------------------------------------------------------


def linear_survey(rng: np.random.Generator, count: int, pixels: int, noise: np.ndarray) -> np.ndarray:
    """Spectra from a linear model of three components of unequal strength, with noise of the given σ per pixel."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(pixels, 3)))[0] * [5.0, 3.0, 2.0]
    smooth = 1 + 0.5 * np.sin(np.linspace(0, 3, pixels))
    return smooth + noise * (rng.normal(size=(count, 3)) @ basis.T + rng.normal(size=(count, pixels)))


def principal(flux: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, three principal directions and the singular values of all."""
    mean = flux.mean(axis=0)
    _, values, directions = np.linalg.svd(flux - mean, full_matrices=False)
    return mean, directions[:3], values


def fit(model: DenseAutoencoder, flux: Tensor, ivar: Tensor, steps: int) -> float:
    """Minimise chi-squared over the whole sample at once; give it."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=steps, history_size=20, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        chi2, pixels = masked_chi2(flux, ivar, model(flux, ivar)[0])
        loss = chi2 / pixels
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float(masked_chi2(flux, ivar, model(flux, ivar)[0])[0])


def test_a_linear_autoencoder_agrees_with_pca(rng: np.random.Generator) -> None:
    pixels = 30
    flux = linear_survey(rng, 300, pixels, np.full(pixels, 0.2))
    mean, directions, values = principal(flux)
    torch.manual_seed(0)
    model = DenseAutoencoder(Dense(hidden=(), latents=3), grid_of(pixels)).double()
    # A mean that is a little off: the biases have to learn the rest.
    model.mean += torch.from_numpy(mean) + 0.05
    data = torch.from_numpy(flux)
    chi2 = fit(model, data, torch.ones_like(data), 400)
    assert chi2 == pytest.approx((values[3:] ** 2).sum(), rel=1e-6)
    decoder = model.decoder[0].weight.detach().numpy()
    assert subspace_angles(decoder, directions.T).max() < 1e-3
    with torch.no_grad():
        found = model(data, torch.ones_like(data))[0].numpy()
    expected = (flux - mean) @ directions.T @ directions + mean
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.std(flux - mean))


def test_chi2_of_a_trained_linear_model_is_one_per_degree_of_freedom(rng: np.random.Generator) -> None:
    count, pixels, rank = 400, 40, 3
    sigma = np.linspace(0.05, 0.4, pixels)
    flux = linear_survey(rng, count, pixels, sigma)
    torch.manual_seed(0)
    model = DenseAutoencoder(Dense(hidden=(), latents=rank), grid_of(pixels)).double()
    model.mean += torch.from_numpy(flux.mean(axis=0))
    model.scale *= torch.from_numpy(sigma)
    data = torch.from_numpy(flux)
    ivar = torch.from_numpy(np.broadcast_to(sigma**-2, flux.shape).copy())
    chi2 = fit(model, data, ivar, 300)
    # The residuals of a fit of this rank and a mean span so many dimensions.
    freedom = (count - 1 - rank) * (pixels - rank)
    assert chi2 / freedom == pytest.approx(1, abs=4 * np.sqrt(2 / freedom))


def test_chi2_of_unseen_spectra_with_a_good_fit_is_near_one(rng: np.random.Generator, device: str) -> None:
    # The best linear model, put into the network by hand, scores spectra of the same population.
    grid = WaveGrid.between("log", 4000.0, 7000.0, 200)
    sigma = np.linspace(0.01, 0.05, 200)
    mean, directions, _ = principal(linear_survey(rng, 3000, 200, sigma) / sigma)
    architecture = Dense(hidden=(), latents=3)
    model = DenseAutoencoder(architecture, grid_of(200))
    model.scale *= torch.from_numpy(sigma)
    model.mean += torch.from_numpy(mean * sigma)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.encoder[0].weight += torch.from_numpy(directions)
        model.decoder[0].weight += torch.from_numpy(directions.T)
    flux = linear_survey(rng, 500, 200, sigma)
    ivar = np.broadcast_to(sigma**-2, flux.shape).astype(np.float32)
    spectra = Spectra(np.arange(500), flux.astype(np.float32), ivar, grid)
    scores = ModelScores(Checkpoint(model.eval(), architecture, grid, "recipe"), Score(), device)
    chi2 = scores(spectra)[0][:, SCORES.index("chi2")] * 200 / (200 - 3)
    assert chi2.mean() == pytest.approx(1, abs=0.02)
    assert chi2.std() == pytest.approx(np.sqrt(2 / 197), rel=0.2)
    # Errors said to be half as large make chi-squared four times as large.
    doubted = Spectra(spectra.rows, spectra.flux, 4 * ivar, grid)
    assert (scores(doubted)[0][:, 8] * 200 / 197).mean() == pytest.approx(4, abs=0.08)


def test_training_batches_bring_the_loss_down(store: SpectraStore) -> None:
    train = Train(model=Dense(hidden=(16,), latents=3), batch=8, validation=0.25)
    feed = Feed(store.path, train, seed=1)
    torch.manual_seed(0)
    model = DenseAutoencoder(train.model, store.grid)
    model.settle(feed.mean())

    @torch.no_grad()
    def loss() -> float:
        pairs = [masked_chi2(*batch[:2], model(*batch)[0]) for batch in feed.validation_batches()]
        return float(sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs))

    before = loss()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(30):
        for flux, ivar, _ in feed.batches(epoch):
            optimizer.zero_grad()
            chi2, pixels = masked_chi2(flux, ivar, model(flux, ivar)[0])
            (chi2 / pixels).backward()
            optimizer.step()
    assert loss() < 0.5 * before


# --- two stages ------------------------------------------------------------------------------------------------------


def test_the_second_network_takes_what_the_first_filled_in_for_data(model: DenseAutoencoder) -> None:
    torch.manual_seed(2)
    second = DenseAutoencoder(Dense(hidden=(20, 12), latents=3), grid_of(50)).eval()
    both = TwoStage(model, second).eval()
    flux, ivar = torch.rand(6, 50) + 0.5, torch.full((6, 50), 100.0)
    ivar[:, 10:20] = 0
    with torch.no_grad():
        cleaned = model(flux, ivar)[0]
        expected = second(cleaned, torch.ones_like(cleaned))
        found = both(flux, ivar, None)
        # The second would see nothing of the gap if it were still masked.
        blind = second(cleaned, ivar)
    torch.testing.assert_close(found[1], expected[1])
    assert not torch.allclose(found[1], blind[1], atol=1e-4)
