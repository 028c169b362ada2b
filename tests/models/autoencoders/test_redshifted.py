"""The network is the published one with its numbers, and a redshift moves what it knows to where it is observed."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distspec.config import Redshifted
from distspec.errors import CheckpointError, ConfigError
from distspec.models.autoencoders import redshifted_losses
from distspec.models.autoencoders.dense import Batch, Progress
from distspec.models.autoencoders.redshifted import RedshiftedAutoencoder, load_spender
from distspec.models.autoencoders.redshifted_losses import annealed, augmented, consistency, interpolated, similarity
from distspec.spectra import WaveGrid

pytestmark = pytest.mark.numeric

SDSS = WaveGrid("log", 10**3.578, 1e-4, 3921)
BOSS = WaveGrid("log", 10**3.549, 1e-4, 4686)
DESI = WaveGrid("linear", 3600.0, 0.8, 7781)
SMALL = WaveGrid("log", 4000.0, 1e-3, 120)


def make(grid: WaveGrid = SMALL, **settings: Any) -> RedshiftedAutoencoder:
    torch.manual_seed(1)
    model = RedshiftedAutoencoder(Redshifted(**{"hidden": (16, 32), "latents": 3, **settings}), grid)
    model.settle(torch.linspace(0.5, 1.5, grid.pixels))
    return model.eval()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Flux around one; every tenth pixel is masked; redshifts up to 0.4."""
    torch.manual_seed(2)
    flux = 1 + 0.3 * torch.randn(6, 120)
    ivar = torch.rand(6, 120) * 20 + 1
    ivar[torch.rand(6, 120) < 0.1] = 0
    return flux, ivar, 0.4 * torch.rand(6, dtype=torch.float64)


@pytest.fixture(scope="module")
def spender() -> ModuleType:
    """The published package, where it can be imported."""
    return pytest.importorskip("spender", exc_type=ImportError)


def published(spender: ModuleType, grid: WaveGrid, wave_rest: Tensor, **settings: Any) -> torch.nn.Module:
    """The package's own model for a grid."""
    from spender.instrument import Instrument

    instrument = type("Ours", (Instrument,), {})(torch.tensor(grid.wave))
    torch.manual_seed(4)
    model: torch.nn.Module = spender.SpectrumAutoencoder(instrument, wave_rest, **settings)
    return model.eval()


# --- architecture ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "settings", "parameters", "encoder"),
    [
        (SDSS, Redshifted(), 9_482_165, 3_159_178),
        (SDSS, Redshifted(latents=6, rest_pixels=7000), 10_630_990, 3_159_046),
        (DESI, Redshifted(latents=6, rest_pixels=9780, activation="leaky_relu"), 13_463_802, 3_159_046),
    ],
)
def test_the_published_networks_have_their_numbers_of_parameters(
    grid: WaveGrid, settings: Redshifted, parameters: int, encoder: int
) -> None:
    with torch.device("meta"):
        model = RedshiftedAutoencoder(settings, grid)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) == encoder


@pytest.mark.parametrize(("grid", "lengths"), [(SDSS, [785, 72]), (BOSS, [938, 86]), (DESI, [1557, 142])])
def test_the_encoder_pools_to_the_published_lengths(grid: WaveGrid, lengths: list[int]) -> None:
    encoder = make(grid, rest_pixels=100).encoder
    found = []
    for pool in (encoder.pool1, encoder.pool2):
        pool.register_forward_hook(lambda _, __, output: found.append(output.shape[-1]))
    with torch.no_grad():
        encoder(torch.rand(1, grid.pixels))
    assert found == lengths


def test_the_rest_frame_reaches_from_the_first_wavelength_at_z_max_to_the_last_at_rest() -> None:
    wave = make(SDSS, z_max=0.5).decoder.wave_rest
    assert len(wave) == 5881
    assert wave[0].item() == pytest.approx(SDSS.wave[0] / 1.5, rel=1e-12)
    assert wave[-1].item() == pytest.approx(SDSS.wave[-1], rel=1e-12)


def test_a_grid_too_short_for_the_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="use 56 or more"):
        make(WaveGrid("linear", 4000.0, 1.0, 55))
    flux, latents = make(WaveGrid("linear", 4000.0, 1.0, 56)).train()(
        torch.rand(2, 56), torch.ones(2, 56), torch.zeros(2)
    )
    assert torch.isfinite(latents).all()
    with pytest.raises(ConfigError, match="z_max"):
        make(z_max=-0.9)


def test_the_encoder_does_not_see_the_amplitude(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    flux = batch[0]
    model = make()
    ones = torch.ones_like(flux)
    torch.testing.assert_close(model.encode(100 * flux, ones), model.encode(10 * flux, ones), rtol=1e-3, atol=1e-4)


def test_a_missing_redshift_is_refused(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    flux, ivar, _ = batch
    model = make()
    latents = model.encode(flux, ivar)
    for call in (lambda: model(flux, ivar), lambda: model.decode(latents), lambda: model.loss(Batch(flux, ivar))):
        with pytest.raises(ValueError, match="redshift of each spectrum"):
            call()


# --- from rest to observed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [SMALL, WaveGrid("linear", 4000.0, 9.0, 120), DESI])
def test_the_model_is_interpolated_at_the_emitted_wavelengths(grid: WaveGrid) -> None:
    model = make(grid, z_max=0.4, rest_pixels=300)
    latents = torch.randn(5, 3)
    redshift = torch.tensor([0.001, 0.1, 0.25, 0.39, 0.6], dtype=torch.float64)
    with torch.no_grad():
        found, rest = model.decode(latents, redshift).numpy(), model.rest(latents).numpy()
    wave = model.decoder.wave_rest.numpy()
    for row, z in enumerate(redshift.numpy()):
        expected = np.interp(grid.wave / (1 + z), wave, rest[row], left=0, right=0)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
        inside = (grid.wave >= wave[0] * (1 + z)) & (grid.wave <= wave[-1] * (1 + z))
        assert (model.covers(redshift)[row].numpy() == inside).all()
    assert not model.covers(redshift)[4].all()


def test_wavelengths_keep_their_digits() -> None:
    # A model that is its own wavelength must give λ / (1 + z) back.
    model = make(DESI, z_max=0.8, rest_pixels=9780)
    redshift = torch.linspace(0, 0.8, 7, dtype=torch.float64)
    found, inside = interpolated(model.decoder.wave_rest.expand(7, -1), model._position(redshift))
    emitted = torch.tensor(DESI.wave) / (1 + redshift[:, None])
    assert inside.all()
    torch.testing.assert_close(found, emitted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("redshift", [0.0, 0.5])
def test_the_ends_of_the_reach_belong_to_it(redshift: float) -> None:
    assert make(SDSS, z_max=0.5).covers(torch.tensor([redshift])).all()


@pytest.mark.parametrize("redshift", [float("nan"), float("inf"), -1.0, -3.0, 30.0])
def test_a_redshift_out_of_reach_gives_no_model_and_no_weight(
    redshift: float, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    flux, ivar, _ = batch
    model = make().train()
    where = torch.full((6,), redshift)
    assert not model.covers(where).any()
    assert (model(flux, ivar, where)[0] == 0).all()
    assert model.eval().loss(Batch(flux, ivar, where))[0] == 0
    total, _ = model.train().loss(Batch(flux, ivar, where), progress=Progress(5, 20))
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_fitted_amplitude_is_that_of_least_squares(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    flux, ivar, redshift = batch
    plain, latents = make(z_max=0.1)(flux, ivar, redshift)
    fitted, same = make(z_max=0.1, fit_amplitude=True)(flux, ivar, redshift)
    assert torch.equal(latents, same)
    weight = ivar * make(z_max=0.1).covers(redshift)
    amplitude = (plain * weight * flux).sum(dim=1) / (plain * weight * plain).sum(dim=1)
    torch.testing.assert_close(fitted, plain * amplitude[:, None])
    dead = make(fit_amplitude=True)(flux, torch.zeros_like(ivar), redshift)[0]
    assert torch.isfinite(dead).all()


# --- masked pixels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("garbage", "fit_amplitude"), [(float("nan"), False), (float("nan"), True), (float("inf"), True), (-1e30, True)]
)
def test_a_masked_pixel_has_no_influence(
    garbage: float, fit_amplitude: bool, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    flux, ivar, redshift = batch
    model = make(fit_amplitude=fit_amplitude).train()
    found = []
    for values in (flux, torch.where(ivar > 0, flux, garbage)):
        model.zero_grad()
        torch.manual_seed(7)
        totals = [
            model.loss(Batch(values, ivar, redshift), kind=kind, progress=Progress(9, 40))[0]
            for kind in ("mse", "chi2")
        ]
        sum(totals).backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found.append([*model(values, ivar, redshift), *totals, gradients])
    for one, two in zip(*found, strict=True):
        assert torch.isfinite(two).all()
        assert torch.equal(one, two)


# --- losses ----------------------------------------------------------------------------------------------------------


def constant_model(grid: WaveGrid) -> RedshiftedAutoencoder:
    """A model of one everywhere: the Speculator activation of zero, plus one."""
    model = make(grid, z_max=0.5)
    with torch.no_grad():
        model.decoder.mlp[-3].weight.zero_()
        model.decoder.mlp[-3].bias.zero_()
    return model


def test_the_fidelity_of_a_perfect_model_is_half_the_share_of_good_pixels(rng: np.random.Generator) -> None:
    model = constant_model(SDSS)
    count = 24
    sigma = rng.uniform(0.05, 0.5, (count, 3921))
    flux = torch.from_numpy(1 + sigma * rng.normal(size=sigma.shape)).float()
    ivar = torch.from_numpy(sigma**-2).float()
    ivar[:, rng.random(3921) < 660 / 3921] = 0
    with torch.no_grad():
        total, spectra = model.loss(Batch(flux, ivar, torch.linspace(0, 0.5, count)))
    assert spectra == count
    valid = (ivar > 0).sum().item()
    expected = 0.5 * valid / (count * 3921)
    assert expected == pytest.approx(0.416, abs=0.01)
    # χ² of n values scatters by √(2n).
    assert (total / spectra).item() == pytest.approx(expected, rel=4 * np.sqrt(2 / valid))


def test_pixels_out_of_reach_have_no_weight() -> None:
    model = constant_model(SMALL)
    flux, ivar = torch.full((1, 120), 3.0), torch.full((1, 120), 2.0)
    redshift = torch.tensor([0.6], dtype=torch.float64)
    reached = model.covers(redshift).sum().item()
    assert 0 < reached < 120
    assert model.loss(Batch(flux, ivar, redshift))[0].item() == pytest.approx(0.5 * reached * 2 * 4 / 120)
    assert model.loss(Batch(flux, ivar, redshift), kind="mse")[0].item() == pytest.approx(0.5 * reached * 4 / 120)


def naive_similarity(latents: Tensor, rest: Tensor, wave: Tensor, k: float, amplitude: float, width: float) -> Tensor:
    """All differences between all pairs, as the public code forms them."""
    relative = rest / rest[:, (wave > 4000) & (wave < 7000)].median(dim=1).values[:, None]
    weight = amplitude * torch.exp(-((0.5 * (wave - 5000) / width) ** 2))
    of_models = (weight * (relative[None] - relative[:, None]) ** 2).sum(dim=-1) / len(wave)
    of_latents = ((latents[None] - latents[:, None]) ** 2).sum(dim=-1) / latents.shape[1]
    x = k * (of_latents - of_models)
    pairs = torch.sigmoid(x - 2.5) + torch.sigmoid(-x - 2.5)
    return pairs[~torch.eye(len(latents), dtype=torch.bool)].sum() / len(latents)


@pytest.mark.parametrize("k", [0.0, 1.0, 9.9])
@pytest.mark.parametrize("scatter", [0.01, 0.3])
def test_similarity_equals_that_of_all_pairs(k: float, scatter: float) -> None:
    torch.manual_seed(3)
    wave = torch.linspace(2523, 9333, 1500, dtype=torch.float64)
    rest = (3 + scatter * torch.randn(40, 1500)).requires_grad_()
    latents = torch.randn(40, 6).requires_grad_()
    found = similarity(latents, rest, wave, slope=k, amplitude=20, width=1000)
    exact = naive_similarity(latents.double(), rest.double(), wave, k, 20, 1000)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    for one, two in zip(
        torch.autograd.grad(found, (latents, rest)), torch.autograd.grad(exact, (latents, rest)), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5 * two.abs().max().item() + 1e-12)


def test_similarity_forms_no_cube() -> None:
    # The differences of all pairs would be 400 x 400 x 5000 numbers, 3 GB.
    torch.manual_seed(3)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            if isinstance(output, Tensor):
                largest = max(largest, output.numel())
            return output

    with Watch():
        similarity(
            torch.randn(400, 6), torch.rand(400, 5000), torch.linspace(2e3, 9e3, 5000), slope=1, amplitude=1, width=1e3
        )
    assert largest == 400 * 5000


def test_an_agreeing_pair_costs_least_and_any_disagreement_more() -> None:
    wave = torch.linspace(4000, 7000, 200, dtype=torch.float64)
    same = torch.ones(2, 200)
    latents = torch.zeros(2, 3)
    options = {"slope": 5.0, "amplitude": 20.0, "width": 1000.0}
    agreed = similarity(latents, same, wave, **options)
    assert agreed.item() == pytest.approx(2 * torch.sigmoid(torch.tensor(-2.5)).item())
    latents[1] = 2
    assert similarity(latents, same, wave, **options) > 4 * agreed
    different = same.clone()
    different[1, :40] = 4
    assert similarity(torch.zeros(2, 3), different, wave, **options) > 1.5 * agreed


def test_consistency_is_zero_for_equal_latents_and_at_most_a_half() -> None:
    latents = torch.randn(5, 3)
    assert (consistency(latents, latents, 0.01) == 0).all()
    torch.testing.assert_close(consistency(latents, latents + 100, 0.01), torch.full((5,), 0.5))
    found = consistency(torch.zeros(1, 4), torch.full((1, 4), 0.1), 0.01)
    assert found.item() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item() - 0.5)


def test_the_slope_follows_the_public_schedule() -> None:
    schedule = [annealed(epoch, 200) for epoch in range(200)]
    expected = [*np.arange(0, 10, 0.1), *np.arange(0, 9, 0.1), *[0] * 10]
    np.testing.assert_allclose(schedule, expected, atol=1e-12)
    assert annealed(0, 1) == 0
    assert annealed(38, 40) == 0 < annealed(37, 40)


def test_the_other_losses_are_for_training_alone(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    model = make()
    fidelity = model.loss(Batch(*batch), progress=Progress(9, 40))[0]
    assert torch.equal(model.loss(Batch(*batch), progress=Progress(9, 40))[0], fidelity)
    plain = make(similarity=False, consistency=False).train()
    assert torch.equal(plain.loss(Batch(*batch), progress=Progress(9, 40))[0], fidelity)
    parts = {}
    for name in ("similarity", "consistency"):
        only = make(**{"similarity": False, "consistency": False, name: True}).train()
        torch.manual_seed(5)
        parts[name] = only.loss(Batch(*batch), progress=Progress(9, 40))[0] - fidelity
        assert parts[name] > 0
    model.train()
    torch.manual_seed(5)
    whole = model.loss(Batch(*batch), progress=Progress(9, 40))
    torch.testing.assert_close(whole[0], fidelity + sum(parts.values()))
    assert whole[1] == 6


def test_gradients_reach_every_weight(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    # A bias before a normalisation has no effect, so its gradient is rounding alone: it is there, and finite.
    model = make().train()
    model.loss(Batch(*batch), progress=Progress(9, 40))[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


# --- augmentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [SMALL, WaveGrid("linear", 4000.0, 9.0, 120)])
def test_a_copy_shows_the_same_lines_at_another_redshift(grid: WaveGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    # A spectrum that is its own emitted wavelength: the copy must be too, at its new redshift.
    redshift = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)
    drawn = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    monkeypatch.setattr(redshifted_losses.torch, "rand", lambda *_, **__: drawn)
    flux = (torch.tensor(grid.wave) / (1 + redshift[:, None])).float()
    moved, ivar = augmented(flux, torch.ones_like(flux), redshift, grid, 0.5, ratio=0.0)
    emitted = torch.tensor(grid.wave) / (1 + 0.5 * drawn[:, None])
    inside = (emitted >= flux[:, :1] - 1e-3) & (emitted <= flux[:, -1:] + 1e-3)
    assert torch.equal(ivar > 0, inside)
    torch.testing.assert_close(moved.double()[inside], emitted[inside], rtol=2e-6, atol=0)
    assert (ivar[inside] == 1).all()


def test_a_copy_owes_nothing_to_masked_pixels(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    flux, ivar, redshift = batch
    copies = []
    for garbage in (0.0, float("nan"), 1e30):
        torch.manual_seed(8)
        copy, weight = augmented(torch.where(ivar > 0, flux, garbage), ivar, redshift, SMALL, 0.5)
        copies.append(torch.where(weight > 0, copy, 0.0))
        assert torch.isfinite(weight).all()
    assert torch.equal(copies[0], copies[1])
    assert torch.equal(copies[0], copies[2])


def test_a_copy_is_noisier_and_has_a_gap_of_its_own() -> None:
    torch.manual_seed(9)
    count, pixels = 400, 1000
    grid = WaveGrid("log", 4000.0, 1e-4, pixels)
    flux, ivar = torch.full((count, pixels), 5.0), torch.full((count, pixels), 4.0)
    copy, weight = augmented(flux, ivar, torch.zeros(count, dtype=torch.float64), grid, 0.0)
    noisy = copy != 5
    assert noisy.float().mean().item() == pytest.approx(0.05, abs=0.002)
    assert copy[noisy].std().item() == pytest.approx(0.2 * 5, rel=0.03)
    assert ((weight == 0).sum(dim=1) == 50).all()
    assert len((weight == 0).float().argmax(dim=1).unique()) > 200
    kept = noisy & (weight > 0)
    torch.testing.assert_close(1 / weight[kept], 1 / ivar[kept] + (copy[kept] - 5) ** 2, rtol=1e-4, atol=1e-5)
    assert (weight[~noisy & (weight > 0)] == 4).all()


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_network_learns_spectra_at_their_redshifts() -> None:
    # Two lines that trade places: a change of strength alone is what the encoder's normalisation takes away.
    def line(center: float) -> Tensor:
        return torch.exp(-0.5 * ((wave - center) / 60) ** 2)

    redshift = torch.linspace(0, 0.3, 8, dtype=torch.float64)
    wave = torch.tensor(SMALL.wave) / (1 + redshift[:, None])
    strength = torch.tensor([0.1, 0.9, 0.3, 0.7, 0.5, 0.2, 1.0, 0.0])[:, None]
    flux = (1 + strength * line(4100.0) + (1 - strength) * line(4400.0)).float()
    ivar = torch.full_like(flux, 100.0)
    model = make(z_max=0.3, latents=2)
    before = model.loss(Batch(flux, ivar, redshift))[0].item()
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-2)
    for epoch in range(30):
        optimizer.zero_grad()
        total, count = model.loss(Batch(flux, ivar, redshift), progress=Progress(epoch, 30))
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    after = model.eval().loss(Batch(flux, ivar, redshift))[0].item()
    assert after < 0.4 * before


def test_the_model_runs_in_16_bits(batch: tuple[Tensor, Tensor, Tensor], device: str) -> None:
    flux, ivar, redshift = (values.to(device) for values in batch)
    model = make().to(device).train()
    expected = model(flux, ivar, redshift)[0]
    with torch.autocast(device, dtype=torch.bfloat16):
        found = model(flux, ivar, redshift)
        total, _ = model.loss(Batch(flux, ivar, redshift), progress=Progress(9, 40))
        total.backward()
    assert found[0].dtype == found[1].dtype == total.dtype == torch.float32
    torch.testing.assert_close(found[0], expected, rtol=0.05, atol=0.05)


# --- the published package -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["speculator", "leaky_relu"])
@pytest.mark.parametrize("grid", [SDSS, WaveGrid("linear", 3600.0, 2.0, 1500)])
def test_the_same_weights_give_the_outputs_of_the_package(spender: ModuleType, activation: Any, grid: WaveGrid) -> None:
    torch.manual_seed(3)
    model = RedshiftedAutoencoder(Redshifted(latents=6, activation=activation, rest_pixels=3000), grid).eval()
    act = None if activation == "speculator" else [torch.nn.LeakyReLU()] * 4
    other = published(spender, grid, model.decoder.wave_rest, n_latent=6, act=act)
    assert model.state_dict().keys() - {"mean"} == other.state_dict().keys() - {"encoder.instrument.wave_obs"}
    weights = {name: tensor for name, tensor in other.state_dict().items() if ".instrument." not in name}
    model.load_state_dict({**weights, "mean": torch.ones(grid.pixels)})
    flux = 1 + 0.3 * torch.randn(3, grid.pixels)
    redshift = torch.tensor([0.013, 0.2, 0.7123], dtype=torch.float64)
    ivar = torch.rand_like(flux)
    with torch.no_grad():
        latents, rest, expected, valid = other._forward(flux, z=redshift)
        found, same = model(flux, torch.ones_like(flux), redshift)
        torch.testing.assert_close(same, latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.rest(same), rest, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.loss(Batch(flux, ivar, redshift))[0], other.loss(flux, ivar, z=redshift))
        assert torch.equal(model.covers(redshift), valid)


def test_the_fitted_amplitude_is_that_of_the_package(spender: ModuleType) -> None:
    grid = WaveGrid("linear", 3600.0, 8.0, 600)
    model = RedshiftedAutoencoder(Redshifted(latents=4, rest_pixels=800, fit_amplitude=True), grid).eval()
    other = published(spender, grid, model.decoder.wave_rest, n_latent=4)
    model.load_state_dict({**other.state_dict(), "mean": model.mean}, strict=False)
    flux, ivar = 7 * (1 + 0.3 * torch.randn(3, 600)), torch.rand(3, 600)
    redshift = torch.tensor([0.01, 0.1, 0.3], dtype=torch.float64)
    with torch.no_grad():
        expected = other(flux, z=redshift, normalize=True, weights=ivar)
        torch.testing.assert_close(model(flux, ivar, redshift)[0], expected, rtol=1e-4, atol=1e-4)


COARSE = WaveGrid("linear", 3600.0, 8.0, 600)


def state_of(spender: ModuleType, **settings: Any) -> dict[str, Tensor]:
    wave_rest = torch.linspace(2400, float(COARSE.wave[-1]), 700, dtype=torch.float32)
    return dict(published(spender, COARSE, wave_rest, n_latent=4, **settings).state_dict())


@pytest.mark.parametrize("layout", ["one", "list", "old"])
@pytest.mark.parametrize("activation", ["speculator", "leaky_relu"])
def test_a_file_of_the_package_is_read(spender: ModuleType, layout: str, activation: str, tmp_path: Path) -> None:
    act = None if activation == "speculator" else [torch.nn.LeakyReLU()] * 4
    state = state_of(spender, act=act)
    losses: Any = [(1.0, 2.0)]
    if layout == "old":
        state["encoder.mlp.0.weight"] = torch.cat([state["encoder.mlp.0.weight"], torch.ones(128, 1)], dim=1)
        state = {name.replace(".mlp.", ".mlp.mlp."): tensor for name, tensor in state.items()}
        del state["encoder.instrument.wave_obs"]
        losses = np.zeros((2, 1, 5, 3))
    torch.save({"model": state if layout == "one" else [state], "losses": losses}, tmp_path / "model.pt")
    model = load_spender(tmp_path / "model.pt", COARSE)
    assert not model.training
    assert model.settings.activation == activation
    assert model.settings.z_max == pytest.approx(0.5)
    flux, redshift = 1 + 0.3 * torch.randn(3, 600), torch.tensor([0.013, 0.2, 0.41])
    other = published(spender, COARSE, model.decoder.wave_rest, n_latent=4, act=act)
    other.load_state_dict({**state_of(spender, act=act), "decoder.wave_rest": model.decoder.wave_rest})
    with torch.no_grad():
        expected = other(flux, z=redshift.double())
        torch.testing.assert_close(model(flux, torch.ones(3, 600), redshift)[0], expected, rtol=1e-4, atol=1e-4)
    # What it gives can be saved as any other model: its settings rebuild it.
    again = RedshiftedAutoencoder(model.settings, COARSE).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(flux, torch.ones(3, 600), redshift)[0], model(flux, torch.ones(3, 600), redshift)[0])


class Evil:
    """A pickle of this runs a command in an ordinary unpickler."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"model": {}, "losses": Evil(tmp_path / "run")}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="more than arrays") as caught:
        load_spender(tmp_path / "model.pt", COARSE)
    assert not (tmp_path / "run").exists()
    assert "\n" not in str(caught.value)


def small_state(**changes: Any) -> dict[str, Any]:
    """What a file of the package holds, made without it."""
    state: dict[str, Any] = dict(make(COARSE, rest_pixels=700).state_dict())
    del state["mean"]
    state["encoder.instrument.wave_obs"] = torch.tensor(COARSE.wave)
    state |= changes
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.instrument.wave_obs": torch.linspace(3600, 9000, 600)}, "bring them to its grid"),
        ({"encoder.instrument.wave_obs": torch.tensor(COARSE.wave[:-1])}, "bring them to its grid"),
        ({"encoder.instrument.wave_obs": -torch.tensor(COARSE.wave)}, "bring them to its grid"),
        ({"encoder.instrument.wave_obs": None, "decoder.wave_rest": torch.linspace(2e3, 7e3, 700)}, "not made for"),
        ({"encoder.instrument.lsf.weight": torch.ones(1, 1, 5)}, "line-spread function"),
        ({"decoder.wave_rest": None}, "no decoder.wave_rest"),
        ({"decoder.wave_rest": torch.logspace(3, 4, 700)}, "equal steps"),
        ({"decoder.wave_rest": torch.linspace(2400, 8392, 701)}, "has shape"),
        ({"encoder.conv1.0.weight": None}, "encoder.conv1.0.weight has shape None"),
        ({"encoder.conv2.0.weight": torch.zeros(3)}, "encoder.conv2.0.weight has shape"),
        ({"encoder.mlp.1.weight": torch.full((128,), torch.nan)}, "not finite"),
        ({"decoder.mlp.0.weight": torch.zeros(3)}, "no chain of dense layers"),
        ({"decoder.mlp.0.weight": torch.zeros(16, 0)}, "latents"),
        ({"extra": torch.zeros(3)}, "extra has shape"),
        ({"extra": "text"}, "no state of a network"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save({"model": small_state(**changes)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_spender(tmp_path / "model.pt", COARSE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a model", b"PK\x03\x04 cut short"])
def test_a_damaged_file_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    for path in (tmp_path / "model.pt", tmp_path / "none.pt", tmp_path):
        with pytest.raises(CheckpointError) as caught:
            load_spender(path, COARSE)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {"model": 3}, {"model": []}, {"weights": {}}, {"model": {"a": 1}}])
def test_a_file_of_something_else_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="not a spender model"):
        load_spender(tmp_path / "model.pt", COARSE)
