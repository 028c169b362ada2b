"""What an explanation costs: LIME beside the `lime` package, Inverse Multiscale Occlusion beside its Algorithm 1.

Run by hand: `python tests/bench/explain_rate.py`; README.md here says what is measured.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from jaxtyping import Float32
from lime import lime_image
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from distspec import models
from distspec.config import RECONSTRUCTION, Dense, Imo, Lime, Scale, Score, Sliced, Uniform, Variational
from distspec.detectors.explainable import Explainable
from distspec.detectors.neural.reconstruction import reconstruction_scores
from distspec.detectors.neural.scores import DENSITY, ModelScores
from distspec.explainers import Explanation
from distspec.explainers.lime import LimeExplainer
from distspec.explainers.occlusion import ImoExplainer
from distspec.explainers.perturbations import perturb
from distspec.models.checkpoint import Checkpoint
from distspec.models.flows.density import LatentDensity
from distspec.models.flows.sliced import Sample, fit_sliced
from distspec.spectra import Spectra, WaveGrid
from tests.bench.score_throughput import commit, cpu_model

EIGHT = tuple(name for name in RECONSTRUCTION if name != "chi2")
RANK, NOISE, SEED = 12, 0.1, 0

SEGMENTS, SAMPLES, PIXELS = 150, 5_000, 3_773
"""Of Ortiz & Boquien; the pixels that remain are the 151st segment."""

PAE_PIXELS = 1_000
"""Of Böhm, Kim & Juneau."""

TOGETHER = {"mse": 8, "eight scores": 4, "mse, general": 2}
"""Spectra of a turn; what is fast is timed over more of them."""

Flux = Float32[np.ndarray, "pixels"]
Weights = Float32[np.ndarray, "k regions"]


@dataclass(frozen=True)
class Clock:
    """Seconds of one thread; on a GPU those of the wall, since the processor waits there."""

    device: str

    def __call__(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Time a call whose result is in the processor's memory."""
        now = time.process_time if self.device == "cpu" else time.perf_counter
        begun = now()
        result = call()
        return now() - begun, result


# --- spectra and models -----------------------------------------------------------------------------------------------


def simulated(pixels: int, rows: int, key: int = 1) -> Spectra:
    """Smooth components and noise about a flux of 1. No pixel is masked: the alternatives know no masks."""
    generator = np.random.default_rng(key)
    phases = np.outer(np.arange(1, RANK + 1), np.linspace(0, np.pi, pixels)) + np.arange(RANK)[:, None]
    shapes = np.sin(phases) / np.arange(1, RANK + 1)[:, None]
    flux = 1 + 0.2 * generator.normal(size=(rows, RANK)) @ shapes + NOISE * generator.normal(size=(rows, pixels))
    grid = WaveGrid.between("linear", 3698.0, 7500.0, pixels)
    ivar = np.full((rows, pixels), NOISE**-2, np.float32)
    return Spectra(np.arange(rows), flux.astype(np.float32), ivar, grid)


def vae(pixels: int, device: str) -> ModelScores:
    """The network of Ortiz & Boquien with random weights: its speed does not depend on them."""
    return scores_of(Variational(hidden=(256, 128, 64), latents=12), simulated(pixels, 200), device)


@lru_cache(maxsize=1)
def pae(pixels: int, latents: int, device: str) -> ModelScores:
    """The network of Böhm, Kim & Juneau, and a flow of so many of its latents, a fifth more for validation; 0: none."""
    return scores_of(
        Dense(hidden=(800, 590), latents=10), simulated(pixels, max(latents + latents // 5, 200)), device, latents
    )


def scores_of(settings: Any, spectra: Spectra, device: str, training: int = 0) -> ModelScores:
    torch.manual_seed(SEED)
    model: Any = models.build(settings, spectra.grid)
    model.settle(torch.from_numpy(spectra.flux.mean(axis=0)))
    model.eval()
    density = None
    if training:
        with torch.no_grad():
            latents = model.encode(torch.from_numpy(spectra.flux), torch.from_numpy(spectra.ivar))
        first, rest = (
            Sample(part, torch.zeros(len(part), dtype=torch.long), torch.arange(len(part)))
            for part in (latents[:training], latents[training:])
        )
        density = LatentDensity(fit_sliced(Sliced(), first, rest, 1, SEED), ("all",)).eval()
    return ModelScores(Checkpoint(model, settings, spectra.grid, "bench", density=density), Score(), device)


def lime_of(grid: WaveGrid, samples: int = SAMPLES) -> LimeExplainer:
    settings = Lime(segments=Uniform(count=SEGMENTS), samples=samples, perturbation=Scale(factor=0.9))
    return LimeExplainer(settings, grid, SEED)


# --- LIME -------------------------------------------------------------------------------------------------------------


def package(names: Sequence[str], ours: LimeExplainer, model: ModelScores, one: Spectra, samples: int) -> Weights:
    """Explain one spectrum by the `lime` package, called as the public code of Ortiz & Boquien calls it.

    The spectrum is a picture of one line in three equal colours, and the perturbed one its hidden colour.
    """
    other = perturb(one, ours.segment_of, ours.settings.perturbation, ours.settings.smoothing)
    image, hidden = (np.repeat(flux[:, :, None], 3, axis=2) for flux in (one.flux, other))
    device = next(model.model.parameters()).device
    ivar = torch.from_numpy(one.ivar).to(device)
    away = model.away(one)

    @torch.no_grad()
    def classify(images: np.ndarray) -> np.ndarray:
        flux = torch.from_numpy(np.ascontiguousarray(images[:, 0, :, 0])).to(device)
        made = model.model(flux, ivar.expand_as(flux))[0]
        if len(names) == 1:
            found = (flux - made).square().sum(dim=1, keepdim=True).sqrt()
        else:
            found = reconstruction_scores(flux, ivar.expand_as(flux), made, away, model.settings)[:, : len(names)]
        return np.asarray(found.cpu())

    with patch.object(lime_image, "tqdm", iter):
        explainer = lime_image.LimeImageExplainer(random_state=SEED)
        told = explainer.explain_instance(
            image,
            classify,
            labels=range(len(names)),
            top_labels=None,
            hide_color=hidden,
            num_features=10_000,
            num_samples=samples,
            batch_size=100,
            segmentation_fn=lambda _: ours.segment_of[None],
            random_seed=SEED,  # else it draws one, and the masks are others
        )
    weights = np.zeros((len(names), ours.regions), np.float32)
    for label, pairs in told.local_exp.items():
        for segment, weight in pairs:
            weights[label, segment] = weight
    return weights


def lime_rates(options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Time the package and ours in turns, on the same spectra."""
    model = vae(PIXELS, options.device)
    spectra = simulated(PIXELS, max(options.turns, *TOGETHER.values()), key=2)
    explainer = lime_of(spectra.grid)
    forms = {
        "mse": Explainable(("mse",), model),
        "eight scores": Explainable(EIGHT, model),
        "mse, general": Explainable(("mse",), model, exact=False),
    }
    once = clock(lambda: explainer._surrogate(SEGMENTS + 1, SAMPLES))[0]
    for form in forms.values():
        explainer.explain(form, spectra[:1])
    package(("mse",), explainer, model, spectra[:1], 200)
    theirs = {"package, mse": ("mse",), "package, eight labels": EIGHT}
    seconds: dict[str, list[float]] = {name: [] for name in (*theirs, *forms)}
    agreement: dict[str, list[tuple[float, float]]] = {name: [] for name in theirs}
    for turn in range(options.turns):
        one = spectra[[turn]]
        weights = {}
        for name, asked in theirs.items():
            took, weights[name] = clock(partial(package, asked, explainer, model, one, SAMPLES))
            seconds[name].append(took)
        for name, form in forms.items():
            some = spectra[np.roll(np.arange(len(spectra)), -turn)[: TOGETHER[name]]]
            took, found = clock(partial(explainer.explain, form, some))
            seconds[name].append(took / len(some))
            weights[name] = found.weights[0]
        for name, ours in zip(theirs, ("mse", "eight scores"), strict=True):
            agreement[name] += map(compared, weights[name], weights[ours])
    print(f"\nLIME: {SEGMENTS + 1} segments of {PIXELS} pixels, {SAMPLES} samples, network 256-128-64-12")
    table(seconds, {"package, mse": "to package, mse", "package, eight labels": "to package, eight labels"})
    print(f"the surrogate, made once: {once:.2f} s")
    for name, pairs in agreement.items():
        told(f"weights of {name}, and ours", pairs)
    return {"seconds": seconds, "surrogate_seconds": once, "agreement": agreement}


def compared(expected: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Give the correlation of weights, and their largest difference in units of the heaviest."""
    correlation = float(np.corrcoef(expected.ravel(), found.ravel())[0, 1])
    return correlation, float(np.abs(expected - found).max() / np.abs(expected).max())


def told(of: str, pairs: list[tuple[float, float]]) -> None:
    """Print the worst of what `compared` gave."""
    correlation, difference = min(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
    print(f"{of}: correlation {correlation:.7f}, largest difference {difference:.1e} of the heaviest", flush=True)


def table(seconds: dict[str, list[float]], beside: dict[str, str]) -> None:
    """Print medians over turns, and ratios to what stands beside as medians of those within a turn."""
    print(f"{'':26}{'s/explanation':>14}{'per second':>12}" + "".join(f"{name:>30}" for name in beside.values()))
    for name, each in seconds.items():
        middle = statistics.median(each)
        print(f"{name:26}{middle:>14.4f}{1 / middle:>12.3f}", end="")
        for other in beside:
            ratios = [theirs / own for theirs, own in zip(seconds[other], each, strict=True)]
            told = f"{statistics.median(ratios):.1f} ({', '.join(f'{ratio:.1f}' for ratio in ratios)})"
            print(f"{told:>30}", end="")
        print()


# --- Inverse Multiscale Occlusion -------------------------------------------------------------------------------------


class Algorithm1:
    """Algorithm 1 of Shen & Melchior as written: one spectrum in a pass, one pass for each chunk."""

    def __init__(self, model: ModelScores, name: str, like: Spectra) -> None:
        self._model, self._name = model, name
        self._device = next(model.model.parameters()).device
        self._ivar = torch.from_numpy(like.ivar).to(self._device)

    @torch.no_grad()
    def score(self, flux: Flux) -> float:
        network: Any = self._model.model
        given = torch.from_numpy(flux[None]).to(self._device)
        if self._name == DENSITY:
            assert self._model.density is not None
            return -float(self._model.density.log_prob(network.encode(given, self._ivar))[0])
        made = network(given, self._ivar)[0]
        return float(((given - made).square() * self._ivar).sum() / given.shape[1])

    def chunk(self, x: Flux, R_j: Flux, p_j: float, start: int, window: int) -> float:
        """Give T_j of one chunk."""
        y = R_j.copy()
        stop = min(start + window, len(y))
        y[start:stop] = x[start:stop]
        return (self.score(y) - p_j) / (stop - start)


class Occluding:
    """One score of some spectra, explained by Algorithm 1 and by ours."""

    def __init__(self, name: str, model: ModelScores, spectra: Spectra, chunks: int) -> None:
        self.forms = {name: Explainable((name,), model), f"{name}, general": Explainable((name,), model, exact=False)}
        self._name, self._model, self._spectra = name, model, spectra
        settings = Imo()
        self._ours = ImoExplainer(settings, spectra.grid)
        pixels = spectra.grid.pixels
        starts = [np.arange(0, pixels, window) for window in settings.windows]
        self._starts = np.concatenate(starts)
        self._windows = np.repeat(settings.windows, [len(each) for each in starts])
        self.total = settings.baselines * len(self._starts)
        self._drawn = np.random.default_rng(SEED).choice(self.total, min(chunks, self.total), replace=False)
        self._near = spectra[np.arange(len(spectra) - settings.baselines, len(spectra))]

    def plain(self, turn: int, clock: Clock) -> tuple[float, tuple[float, float]]:
        """Give seconds of Algorithm 1, all its chunks, and how well those that were made agree with ours."""
        one, ours = self._spectra[[turn]], self.forms[self._name]
        R = ours.ordinary(self._near, one)
        algorithm = Algorithm1(self._model, self._name, one)
        fixed, p = clock(lambda: [algorithm.score(row) for row in R])
        j, which = np.divmod(self._drawn, len(self._starts))
        places = list(zip(j, self._starts[which], self._windows[which], strict=True))
        some, T = clock(lambda: [algorithm.chunk(one.flux[0], R[j], p[j], *place) for j, *place in places])
        mixture = self._ours.mixture(one, R)
        change = ours.versions(mixture)(0, mixture.versions)[j, which, 0] - np.array(p)[j]
        length = np.minimum(self._windows, one.grid.pixels - self._starts)[which]
        return fixed + some * self.total / len(places), compared(np.array(T), change / length)

    def explain(self, turn: int, form: str) -> Explanation:
        return self._ours.explain(self.forms[form], self._spectra[[turn]], [self._near])


def imo_rates(options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Time Algorithm 1 on some chunks, and ours on whole spectra, in turns."""
    model = pae(PAE_PIXELS, options.latents, options.device)
    assert model.density is not None
    spectra = simulated(PAE_PIXELS, options.turns + Imo().baselines, key=3)
    print(f"\nIMO: windows {Imo().windows} of {PAE_PIXELS} pixels, {Imo().baselines} baselines; network 800-590-10, ")
    print(f"sliced flow of {model.density.flow.shape['layers']} layers on {options.latents:,} latents")
    report: dict[str, Any] = {"drawn": options.chunks}
    for name in (DENSITY, "chi2"):
        occluding = Occluding(name, model, spectra, options.chunks)
        plain = f"{name}, Algorithm 1"
        seconds: dict[str, list[float]] = {form: [] for form in (plain, *occluding.forms)}
        of_chunks: list[tuple[float, float]] = []
        of_paths: list[tuple[float, float]] = []
        occluding.explain(0, name)
        for turn in range(options.turns):
            took, pair = occluding.plain(turn, clock)
            seconds[plain].append(took)
            of_chunks.append(pair)
            found = []
            for form in occluding.forms:
                took, explanation = clock(partial(occluding.explain, turn, form))
                seconds[form].append(took)
                found.append(explanation.more["windows"][0, 0])
            of_paths += map(compared, found[1], found[0])
        if name == DENSITY:
            print(
                f"Algorithm 1 makes {options.chunks} of {occluding.total:,} chunks, drawn from all windows and ", end=""
            )
            print("baselines; its seconds are scaled to all of them")
        table(seconds, {plain: f"to {plain}"})
        told("chunks of Algorithm 1, and ours", of_chunks)
        told("IMO_W of the general path, and ours", of_paths)
        report[name] = {"chunks": occluding.total, "seconds": seconds, "chunk": of_chunks, "path": of_paths}
    return report


# --- growth and memory ------------------------------------------------------------------------------------------------


def growth(options: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """Time a spectrum's explanation while one number grows and the others stay."""
    print(f"\n{'s/explanation as it grows':31}{'size':>10}{'':10}{'s':>9}  slope")
    device, rows = options.device, []

    def lime(names: tuple[str, ...], spectra: int = 0, pixels: int = PIXELS, samples: int = SAMPLES) -> float:
        some = simulated(pixels, spectra or (8 if len(names) == 1 else 2))
        explainer, scores = lime_of(some.grid, samples), Explainable(names, vae(pixels, device))
        explainer.explain(scores, some[:1])
        return clock(lambda: explainer.explain(scores, some))[0] / len(some)

    def imo(name: str, pixels: int = PAE_PIXELS, spectra: int = 2) -> float:
        model = pae(pixels, options.latents if name == DENSITY else 0, device)
        some = simulated(pixels, spectra + Imo().baselines, key=3)
        near, some = some[np.arange(Imo().baselines)], some[np.arange(Imo().baselines, len(some))]
        explainer, scores = ImoExplainer(Imo(), some.grid), Explainable((name,), model)
        explainer.explain(scores, some[:1], [near])
        return clock(lambda: explainer.explain(scores, some, [near] * len(some)))[0] / len(some)

    for form, names in {"LIME mse": ("mse",), "LIME eight scores": EIGHT}.items():
        ask = partial(lime, names)
        rows += [scaled(form, ask, "spectra", options.counts), scaled(form, ask, "pixels", options.sizes)]
        rows += [scaled(form, ask, "samples", options.samples)]
    for name in (DENSITY, "chi2"):
        form, ask = f"IMO {name}", partial(imo, name)
        rows += [scaled(form, ask, "spectra", options.counts), scaled(form, ask, "pixels", options.sizes)]
    return rows


def scaled(name: str, seconds_of: Callable[..., float], of: str, sizes: list[int]) -> dict[str, Any]:
    """Time all sizes, print them, and give the slope of log seconds against log size."""
    seconds = [seconds_of(**{of: n}) for n in sizes]
    slope = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0]) if len(sizes) > 1 else float("nan")
    for place, (n, took) in enumerate(zip(sizes, seconds, strict=True)):
        print(f"{'' if place else name:30}{n:>12,} {'' if place else of:8}{took:>10.4f}", end="")
        print(f"  {slope:.3f}" if n == sizes[-1] else "", flush=True)
    return {"name": name, "of": of, "sizes": sizes, "seconds": seconds, "slope": slope}


def peak(names: tuple[str, ...], count: int, device: str) -> dict[str, float]:
    """Give resident memory before some spectra are explained and the largest meanwhile, GB. Has a process to itself."""
    torch.set_num_threads(1)
    process, done, seen = psutil.Process(), threading.Event(), [0]
    with threadpool_limits(1):
        scores, spectra = Explainable(names, vae(PIXELS, device)), simulated(PIXELS, count)
        before = process.memory_info().rss

        def watch() -> None:
            while not done.wait(0.002):
                seen.append(process.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            lime_of(spectra.grid).explain(scores, spectra)
        finally:
            done.set()
            watcher.join()
    found = {"before": before / 1e9, "peak": max(seen) / 1e9}
    return found if device == "cpu" else {**found, "gpu": torch.cuda.max_memory_allocated() / 1e9}


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    print(f"\n{'resident memory, GB':30}{'spectra':>10}{'before':>10}{'peak':>10}")
    for form, names in {"LIME mse": ("mse",), "LIME eight scores": EIGHT}.items():
        for count in (4, 64):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(peak, names, count, options.device).result()
            rows.append({"name": form, "spectra": count, **found})
            print(f"{form:30}{count:>10}" + "".join(f"{value:>10.2f}" for value in found.values()), flush=True)
    return rows


# --- the run ----------------------------------------------------------------------------------------------------------


def main() -> None:
    """Take the figures that are asked for and print them as they come."""
    options = parse()
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"no {options.device} device here: nothing is measured")
    torch.set_num_threads(1)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    report: dict[str, Any] = {"date": date, "commit": commit(), "cpu": cpu_model(), "cores": os.cpu_count()}
    report |= {"device": options.device, "torch": torch.__version__, "load": [os.getloadavg()[0]]}
    on = "seconds of one thread" if options.device == "cpu" else f"wall seconds, {torch.cuda.get_device_name()}"
    print(f"{date}  commit {report['commit']}  {report['cpu']}, {report['cores']} cores, ", end="")
    print(f"load {report['load'][0]:.1f}, torch {torch.__version__}; {on}")
    clock = Clock(options.device)
    parts: dict[str, Callable[[], Any]] = {
        "lime": lambda: lime_rates(options, clock),
        "imo": lambda: imo_rates(options, clock),
        "growth": lambda: growth(options, clock),
        "memory": lambda: memory(options),
    }
    with threadpool_limits(1):
        for name in options.parts:
            report[name] = parts[name]()
    report["load"].append(os.getloadavg()[0])
    print(f"load at the end {report['load'][1]:.1f}")
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("lime", "imo", "growth", "memory")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what is measured")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--turns", type=int, default=3, help="ratios are taken within a turn")
    parser.add_argument("--chunks", type=int, default=300, help="on which Algorithm 1 is timed")
    parser.add_argument("--latents", type=int, default=5_000, help="to which the flow is fitted")
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 16, 64], help="growth: spectra")
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1_000, 2_000, 4_000], help="growth: pixels")
    parser.add_argument("--samples", type=int, nargs="+", default=[500, 1_000, 2_000, 5_000], help="growth: samples")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
