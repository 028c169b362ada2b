"""The network has the published sizes, its scaling is undone exactly, and a masked pixel does not exist for it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distspec.config import Convolutional
from distspec.errors import ConfigError
from distspec.models.autoencoders.convolutional import ConvolutionalAutoencoder
from distspec.models.autoencoders.dense import Batch
from distspec.spectra import WaveGrid

pytestmark = pytest.mark.numeric

GRID = WaveGrid("linear", 4000.0, 5.0, 640)
SMALL = WaveGrid("linear", 4000.0, 50.0, 64)


def make(grid: WaveGrid = SMALL, **settings: Any) -> ConvolutionalAutoencoder:
    torch.manual_seed(1)
    model = ConvolutionalAutoencoder(Convolutional(**{"channels": (8, 4), **settings}), grid)
    model.settle(torch.linspace(0.5, 1.5, grid.pixels))
    return model.eval()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Flux around two; every tenth pixel is masked."""
    torch.manual_seed(2)
    flux = 2 + 0.3 * torch.randn(12, 64)
    ivar = torch.rand(12, 64) * 20 + 1
    ivar[torch.rand(12, 64) < 0.1] = 0
    return flux, ivar


# --- architecture ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "parameters", "latents"),
    [
        ((32, 16, 8, 8), 12_417, 320),
        ((64, 32, 16, 8), 44_785, 320),
        ((16, 16, 8, 8), 8_033, 320),
        ((16, 8, 8, 8), 4_945, 320),
        ((32, 32, 16, 16), 31_425, 640),
    ],
)
def test_the_network_has_its_number_of_parameters(channels: tuple[int, ...], parameters: int, latents: int) -> None:
    model = ConvolutionalAutoencoder(Convolutional(channels=channels), GRID)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.latents == latents
    flux, found = model(torch.rand(2, 640), torch.ones(2, 640))
    assert flux.shape == (2, 640)
    assert found.shape == (2, latents)


def test_four_blocks_halve_640_pixels_to_40() -> None:
    model = ConvolutionalAutoencoder(Convolutional(), GRID)
    lengths = []
    for stack in (model.encoder, model.decoder):
        for layer in stack:
            if isinstance(layer, nn.MaxPool1d | nn.Upsample):
                layer.register_forward_hook(lambda _, __, output: lengths.append(output.shape[-1]))
    model(torch.rand(1, 640), torch.ones(1, 640))
    assert lengths == [320, 160, 80, 40, 80, 160, 320, 640]


def test_an_even_kernel_is_padded_by_one_pixel_less_on_the_left() -> None:
    model = make(channels=(1,), scaling="none", output="linear")
    pad, convolution = model.encoder[0], model.encoder[1]
    with torch.no_grad():
        convolution.weight.copy_(torch.arange(8.0).view(1, 1, 8))
        convolution.bias.zero_()
    pulse = torch.zeros(1, 1, 64)
    pulse[..., 30] = 1
    response = convolution(pad(pulse))[0, 0]
    assert response.shape == (64,)
    # Pixel i sees i - 3 to i + 4, so the pulse meets weight 3 at its own place.
    assert response[26:34].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("pixels", "advice"),
    [(1000, "992 or 1008 pixels, or at most 3 channels"), (641, "640 or 656 pixels"), (9, "use 16")],
)
def test_pixels_that_cannot_be_halved_are_refused_with_what_would_fit(pixels: int, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice) as caught:
        ConvolutionalAutoencoder(Convolutional(), WaveGrid("linear", 4000.0, 1.0, pixels))
    assert "\n" not in str(caught.value)


def test_the_model_can_be_described_without_memory() -> None:
    with torch.device("meta"):
        state = ConvolutionalAutoencoder(Convolutional(), GRID).state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in ConvolutionalAutoencoder(Convolutional(), GRID).state_dict().items()
    }


# --- scaling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["maximum", "range", "none"])
def test_the_scaling_is_recorded_and_undone(scaling: str, batch: tuple[Tensor, Tensor]) -> None:
    flux, ivar = batch
    scaled, factor, offset = make(scaling=scaling, output="linear").scaled(flux, ivar)
    good = ivar > 0
    torch.testing.assert_close((scaled * factor[:, None] + offset[:, None])[good], flux[good])
    seen = torch.where(good, scaled, torch.nan)
    if scaling == "none":
        assert torch.equal(seen[good], flux[good])
    else:
        assert scaled.amin() >= 0
        assert (seen.nan_to_num(nan=-1).amax(dim=1) == 1).all()
    if scaling == "range":
        assert (seen.nan_to_num(nan=2).amin(dim=1) == 0).all()


@pytest.mark.parametrize("scaling", ["maximum", "range", "none"])
@pytest.mark.parametrize("level", [0.0, -2.0, 1e-30, 3.0])
def test_any_constant_spectrum_has_a_defined_scaling(scaling: str, level: float) -> None:
    model = make(scaling=scaling, output="linear")
    flux, ivar = torch.full((2, 64), level), torch.ones(2, 64)
    ivar[1] = 0
    scaled, factor, _ = model.scaled(flux, ivar)
    assert torch.isfinite(scaled).all()
    assert (factor > 0).all()
    for values in (*model(flux, ivar), *model.loss(Batch(flux, ivar), kind="mse"), *model.loss(Batch(flux, ivar))):
        assert torch.isfinite(values).all()


def test_a_spectrum_without_positive_flux_is_divided_by_its_largest_deviation() -> None:
    flux = torch.full((1, 64), -1.0)
    flux[0, 5], flux[0, 6] = 0.0, -4.0
    scaled, factor, offset = make().scaled(flux, torch.ones(1, 64))
    assert (factor.item(), offset.item()) == (4, 0)
    assert scaled.min() == -1


def test_the_reconstruction_is_in_the_unit_of_the_store(batch: tuple[Tensor, Tensor]) -> None:
    flux, ivar = batch
    model = make()
    found, latents = model(flux, ivar)
    bright, same = model(8 * flux, ivar / 64)
    assert torch.equal(same, latents)
    torch.testing.assert_close(bright, 8 * found)
    _, factor, _ = model.scaled(flux, ivar)
    torch.testing.assert_close(model.decode(latents) * factor[:, None], found)
    assert torch.equal(model.encode(flux, ivar), latents)


# --- masked pixels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["maximum", "range", "none"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30, 0.0])
def test_a_masked_pixel_has_no_influence(scaling: str, garbage: float, batch: tuple[Tensor, Tensor]) -> None:
    flux, ivar = batch
    other = torch.where(ivar > 0, flux, garbage)
    model = make(scaling=scaling, output="linear").train()
    found = []
    for values in (flux, other):
        model.zero_grad()
        totals = [model.loss(Batch(values, ivar), kind=kind)[0] for kind in ("mse", "chi2")]
        sum(totals).backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found.append([*model(values, ivar), *totals, gradients])
    for one, two in zip(*found, strict=True):
        assert torch.isfinite(two).all()
        assert torch.equal(one, two)


def test_a_masked_pixel_enters_as_the_mean_spectrum_scaled_by_the_same_rule() -> None:
    model = make()
    ivar = torch.ones(1, 64)
    ivar[0, 60:] = 0
    scaled, _, _ = model.scaled(5 * model.mean[None], ivar)
    torch.testing.assert_close(scaled[0], (model.mean / model.mean[59]).clamp_max(1))


# --- loss ------------------------------------------------------------------------------------------------------------


def test_the_squared_error_is_in_scaled_units(batch: tuple[Tensor, Tensor]) -> None:
    flux, ivar = batch
    model = make()
    total, count = model.loss(Batch(flux, ivar), kind="mse")
    scaled, _, _ = model.scaled(flux, ivar)
    good = ivar > 0
    expected = ((scaled - model.decode(model.encode(flux, ivar))) ** 2)[good]
    torch.testing.assert_close(total, expected.sum())
    assert count == good.sum()
    torch.testing.assert_close(model.loss(Batch(9 * flux, ivar), kind="mse")[0], total)


def test_chi2_is_in_units_of_sigma(batch: tuple[Tensor, Tensor]) -> None:
    flux, ivar = batch
    model = make()
    total, count = model.loss(Batch(flux, ivar), kind="chi2")
    torch.testing.assert_close(total, ((flux - model(flux, ivar)[0]).square() * ivar).sum())
    assert count == (ivar > 0).sum()


@pytest.mark.parametrize("kind", ["mse", "chi2"])
def test_the_loss_adds_up_over_batches(kind: Any, batch: tuple[Tensor, Tensor]) -> None:
    model = make()
    whole = model.loss(Batch(*batch), kind=kind)
    parts = [model.loss(Batch(*(values[s] for values in batch)), kind=kind) for s in (slice(0, 5), slice(5, None))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    assert parts[0][1] + parts[1][1] == whole[1]


def test_the_network_learns_a_few_smooth_spectra() -> None:
    phase = torch.linspace(0, 3, 64)
    flux = 3 + torch.sin(phase + torch.arange(6.0)[:, None])
    ivar = torch.full_like(flux, 100.0)
    ivar[:, 20] = 0
    model = make(channels=(16, 8)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        total, count = model.loss(Batch(flux, ivar), kind="mse")
        (total / count).backward()
        optimizer.step()
    assert (total / count).sqrt() < 0.05


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
