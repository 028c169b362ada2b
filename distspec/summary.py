"""What was run on what, in words: the texts of the report that describe data, model, training and density."""

from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, Final

from distspec import __version__
from distspec.config import Experiment, Prepare, Simulate
from distspec.models.checkpoint import Checkpoint
from distspec.sample import Statistics
from distspec.store import Layer, SpectraStore

__all__ = ["DensitySummary", "Phase", "phases", "summarize_density", "summary"]

_MOVES: Final = 10
"""Largest moves between classes that are told."""


def _plainly(value: Any) -> str:
    return "–".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _density_in_short(checkpoint: Checkpoint) -> str:
    """Say what density the latents have."""
    if checkpoint.density is None or checkpoint.density_settings is None:
        return "none"
    shape = checkpoint.density.flow.shape
    classes = f"{shape['classes']} classes" if shape["classes"] > 1 else "one class"
    layers = f", {shape['layers']} layers" if "layers" in shape else ""
    return f"{checkpoint.density_settings.kind} flow{layers}, {classes}"


def summary(
    experiment: Experiment, store: SpectraStore, checkpoint: Checkpoint, scores: Layer
) -> dict[str, list[tuple[str, str]]]:
    """Say in words what was run on what."""
    stages = "two-stage " if checkpoint.two_stage else ""
    parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    losses = [epoch["validation_loss"] for epoch in checkpoint.facts.get("phases", {}).get("first", [])]
    layout = ", ".join(f"{name} {_plainly(value)}" for name, value in checkpoint.settings if name != "kind")
    model = [
        ("Architecture", f"{stages}{checkpoint.settings.kind} autoencoder ({layout})"),
        ("Latents", str(checkpoint.latents)),
        ("Parameters", f"{parameters:,}"),
        ("Epochs trained", str(len(losses)) if losses else "unknown"),
        ("Best validation loss", f"{min(losses):.4f}" if losses else "unknown"),
        ("Density", _density_in_short(checkpoint)),
        ("Ranked by", experiment.report.score),
    ]
    made = [
        ("Store", store.digest),
        ("Recipe", store.recipe),
        ("Model", checkpoint.sha256[:12]),
        ("Scores", scores.name),
        ("Seed", str(experiment.seed)),
        ("distspec", __version__),
        *((package, metadata.version(package)) for package in ("torch", "numpy", "ray")),
        ("Written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    data = [
        ("Source", _source(experiment)),
        ("Spectra", f"{store.rows:,}"),
        *_recipe(experiment.ingest.prepare, store.statistics),
    ]
    return {"Data and recipe": data, "Model": model, "Provenance": made}


def _source(experiment: Experiment) -> str:
    source = experiment.ingest.source
    match source:
        case Simulate():
            share = f"{100 * source.anomalies:g} % with a planted anomaly"
            return f"simulated survey, seed {experiment.seed}; median S/N {source.snr:g}; {share}"
        case _:
            catalog = getattr(source, "catalog", None)
            return f"{source.kind}, {source.path}" + (f", catalogue {catalog}" if catalog else "")


def _recipe(prepare: Prepare, statistics: Statistics | None) -> list[tuple[str, str]]:
    """Say in words how the spectra were prepared."""
    grid, cuts, scale, dust = prepare.grid, prepare.cuts, prepare.normalize, prepare.dust
    limits = [f"coverage ≥ {100 * cuts.coverage_min:g} %"]
    if cuts.z_min is not None or cuts.z_max is not None:
        low, high = ("" if limit is None else f"{limit:g}" for limit in (cuts.z_min, cuts.z_max))
        limits.append(f"z in [{low or '−∞'}, {high or '∞'}]")
    limits += [f"S/N ≥ {cuts.snr_min:g}"] if cuts.snr_min else []
    limits += [f"total S/N ≥ {cuts.total_snr_min:g}"] if cuts.total_snr_min else []
    limits += [f"span ≥ {100 * cuts.span_min:g} %"] if cuts.span_min else []
    limits += [f"classes {', '.join(cuts.classes)}"] if cuts.classes else []
    limits += ["no redshift warning"] if cuts.zwarn else []
    limits += ["each id once"] if cuts.duplicates else []
    windows = ", ".join(f"{low:g}–{high:g} Å" for low, high in prepare.sky.windows)
    factors = {"wave": "around {:g} Å", "width": "width {:g} Å", "redshift": "at z = {:g}"}
    detail = [text.format(getattr(scale, key)) for key, text in factors.items() if hasattr(scale, key)]
    dusty = "none" if dust.kind == "none" else f"{dust.law}, E(B−V) from {dust.kind} × {dust.scale:g}"
    floor = "none" if prepare.max_pixel_snr is None else f"S/N ≤ {prepare.max_pixel_snr:g} per pixel"
    return [
        ("Frame", f"{prepare.frame} frame, vacuum"),
        ("Grid", f"{grid.scale}, {grid.first:g}–{grid.last:g} Å, {grid.pixels:,} pixels"),
        ("Normalization", ", ".join([scale.kind, *detail])),
        ("Sky", f"{prepare.sky.mode} {windows}" if prepare.sky.mode != "none" else "none"),
        ("Dust", dusty),
        ("Rebinning", prepare.rebin),
        ("Noise floor", floor),
        ("Sample", "nothing frozen" if statistics is None else repr(statistics)[len("Statistics(") : -1]),
        ("Cuts", "; ".join(limits)),
    ]


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """One fit of a training, as the report tells of it.

    Arguments:
        name: in the checkpoint's facts.
        heading: in plain words.
        caption: what its curves mean.
        epochs: their numbers.
    """

    name: str
    heading: str
    caption: str
    epochs: list[dict[str, float]]


def phases(checkpoint: Checkpoint) -> list[Phase]:
    """Describe the fits that a checkpoint holds a record of, in the order in which they were made."""
    known = {name: epochs for name, epochs in checkpoint.facts.get("phases", {}).items() if epochs}
    order = ("first", "second", "density", "relabelled")
    # A description is kept with sorted keys, so the order is told here.
    names = sorted(known, key=lambda name: order.index(name) if name in order else len(order))
    return [Phase(name, _heading(name, "second" in known), _caption(name, checkpoint), known[name]) for name in names]


def _heading(name: str, two_stage: bool) -> str:
    match name:
        case "first":
            return "First network" if two_stage else "Autoencoder"
        case "second":
            return "Second network"
        case "density":
            return "Density of the latents"
        case "relabelled":
            return "Density after relabelling"
        case _:
            return name


def _caption(name: str, checkpoint: Checkpoint) -> str:
    """Say what is fitted, and in which unit."""
    match name:
        case "first":
            loss = {
                "variational": "The loss weighs squared residuals, divergence and discrepancy of the latents.",
                "redshifted": "The loss is half of χ² per pixel, and in training what brings like spectra together.",
            }
            plain = "As χ² per unmasked pixel, 1 is a reconstruction as good as the noise allows."
            return "The loss after each epoch. " + loss.get(checkpoint.settings.kind, plain)
        case "second":
            return (
                "Begins with the first network's weights and learns what that makes of the spectra: denoised, without "
                "gaps. The loss after each epoch is the squared residual per pixel, in the unit of the store."
            )
        case "density":
            given = bool(checkpoint.density_settings and checkpoint.density_settings.labels)
            told = ", each spectrum in its class of the catalogue" if given else ""
            return f"{_fitted(checkpoint)}{told}."
        case "relabelled":
            return f"{_fitted(checkpoint)}, each spectrum in the class that makes its latents likeliest."
        case _:
            return ""


def _fitted(checkpoint: Checkpoint) -> str:
    if checkpoint.density_settings is not None and checkpoint.density_settings.kind == "spline":
        return "The mean of −log p of the latents (nats) after each epoch"
    return "The mean log p of the latents after each layer of the flow, and how far they are from a Gaussian still"


@dataclass(frozen=True)
class DensitySummary:
    """What the report tells of a density.

    Arguments:
        pairs: label and text.
        kind, plural: what its classes are: "class", or "component" where they were found in the latents.
        classes: name, members in the catalogue and as fitted, share of the first that left.
        relabelled: whether classes were given anew.
        shares: of training and validation spectra that changed class.
        moves: from, to, count: the largest.
    """

    pairs: list[tuple[str, str]]
    kind: str
    plural: str
    classes: list[tuple[str, int, int, float]]
    relabelled: bool
    shares: tuple[float, float]
    moves: list[tuple[str, str, int]]


def summarize_density(checkpoint: Checkpoint) -> DensitySummary | None:
    """Describe the density of a model; None where it has none."""
    settings, density = checkpoint.density_settings, checkpoint.density
    if settings is None or density is None:
        return None
    shape = density.flow.shape
    if settings.kind == "sliced":
        parts = f"{shape['layers']} layers of {shape['directions']} directions, {shape['knots']} knots"
    else:
        widths = " and ".join(map(str, settings.hidden))
        parts = f"{settings.transforms} transforms of {settings.bins} bins, networks of {widths} units"
    facts = checkpoint.facts.get("density", {})
    relabelled = "relabelled" in checkpoint.facts.get("phases", {})
    kind, plural = ("class", "classes") if settings.labels else ("component", "components")
    pairs = [("Flow", {"sliced": "sliced iterative", "spline": "neural spline"}[settings.kind]), ("Layers", parts)]
    pairs += [("Latents", str(checkpoint.latents))]
    if len(density.names) == 1:
        pairs += [("Classes", "one of all")]
    else:
        named = f", by {' and '.join(settings.labels)}" if settings.labels else ", found in the latents"
        pairs += [("Classes" if settings.labels else "Components", f"{len(density.names)}{named}")]
    rows = [(name, *_counts(facts, name)) for name in density.names] if len(density.names) > 1 and facts else []
    rows.sort(key=lambda row: (-row[2], -row[1], row[0]))
    moves = [(move["from"], move["to"], move["count"]) for move in facts.get("moves", [])[:_MOVES]]
    nothing = float("nan")
    shares = (facts.get("relabelled", nothing), facts.get("relabelled_validation", nothing))
    return DensitySummary(pairs, kind, plural, rows, relabelled, shares, moves)


def _counts(facts: dict[str, Any], name: str) -> tuple[int, int, float]:
    told = facts["classes"][name]
    return int(told["catalogue"]), int(told["fitted"]), float(told["relabelled"])
