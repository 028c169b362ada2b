"""The sliced flow: what binning saves, how fast it fits and scores, and what likelihood it reaches beside zuko's NSF.

Run by hand: `python tests/bench/sliced_flow.py`; `--likelihood 1000 100000` adds the comparison, some minutes for each.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import zuko
from torch import Tensor

from distspec.config import Sliced
from distspec.models.flows import marginals, sliced
from distspec.models.flows.components import find_components
from distspec.models.flows.density import Labelled, LatentDensity, fit_classes
from distspec.models.flows.marginals import Marginal, fit_splines
from distspec.models.flows.sliced import Sample, fit_sliced
from distspec.models.flows.spline import spline_forward
from distspec.models.training.group import ALONE

ROWS, DIMENSIONS = 209_462, 10
"""Of the sample of Böhm, Kim & Juneau."""


def main() -> None:
    """Take the figures and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--exact", type=int, default=1, help="turns of the exact kernel estimates; they are slow")
    parser.add_argument("--likelihood", type=int, nargs="*", default=[], help="training rows of the comparison")
    parser.add_argument("--seconds", type=float, default=600.0, help="of the NSF's training, at most")
    parser.add_argument("--regularization", type=float, nargs=2, help="instead of the default")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg(), "threads": options.threads},
        "torch": torch.__version__,
    }
    report |= speed(options)
    report["likelihood"] = [likelihood(n, options) for n in options.likelihood]
    print(json.dumps(report, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


# --- speed ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Time one layer with histograms and with raw samples, and the density of a flow of 50 layers."""
    latents, _ = mixture(options.rows, 1)
    training, validation = sample(latents), sample(mixture(2_000, 2)[0])
    fit = sliced._Fit(Sliced(), training, validation, 1, 0, ALONE)
    fit.training.begin(fit._whitening())
    A = torch.linalg.qr(torch.randn(DIMENSIONS, fit.K, dtype=torch.float64)).Q
    projections = A.T @ fit.training.x
    rules = fit.rules[0]

    def binned() -> Any:
        return fit_splines(fit._marginals(projections)[0], rules)

    def exact() -> Any:
        return fit_splines(raw(projections), rules)

    names = ("binned", "exact", "full", "layer", "layer with exact", "layer with full", "apply")
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.repeat):
        seconds, near = timed(binned)
        times["binned"].append(seconds)
        seconds, (layer, _) = timed(lambda: fit._layer(0))
        times["layer"].append(seconds)
        seconds, _ = timed(lambda layer=layer: fit.training.apply(*layer))
        times["apply"].append(seconds)
    for _ in range(options.exact):
        seconds, far = timed(exact)
        times["exact"].append(seconds)
        times["layer with exact"].append(timed(lambda: raw_layer(fit))[0])
        with patch.object(marginals, "kernel_distribution", full_sum):
            times["full"].append(timed(exact)[0])
            times["layer with full"].append(timed(lambda: raw_layer(fit))[0])
    part = projections[:, :: max(options.rows // 20_000, 1)]
    difference = (spline_forward(part, near)[0] - spline_forward(part, far)[0]).abs().max()
    median = {name: statistics.median(values) for name, values in times.items()}
    layers = ("layer", "layer with exact", "layer with full")
    whole, windowed, full = (median[name] + median["apply"] for name in layers)
    flow = fit_sliced(Sliced(layers=50, patience=50), sample(latents[:20_000]), sample(latents[:2_000]), 1, 0)
    rows = latents[:100_000]
    rates = [len(rows) / timed(lambda: flow.log_prob(rows))[0] for _ in range(options.repeat)]
    return {
        "cpu_seconds": median,
        "ratio_marginals_exact_over_binned": median["exact"] / median["binned"],
        "ratio_marginals_full_over_binned": median["full"] / median["binned"],
        "ratio_layer_exact_over_binned": windowed / whole,
        "ratio_layer_full_over_binned": full / whole,
        "largest_difference_of_maps": float(difference),
        "layers_per_cpu_second": 1 / whole,
        "log_prob_layers": flow.shape["layers"],
        "log_prob_rows_per_cpu_second": statistics.median(rates),
    }


def raw(projections: Tensor) -> Marginal:
    """Every projection is a node: the kernel estimate without bins."""
    n = projections.shape[1]
    return Marginal.of(projections, torch.full_like(projections, 1 / n), projections.std(dim=1), float(n))


def raw_layer(fit: Any) -> Any:
    """Fit a layer without bins."""
    with patch.object(sliced._Fit, "_marginals", lambda self, values: [raw(values)]):
        return fit._layer(0)


def full_sum(marginal: Marginal, points: Tensor, width: Tensor) -> Tensor:
    """Sum the kernels of all samples at every point, as the public code does: n times M of them for each axis."""
    step = max(2**18 // marginal.nodes.shape[1], 1)
    axes = []
    for nodes, masses, at, h in zip(marginal.nodes, marginal.masses, points, width, strict=True):
        axes.append(torch.cat([torch.special.ndtr((part[:, None] - nodes) / h) @ masses for part in at.split(step)]))
    return torch.stack(axes)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Time a call in seconds of the processor, summed over threads: other loads on the machine matter less."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def sample(latents: Tensor) -> Sample:
    rows = torch.arange(len(latents))
    return Sample(latents, torch.zeros_like(rows), rows)


# --- likelihood -------------------------------------------------------------------------------------------------------


def mixture(count: int, seed: int, parts: int = 6) -> tuple[Tensor, Tensor]:
    """Draw from six correlated Gaussians, three of them bent without change of volume; give log p, too."""
    fixed = torch.Generator().manual_seed(7)
    D = DIMENSIONS
    share = torch.rand(parts, generator=fixed, dtype=torch.float64) + 0.2
    share /= share.sum()
    means = 2 * torch.randn(parts, D, generator=fixed, dtype=torch.float64)
    turns = torch.linalg.qr(torch.randn(parts, D, D, generator=fixed, dtype=torch.float64)).Q
    scales = 10 ** (1.3 * torch.rand(parts, D, generator=fixed, dtype=torch.float64) - 1)
    generator = torch.Generator().manual_seed(seed)
    which = torch.multinomial(share, count, replacement=True, generator=generator)
    normal = torch.randn(count, D, generator=generator, dtype=torch.float64)
    z = torch.empty_like(normal)
    for part in range(parts):
        mine = which == part
        z[mine] = bend(normal[mine], part, 1) * scales[part] @ turns[part].T + means[part]
    logs = [
        share[part].log()
        - 0.5 * bend((z - means[part]) @ turns[part] / scales[part], part, -1).square().sum(dim=1)
        - scales[part].log().sum()
        for part in range(parts)
    ]
    return z, torch.stack(logs).logsumexp(dim=0) - 0.5 * D * math.log(2 * math.pi)


def bend(rows: Tensor, part: int, sign: int) -> Tensor:
    rows = rows.clone()
    if part % 2:
        rows[:, 1] += sign * 0.8 * (rows[:, 0].square() - 1)
        rows[:, 3] += sign * (2 * rows[:, 2]).sin()
    return rows


def likelihood(n: int, options: argparse.Namespace) -> dict[str, Any]:
    """Mean log p of 50,000 new rows under both models, the truth, and a Gaussian."""
    training, validation = mixture(n, 1)[0], mixture(max(n // 10, 200), 2)[0]
    test, truth = mixture(50_000, 3)
    covariance = torch.cov(training.T)
    normal = torch.distributions.MultivariateNormal(training.mean(dim=0), covariance)
    settings = Sliced() if options.regularization is None else Sliced(regularization=options.regularization)
    seconds, density = timed(lambda: ours(settings, training, validation))
    spent, theirs = timed(lambda: neural(training, validation, test, options.seconds))
    return {
        "training_rows": n,
        "truth": float(truth.mean()),
        "gaussian": float(normal.log_prob(test).mean()),
        "sliced": float(density.log_prob(test).mean()),
        "sliced_components": len(density.names),
        "sliced_layers": density.flow.shape["layers"],
        "sliced_cpu_seconds": seconds,
        "nsf": theirs,
        "nsf_cpu_seconds": spent,
    }


def ours(settings: Sliced, training: Tensor, validation: Tensor) -> LatentDensity:
    """Fit the density of latents without labels, as the train stage does."""
    rows, judges = torch.arange(len(training)), torch.arange(len(validation))
    first, held, count = find_components(training, validation, rows, settings.components, 0)

    def fit(labels: Tensor, judged: Tensor, _: str) -> Any:
        return fit_sliced(settings, Sample(training, labels, rows), Sample(validation, judged, judges), count, 0)

    parts = Labelled(training, first), Labelled(validation, held)
    return fit_classes(fit, *parts, [str(number) for number in range(count)], relabel=False)[0]


def neural(training: Tensor, validation: Tensor, test: Tensor, budget: float) -> float:
    """Train zuko's NSF on standardized rows, Adam with cosine decay, and keep the best by validation."""
    mean, scale = training.mean(dim=0), training.std(dim=0)
    rows, judged, asked = (((part - mean) / scale).float() for part in (training, validation, test))
    torch.manual_seed(0)
    flow = zuko.flows.NSF(DIMENSIONS, transforms=5, hidden_features=(128, 128), bins=8)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    start, best, state, waited = time.process_time(), -math.inf, flow.state_dict(), 0
    while waited < 30 and time.process_time() - start < budget:
        for index in torch.randperm(len(rows)).split(512 if len(rows) > 5_000 else 128):
            used = min((time.process_time() - start) / budget, 1)
            optimizer.param_groups[0]["lr"] = 1e-6 + 5e-4 * (1 + math.cos(math.pi * used))
            loss = -flow().log_prob(rows[index]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
            optimizer.step()
        value = mean_of(flow, judged)
        waited += 1
        if value > best:
            best, waited = value, 0
            state = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    flow.load_state_dict(state)
    return mean_of(flow, asked) - float(scale.log().sum())


@torch.no_grad()
def mean_of(flow: Any, rows: Tensor) -> float:
    return float(torch.cat([flow().log_prob(part) for part in rows.split(5_000)]).double().mean())


if __name__ == "__main__":
    main()
