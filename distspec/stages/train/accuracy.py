"""How well an autoencoder reconstructs spectra that it was not trained on, as Sharma et al. tabulate it.

References:
    Sharma, Kembhavi, Kembhavi, Sivarani & Abraham 2019, BSRSL 88, 174, table 1 and section 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from distspec.models.autoencoders.convolutional import ConvolutionalAutoencoder
from distspec.models.autoencoders.dense import TwoStage
from distspec.models.autoencoders.redshifted import within_reach
from distspec.models.training.feed import Feed
from distspec.models.training.group import Group, Shares
from distspec.statistics.summaries import TABLE_ROWS

__all__ = ["Accuracy", "as_text", "measure"]

_BINS = 3
"""Parts of equal number by signal-to-noise ratio."""


@dataclass(frozen=True)
class Accuracy:
    """Errors of n spectra.

    Arguments:
        rows: of the spectra in the store.
        mse: mean squared error over good pixels.
        difference: mean of original minus reconstruction over good pixels.
        snr: median signal-to-noise ratio per pixel.
        left: sum of squared residuals over all.
        flux, flux2, count: sums of flux and its square and number of good pixels at each wavelength.
        unit: what errors are measured in.
    """

    rows: Int64[np.ndarray, "n"]
    mse: Float64[np.ndarray, "n"]
    difference: Float64[np.ndarray, "n"]
    snr: Float64[np.ndarray, "n"]
    left: float
    flux: Float64[np.ndarray, "pixels"]
    flux2: Float64[np.ndarray, "pixels"]
    count: Float64[np.ndarray, "pixels"]
    unit: str

    @property
    def r2(self) -> float:
        """1 - Σ(x - x̂)² / Σ(x - x̄)², x̄ the mean flux at each wavelength."""
        total = (self.flux2 - self.flux**2 / np.maximum(self.count, 1)).sum()
        return float(1 - self.left / total) if total > 0 else float("nan")

    def table(self) -> dict[str, Any]:
        """Give the statistics of the three errors, R² and the mean RMSE of thirds by S/N, as plain values."""
        if not len(self.rows):
            return {"spectra": 0, "unit": self.unit}
        errors = {"mse": self.mse, "rmse": np.sqrt(self.mse), "difference": self.difference}
        quantiles = {"min": 0.0, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "max": 1.0}
        statistics = {"mean": _each(errors, np.mean), "std": _each(errors, np.std)}
        statistics |= {name: _each(errors, lambda e, q=q: np.quantile(e, q)) for name, q in quantiles.items()}
        bins = []
        known = np.flatnonzero(np.isfinite(self.snr))
        for part in np.array_split(known[np.argsort(self.snr[known], kind="stable")], _BINS):
            if len(part):
                span = {"from": float(self.snr[part].min()), "to": float(self.snr[part].max())}
                bins.append(span | {"spectra": len(part), "rmse": float(np.sqrt(self.mse[part]).mean())})
        return {
            "spectra": len(self.rows),
            "unit": self.unit,
            "statistics": statistics,
            "r2": self.r2,
            "snr_bins": bins,
        }


def _each(errors: Mapping[str, Float64[np.ndarray, "n"]], of: Any) -> dict[str, float]:
    return {name: float(of(values)) for name, values in errors.items()}


@torch.no_grad()
def measure(model: nn.Module, feeds: Sequence[Feed], group: Group | Shares) -> Accuracy:
    """Measure a model on the validation spectra of all workers.

    Errors of a convolutional model are in units of each spectrum's scaled flux, as its loss is; others in the store's.

    Arguments:
        model: the autoencoder.
        feeds: one for each share of this worker, or the worker's only one.
        group: merges over workers or shares.
    """
    feed, device = feeds[0], feeds[0].device
    last = model.second if isinstance(model, TwoStage) else model
    scaled = isinstance(last, ConvolutionalAutoencoder) and last.settings.scaling != "none"
    parts: list[tuple[Tensor, ...]] = list(
        zip(*([part.to(device) for part in _errors(model, last, one)] for one in feeds), strict=True)
    )
    merged: list[Tensor]
    if isinstance(group, Shares):
        merged = [*map(group.gather, parts[:2]), *map(group.sum, parts[2:])]
    else:
        merged = [*(group.gather(part) for (part,) in parts[:2]), *(group.sum(part) for (part,) in parts[2:])]
    all_rows, all_errors, left, along = (values.cpu() for values in merged)
    order = np.argsort(all_rows.numpy(), kind="stable")
    found = all_rows.numpy()[order]
    mse, difference = all_errors.numpy()[order].T
    snr = np.asarray(feed.store.column("snr", found), np.float64)
    unit = "flux scaled to [0, 1]" if scaled else "flux as prepared"
    total, squares, count = along.numpy()
    return Accuracy(found, mse, difference, snr, float(left), total, squares, count, unit)


def _errors(model: nn.Module, last: nn.Module, feed: Feed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give rows [n], errors [n, 2], sum of squared residuals [1] and sums by pixel [3, pixels] of a feed's spectra."""
    model.eval()
    pixels = feed.store.grid.pixels
    along = torch.zeros(3, pixels, dtype=torch.float64)
    left = torch.zeros(1, dtype=torch.float64)
    rows, errors = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, 2, dtype=torch.float64)]
    for part, (flux, ivar, redshift) in feed.in_order(feed.validation):
        residual = (flux - model(flux, ivar, redshift)[0]).double()
        flux = flux.double()
        if isinstance(last, ConvolutionalAutoencoder):
            flux, factor = (tensor.double() for tensor in last.scaled(flux.float(), ivar)[:2])
            residual = residual / factor[:, None]
        good = within_reach(model, ivar, redshift) > 0
        residual, flux = (torch.where(good, values, 0.0) for values in (residual, flux))
        count = good.sum(dim=1).clamp_min(1)
        rows.append(torch.from_numpy(part))
        mean = torch.stack([residual.square().sum(dim=1) / count, residual.sum(dim=1) / count], dim=1)
        errors.append(mean.cpu())
        left += residual.square().sum().cpu()
        along += torch.stack([flux.sum(dim=0), flux.square().sum(dim=0), good.sum(dim=0).double()]).cpu()
    return torch.cat(rows), torch.cat(errors), left, along


def as_text(table: Mapping[str, Any]) -> str:
    """Set the table in columns for a terminal."""
    if not table.get("spectra"):
        return "no spectrum was kept for validation"
    lines = [f"errors of {table['spectra']} validation spectra, {table['unit']}; R² {table['r2']:.4f}"]
    lines.append(f"{'':6}{'MSE':>12}{'RMSE':>12}{'mean diff':>12}")
    for name in TABLE_ROWS:
        values = table["statistics"][name]
        lines.append(f"{name:6}" + "".join(f"{values[key]:12.3g}" for key in ("mse", "rmse", "difference")))
    for part in table["snr_bins"]:
        lines.append(f"S/N {part['from']:.1f} to {part['to']:.1f}: mean RMSE {part['rmse']:.4g} of {part['spectra']}")
    return "\n".join(lines)
