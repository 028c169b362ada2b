"""An autoencoder of observed spectra that decodes at rest: an attention encoder, a decoder, and a known redshift.

The design and the names of the parameters are those of `spender` 0.3, so that its published models load
(`load_spender`). The package itself is not a dependency, because it
- imports GPUtil, psutil, humanize, accelerate and a flow library for what is not the model;
- searches each redshifted wavelength in a matrix of n x m others, where a uniform rest grid needs arithmetic alone;
- compares all pairs of models pixel by pixel in its similarity loss (`redshifted_losses.similarity`);
- trains through a method beside `forward`, where mixed precision and several GPUs do not reach it;
- encodes the flux of pixels of weight zero, which here have no influence.
What is left out: the line-spread function and the flux calibration of an instrument, and several instruments at once.
The losses are those of the papers; version 0.3 divides distances by their mean over the batch instead.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from distspec.config import Redshifted
from distspec.errors import CheckpointError, ConfigError
from distspec.models.autoencoders.dense import START, Batch, Loss, Progress, TwoStage
from distspec.models.autoencoders.redshifted_losses import (
    annealed,
    augmented,
    consistency,
    interpolated,
    similarity,
    within,
)
from distspec.spectra import WaveGrid

__all__ = ["RedshiftedAutoencoder", "load_spender", "within_reach"]

_SHORTEST = 56
"""Pixels that leave two positions after both poolings: the normalisation over positions needs a spread."""

_LONGEST_REASON = 300

_LAYER = re.compile(r"decoder\.mlp\.(\d{1,3})\.weight")

_ARRAYS: list[Any] = [
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # type: ignore[attr-defined]
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    np.ndarray,
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
]
"""Some files keep their losses as numpy arrays; these make arrays of numbers and nothing else."""


class RedshiftedAutoencoder(nn.Module):
    """Encoder of the observed spectrum, decoder to the rest frame, and linear interpolation to the observed pixels.

    The encoder sees neither redshift nor ivar; each of its convolutions is normalised over positions, so it does not
    see the amplitude either. The model reaches from the grid's first wavelength at z_max to its last at redshift 0. An
    observed pixel beyond it is 0 and has no weight in the loss (`covers` tells which).

    A masked pixel enters as the mean spectrum of the training sample.

    With `fit_amplitude` each reconstruction is multiplied by (ŷ·w·y) / (ŷ·w·ŷ), the amplitude that fits its spectrum
    best; without it the spectra are expected in a common normalisation.

    References:
        Melchior et al. 2023, AJ 166, 74: §2 (model), eq. 3 (fidelity); Liang et al. 2023, AJ 166, 75: similarity and
        consistency; Serrà et al. 2018 (attention encoder); Alsing et al. 2020, eq. 8 (activation).

    Arguments:
        settings: latents, layers of the decoder, reach of the rest-frame model, terms of the loss.
        grid: observed wavelengths.

    Raises:
        ConfigError: the grid is too short for the encoder or the rest frame is empty.
    """

    def __init__(self, settings: Redshifted, grid: WaveGrid) -> None:
        super().__init__()
        if grid.pixels < _SHORTEST:
            raise ConfigError(f"{grid.pixels} pixels are too few for the redshifted model: use {_SHORTEST} or more")
        first, last = float(grid.wave[0]) / (1 + settings.z_max), float(grid.wave[-1])
        pixels = settings.rest_pixels or int(grid.pixels * (1 + settings.z_max))
        if first >= last or pixels < 2:
            raise ConfigError(f"z_max = {settings.z_max} leaves no rest frame for {grid}: set a larger z_max")
        self.settings = settings
        self.grid = grid
        self.latents = settings.latents
        self.encoder = _Encoder(settings.latents)
        self.decoder = _Decoder(settings, first, last, pixels)
        self.mean: Tensor
        self.wave: Tensor
        self.register_buffer("mean", torch.zeros(grid.pixels))
        self.register_buffer("wave", torch.tensor(grid.wave, dtype=torch.float64), persistent=False)

    def settle(self, mean: Float[Tensor, "pixels"]) -> None:
        """Take the mean spectrum of the training sample, which stands in for masked pixels."""
        self.mean.copy_(mean)

    def encode(
        self,
        flux: Float[Tensor, "n pixels"],
        ivar: Float[Tensor, "n pixels"],
        redshift: Float[Tensor, "n"] | None = None,
    ) -> Float[Tensor, "n latents"]:
        """Map spectra to latents; the redshift is not looked at."""
        latents: Tensor = self.encoder(torch.where(ivar > 0, flux, self.mean))
        return latents

    def rest(self, latents: Float[Tensor, "n latents"]) -> Float[Tensor, "n m"]:
        """Map latents to spectra in the rest frame, at the wavelengths `decoder.wave_rest`."""
        flux: Tensor = self.decoder(latents)
        return flux

    def decode(
        self, latents: Float[Tensor, "n latents"], redshift: Float[Tensor, "n"] | None = None
    ) -> Float[Tensor, "n pixels"]:
        """Map latents to flux on the observed grid, 0 beyond the model's reach.

        Raises:
            ValueError: no redshift is given.
        """
        return interpolated(self.rest(latents), self._position(_known(redshift)))[0]

    def covers(self, redshift: Float[Tensor, "n"] | None) -> Bool[Tensor, "n pixels"]:
        """Tell which observed pixels the rest-frame model reaches: none where the redshift is not known."""
        return within(self._position(_known(redshift)), len(self.decoder.wave_rest))

    def forward(
        self,
        flux: Float[Tensor, "n pixels"],
        ivar: Float[Tensor, "n pixels"],
        redshift: Float[Tensor, "n"] | None = None,
    ) -> tuple[Float[Tensor, "n pixels"], Float[Tensor, "n latents"]]:
        """Give reconstruction, 0 beyond the model's reach, and latents.

        Raises:
            ValueError: no redshift is given.
        """
        position = self._position(_known(redshift))
        latents = self.encode(flux, ivar)
        model, inside = interpolated(self.rest(latents).to(flux.dtype), position)
        return self._brought(model, flux, torch.where(inside, ivar, 0.0)), latents.to(flux.dtype)

    def loss(self, batch: Batch, *, kind: Loss = "chi2", progress: Progress = START) -> tuple[Tensor, Tensor]:
        """Sum over spectra, and count these.

        Fidelity is ½ Σ w (y - ŷ)² / pixels, over all pixels of the grid, so that a spectrum with more good ones counts
        more: of a perfect model it is half the share of good pixels. w is ivar ("chi2", the paper's) or 1 ("mse").
        In training, similarity and consistency are added.

        Raises:
            ValueError: no redshift is given.
        """
        flux, ivar, redshift = batch.flux, batch.ivar, _known(batch.redshift)
        position = self._position(redshift)
        latents = self.encode(flux, ivar)
        rest = self.rest(latents)
        copies = None
        if self.training and self.settings.consistency:
            copies = self.encode(*augmented(flux, ivar, redshift.double(), self.grid, max(self.settings.z_max, 0.0)))
        with torch.autocast(flux.device.type, enabled=False):
            rest, latents = rest.to(flux.dtype), latents.to(flux.dtype)
            total = self._fidelity(rest, position, flux, ivar, kind)
            if self.training and self.settings.similarity:
                total = total + similarity(
                    latents,
                    rest,
                    self.decoder.wave_rest,
                    slope=annealed(*progress),
                    amplitude=self.settings.similarity_amplitude,
                    width=self.settings.similarity_width,
                )
            if copies is not None:
                each = consistency(latents, copies.to(flux.dtype), self.settings.consistency_variance)
                total = total + torch.where(torch.isfinite(position[:, 0]), each, 0.0).sum()
        return total, torch.tensor(len(flux), device=flux.device)

    def _fidelity(
        self,
        rest: Float[Tensor, "n m"],
        position: Float64[Tensor, "n pixels"],
        flux: Float[Tensor, "n pixels"],
        ivar: Float[Tensor, "n pixels"],
        kind: Loss,
    ) -> Float[Tensor, ""]:
        model, inside = interpolated(rest, position)
        weight = torch.where(inside, ivar, 0.0)
        residual = torch.where(weight > 0, flux - self._brought(model, flux, weight), 0.0)
        terms = residual.square() * weight if kind == "chi2" else residual.square()
        return 0.5 * terms.sum() / flux.shape[1]

    def _brought(
        self, model: Float[Tensor, "n pixels"], flux: Float[Tensor, "n pixels"], weight: Float[Tensor, "n pixels"]
    ) -> Float[Tensor, "n pixels"]:
        """Bring the model to the amplitude of its spectrum, where the settings say so."""
        if not self.settings.fit_amplitude:
            return model
        weighted = model * weight
        product = (weighted * torch.where(weight > 0, flux, 0.0)).sum(dim=1, keepdim=True)
        square = (weighted * model).sum(dim=1, keepdim=True)
        return model * torch.where(square > 0, product / square, 1.0)

    def _position(self, redshift: Float[Tensor, "n"]) -> Float64[Tensor, "n pixels"]:
        """Give the place of each observed pixel on the rest grid, in pixels of it: λ / (1 + z) by arithmetic."""
        stretch = 1 + redshift.to(self.wave).unsqueeze(1)
        wave_rest = self.decoder.wave_rest.double()
        per_pixel = (len(wave_rest) - 1) / (wave_rest[-1] - wave_rest[0])
        return (self.wave / torch.where(stretch > 0, stretch, torch.nan) - wave_rest[0]) * per_pixel


class _Encoder(nn.Module):
    """Three convolutions, attention over positions, and a small network to the latents."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = _convolve(1, 128, 5), _convolve(128, 256, 11), _convolve(256, 512, 21)
        self.pool1, self.pool2 = nn.MaxPool1d(5, padding=2), nn.MaxPool1d(11, padding=5)
        self.mlp = _chain(256, (128, 64, 32), latents, [nn.PReLU(128), nn.PReLU(64), nn.PReLU(32), nn.Identity()])

    def forward(self, flux: Float[Tensor, "n pixels"]) -> Float[Tensor, "n latents"]:
        features = self.conv3(self.pool2(self.conv2(self.pool1(self.conv1(flux.unsqueeze(1))))))
        values, keys = features.chunk(2, dim=1)
        latents: Tensor = self.mlp((values * keys.softmax(dim=2)).sum(dim=2))
        return latents


class _Decoder(nn.Module):
    """A dense network from latents to the rest frame; an activation follows its last layer too."""

    def __init__(self, settings: Redshifted, first: float, last: float, pixels: int) -> None:
        super().__init__()
        activations: list[nn.Module] = [nn.LeakyReLU() for _ in range(len(settings.hidden) + 1)]
        if settings.activation == "speculator":
            activations = [_Speculator(units) for units in settings.hidden]
            activations.append(_Speculator(pixels, plus_one=True))
        self.mlp = _chain(settings.latents, settings.hidden, pixels, activations)
        self.wave_rest: Tensor
        self.register_buffer("wave_rest", torch.linspace(first, last, pixels, dtype=torch.float64))

    def forward(self, latents: Float[Tensor, "n latents"]) -> Float[Tensor, "n m"]:
        flux: Tensor = self.mlp(latents)
        return flux


class _Speculator(nn.Module):
    """a(x) = [γ + (1 - γ) sigm(βx)] x for each unit; on the output one is added: the model is 1 and a deviation."""

    def __init__(self, units: int, *, plus_one: bool = False) -> None:
        super().__init__()
        self.plus_one = plus_one
        self.beta = nn.Parameter(torch.randn(units))
        self.gamma = nn.Parameter(torch.randn(units))

    def forward(self, x: Float[Tensor, "n units"]) -> Float[Tensor, "n units"]:
        activated = (self.gamma + (1 - self.gamma) * torch.sigmoid(self.beta * x)) * x
        return activated + 1 if self.plus_one else activated


def _known(redshift: Float[Tensor, "n"] | None) -> Float[Tensor, "n"]:
    if redshift is None:
        raise ValueError("the redshifted model needs the redshift of each spectrum")
    return redshift


def _convolve(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2), nn.InstanceNorm1d(outputs), nn.PReLU(outputs)
    )


def _chain(inputs: int, hidden: tuple[int, ...], outputs: int, activations: list[nn.Module]) -> nn.Sequential:
    """Chain linear layers and activations; the third module of each layer keeps the published numbering."""
    widths = [inputs, *hidden, outputs]
    layers: list[nn.Module] = []
    for index, activation in enumerate(activations):
        layers += [nn.Linear(widths[index], widths[index + 1]), activation, nn.Identity()]
    return nn.Sequential(*layers)


def within_reach(
    model: nn.Module, ivar: Float[Tensor, "n pixels"], redshift: Float[Tensor, "n"] | None
) -> Float[Tensor, "n pixels"]:
    """Mask the pixels that a model says nothing of: those beyond the ends of a rest-frame model at the redshift."""
    last = model.second if isinstance(model, TwoStage) else model
    if isinstance(last, RedshiftedAutoencoder) and redshift is not None:
        return torch.where(last.covers(redshift), ivar, 0.0)
    return ivar


def load_spender(path: str | Path, grid: WaveGrid, *, fit_amplitude: bool = False) -> RedshiftedAutoencoder:
    """Read a published model of the spender package.

    The file is a pickle; it is read by PyTorch's restricted unpickler, which makes tensors, plain values and numpy
    arrays and runs no code from the file. Masked pixels enter as 1, the level of a normalised spectrum, until `settle`
    gives the mean of the sample at hand.

    Arguments:
        path: of the file.
        grid: observed wavelengths of the spectra that the model is to see.
        fit_amplitude: fit the amplitude of each reconstruction, for spectra that are not normalised as the package's
            (to a median of 1 between 5300 and 5850 Å at rest).

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: the file is absent, damaged, not a spender model, or made for another grid.
    """
    state = _published_state(Path(path))
    wave_rest = _uniform(path, state["decoder.wave_rest"])
    _require_grid(path, state, wave_rest, grid)
    widths = _widths(path, state)
    try:
        settings = Redshifted(
            latents=widths[0],
            hidden=tuple(widths[1:-1]),
            activation="speculator" if "decoder.mlp.1.beta" in state else "leaky_relu",
            z_max=float(grid.wave[0] / wave_rest[0]) - 1,
            rest_pixels=len(wave_rest),
            fit_amplitude=fit_amplitude,
        )
        # On the meta device, which has no memory: a file may claim a network of any size.
        with torch.device("meta"):
            expected = RedshiftedAutoencoder(settings, grid).state_dict()
    except ValueError as error:
        raise CheckpointError(f"{path} is not a spender model for {grid}: {_reason(error)}") from None
    own = {"mean", "decoder.wave_rest"}
    weights = {name: tensor for name, tensor in state.items() if name not in own and "instrument." not in name}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    needed = {name: tuple(tensor.shape) for name, tensor in expected.items() if name not in own}
    if found != needed:
        wrong = min(name for name in found.keys() | needed.keys() if found.get(name) != needed.get(name))
        raise CheckpointError(f"{path}: {wrong} has shape {found.get(wrong)}; a spender model has {needed.get(wrong)}")
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds values that are not finite; take another file")
    model = RedshiftedAutoencoder(settings, grid)
    model.load_state_dict({**weights, "decoder.wave_rest": wave_rest, "mean": torch.ones(grid.pixels)})
    return model.eval()


def _published_state(path: Path) -> dict[str, Tensor]:
    """Read the state dict in the layouts that the package has had."""
    try:
        with torch.serialization.safe_globals(_ARRAYS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"no spender model at {path}: {error.strerror or error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"{path} is not a spender model, or holds more than arrays: {_reason(error)}") from None
    state = content.get("model") if isinstance(content, Mapping) else None
    if isinstance(state, list | tuple) and state:
        state = state[0]
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(f"{path} is not a spender model: it has no state of a network under 'model'")
    weights = {str(name).replace("mlp.mlp", "mlp"): tensor.detach() for name, tensor in state.items()}
    missing = {"decoder.wave_rest", "encoder.mlp.0.weight", "decoder.mlp.0.weight"} - weights.keys()
    if missing:
        raise CheckpointError(f"{path} is not a spender model: it has no {min(missing)}")
    lsf = [name for name in weights if ".lsf." in name]
    if lsf:
        raise CheckpointError(f"{path} has a line-spread function ({lsf[0]}), which is not applied here; use another")
    # Until 2023 the redshift was a last input of the encoder's network; the package drops its weights too.
    first = weights["encoder.mlp.0.weight"]
    if first.ndim == 2 and first.shape[1] == 257:
        weights["encoder.mlp.0.weight"] = first[:, :-1]
    return weights


def _uniform(path: str | Path, wave_rest: Tensor) -> Float64[Tensor, "m"]:
    """Require that the rest grid is uniform in wavelength."""
    wave = wave_rest.double()
    if wave.ndim == 1 and len(wave) > 1 and 0 < wave[0] < wave[-1] and torch.isfinite(wave).all():
        even = torch.linspace(float(wave[0]), float(wave[-1]), len(wave), dtype=torch.float64)
        if (wave - even).abs().max() < 0.01 * (even[1] - even[0]):
            return wave
    raise CheckpointError(f"{path}: decoder.wave_rest is not a grid of wavelengths in equal steps")


def _require_grid(path: str | Path, state: dict[str, Tensor], wave_rest: Tensor, grid: WaveGrid) -> None:
    """Refuse a model of another observed grid; an old file without one must at least reach the grid's last pixel."""
    observed = next((tensor for name, tensor in state.items() if name.endswith("wave_obs")), None)
    if observed is None:
        reach = float(grid.position(wave_rest[-1:].numpy())[0]) / grid.pixels
        if wave_rest[0] > grid.wave[0] or not 0.98 < reach < 1.02:
            raise CheckpointError(
                f"{path}: its rest frame, {wave_rest[0]:.1f}-{wave_rest[-1]:.1f} Å, was not made for {grid}"
            )
        return
    wave = observed.double().numpy()
    same = wave.shape == (grid.pixels,) and bool((wave > 0).all())
    if not same or abs(grid.position(wave) - np.arange(grid.pixels)).max() > 0.02:
        span = f"{wave.min():.1f}-{wave.max():.1f} Å in {wave.size} pixels" if wave.size else "no pixels"
        raise CheckpointError(f"{path} was made for {span}, the spectra are on {grid}; bring them to its grid")


def _widths(path: str | Path, state: dict[str, Tensor]) -> list[int]:
    """Read from the shapes of its weights how wide each layer of the decoder is."""
    layers = {int(found[1]): tensor for name, tensor in state.items() if (found := _LAYER.fullmatch(name))}
    if any(tensor.ndim != 2 for tensor in layers.values()):
        raise CheckpointError(f"{path} is not a spender model: its decoder is no chain of dense layers")
    return [layers[0].shape[1], *(layers[index].shape[0] for index in sorted(layers))]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:_LONGEST_REASON]
