"""What the redshifted autoencoder is trained with beside its residuals, and the interpolation that moves spectra.

References:
    Melchior et al. 2023, AJ 166, 74 (fidelity); Liang et al. 2023, AJ 166, 75 (similarity, consistency, augmentation).
"""

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from distspec.spectra import WaveGrid

__all__ = ["annealed", "augmented", "consistency", "interpolated", "similarity", "within"]

_BAND = (4000.0, 7000.0)
"""Å at rest; the median there is the unit in which two models are compared."""

_CENTER = 5000.0
"""Å at rest, where the weight of the comparison is largest."""

_OFFSET = 2.5
"""Of the two sigmoids of the similarity loss: a pair that agrees costs 2 sigm(-2.5) = 0.15."""

_EDGE = 1e-6
"""Pixels; a position this far beyond the last centre is on it."""


def interpolated(
    values: Float[Tensor, "n m"], position: Float64[Tensor, "n pixels"]
) -> tuple[Float[Tensor, "n pixels"], Bool[Tensor, "n pixels"]]:
    """Interpolate linearly between uniform samples.

    Arguments:
        values: samples 0 to m - 1 of each row.
        position: where to take values, in samples; in double precision, since a wavelength divided by the width of a
            pixel needs more digits than single precision has.

    Returns:
        Values, 0 where the position is outside of the samples (or not a number); True where it is inside.
    """
    left, share, inside = _bracket(position, values.shape[1])
    low, high = values.gather(1, left), values.gather(1, left + 1)
    return torch.where(inside, torch.lerp(low, high, share.to(values.dtype)), 0.0), inside


def within(position: Float64[Tensor, "n pixels"], samples: int) -> Bool[Tensor, "n pixels"]:
    """Tell which positions lie between the first and the last sample."""
    return (position >= -_EDGE) & (position <= samples - 1 + _EDGE)


def similarity(
    latents: Float[Tensor, "n latents"],
    rest: Float[Tensor, "n m"],
    wave: Float[Tensor, "m"],
    *,
    slope: float,
    amplitude: float,
    width: float,
) -> Float[Tensor, ""]:
    """Sum over spectra the loss that makes distances between latents those between rest-frame models.

    With x a model divided by its median in 4000-7000 Å, S_ij = ⟨Ω (x_i - x_j)²⟩ over its m pixels, the weight
    Ω = A exp(-(λ - 5000)² / 4σ²) (a Gaussian of √2 σ, as the public code has it), and D_ij = ‖s_i - s_j‖² / latents:
    (1/n) Σ_{i≠j} [sigm(kX - 2.5) + sigm(-kX - 2.5)], X = D - S.

    S follows from the inner products of √Ω-scaled models (Gram identity), in n² + nm numbers where the differences
    themselves are n²m: 6.8 GiB for 512 models of 7000 pixels.

    Arguments:
        latents: s.
        rest: models in the rest frame.
        wave: wavelengths of `rest`, Å.
        slope: k.
        amplitude: A.
        width: σ, Å.
    """
    band = (wave > _BAND[0]) & (wave < _BAND[1])
    band = band | ~band.any()
    median = torch.where(band, rest, torch.nan).nanmedian(dim=1, keepdim=True).values
    # An untrained model may be anything, its median zero.
    relative = rest / torch.where(median.abs() > 1e-3, median, 1.0)
    weight = amplitude * torch.exp(-((0.5 * (wave - _CENTER) / width) ** 2)) / len(wave)
    of_models = _squared_distances(relative * weight.sqrt().to(rest.dtype))
    x = slope * (_squared_distances(latents) / latents.shape[1] - of_models)
    pairs = torch.sigmoid(x - _OFFSET) + torch.sigmoid(-x - _OFFSET)
    return (pairs.sum() - pairs.diagonal().sum()) / len(latents)


def consistency(
    latents: Float[Tensor, "n latents"], copies: Float[Tensor, "n latents"], variance: float
) -> Float[Tensor, "n"]:
    """Give sigm(X) - ½ of each spectrum, X = ‖s' - s‖² / (σ_s² latents), s' the latents of its altered copy."""
    x = (copies - latents).square().sum(dim=1) / (variance * latents.shape[1])
    return torch.sigmoid(x) - 0.5


def annealed(epoch: int, epochs: int) -> float:
    """Give the slope k of the similarity loss: it climbs from 0 to 10 twice, and is 0 in the last twentieth.

    For the 200 epochs of the public SDSS training this is its schedule: 0, 0.1, ... 9.9, again, and 10 epochs of 0.
    """
    if 20 * (epochs - epoch) <= epochs:
        return 0.0
    return 10 * ((2 * epoch) % epochs) / epochs


def augmented(
    flux: Float[Tensor, "n pixels"],
    ivar: Float[Tensor, "n pixels"],
    redshift: Float64[Tensor, "n"],
    grid: WaveGrid,
    z_max: float,
    *,
    ratio: float = 0.05,
    noise: float = 0.2,
) -> tuple[Float[Tensor, "n pixels"], Float[Tensor, "n pixels"]]:
    """Make a copy of each spectrum as it might have been observed at another redshift, and worse.

    The new redshift is uniform in 0..z_max; flux and ivar are interpolated linearly, and a pixel is masked that was not
    observed or has a masked neighbour. Then a share `ratio` of the pixels gets noise whose σ is `noise` times the
    spectrum's maximum, and a block of the same share of the grid is masked, at a place of its own for each spectrum.

    (The public code cuts one block for the whole batch, and leaves masked pixels with a weight of 1e-6.)

    Arguments:
        redshift: at which the spectra were observed.
        grid: wavelengths of the spectra.
        z_max: largest new redshift.
    """
    n, pixels = flux.shape
    good = ivar > 0
    flux = torch.where(good, flux, 0.0)
    steps = torch.arange(pixels, device=flux.device)
    new = z_max * torch.rand(n, dtype=torch.float64, device=flux.device)
    left, share, inside = _bracket(_moved(steps.double(), (1 + new) / (1 + redshift), grid), pixels)
    seen = inside & (good.gather(1, left) | (share == 1)) & (good.gather(1, left + 1) | (share == 0))
    share = share.to(flux.dtype)
    moved, weight = (torch.lerp(x.gather(1, left), x.gather(1, left + 1), share) for x in (flux, ivar))

    brightest = torch.where(good, flux, 0.0).amax(dim=1, keepdim=True)
    sigma = noise * brightest * torch.randn_like(flux) * (torch.rand_like(flux) < ratio)
    length = int(pixels * ratio)
    start = torch.randint(0, pixels - length + 1, (n, 1), device=flux.device)
    seen &= (steps < start) | (steps >= start + length)
    weight = weight / (1 + weight * sigma.square())
    return moved + sigma, torch.where(seen, weight, 0.0)


def _moved(
    steps: Float64[Tensor, "pixels"], stretch: Float64[Tensor, "n"], grid: WaveGrid
) -> Float64[Tensor, "n pixels"]:
    """Give the position on the grid of each pixel's wavelength divided by the stretch."""
    if grid.scale == "log":
        return steps - torch.log10(stretch)[:, None] / grid.step
    origin = grid.first / grid.step
    return (steps + origin) / stretch[:, None] - origin


def _bracket(
    position: Float64[Tensor, "n pixels"], samples: int
) -> tuple[Tensor, Float64[Tensor, "n pixels"], Bool[Tensor, "n pixels"]]:
    """Give the sample to the left, how far on the way to the next one, and whether there are both."""
    inside = within(position, samples)
    position = torch.where(inside, position, 0.0)
    left = position.floor().clamp(0, samples - 2)
    return left.long(), (position - left).clamp(0, 1), inside


def _squared_distances(points: Float[Tensor, "n dim"]) -> Float[Tensor, "n n"]:
    # Distances do not change, and those of points far from zero keep their digits.
    points = points - points.detach().mean(dim=0)
    squares = points.square().sum(dim=1)
    return (squares[:, None] + squares - 2 * points @ points.T).clamp_min(0.0)
