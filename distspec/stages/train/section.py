"""Its part of the page: the model, how each of its fits went, and the density of its latents."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, PrintfTickFormatter
from jaxtyping import Float64

from distspec.models.checkpoint import Checkpoint
from distspec.results.figures.kit import COLORS, panel, stacked
from distspec.stages.stage import Section
from distspec.statistics.summaries import TABLE_ROWS

__all__ = ["sections"]


def sections(checkpoint: Checkpoint, ranked_by: str) -> Iterator[Section]:
    """Tell of the model.

    Arguments:
        checkpoint: the model.
        ranked_by: the score that spectra are ranked by.
    """
    model = {"title": "Model", "pairs": [*_model(checkpoint), ("Ranked by", ranked_by)]}
    yield Section("run", "What was run", "report/facts.html.jinja", model)
    trained = phases(checkpoint)
    shown = {"phases": trained, "accuracy": checkpoint.facts.get("accuracy"), "accuracy_rows": TABLE_ROWS}
    figures = {f"training-{phase.name}": training_figure(phase.epochs) for phase in trained}
    yield Section("training", "Training", "train/section.html.jinja", shown, figures)
    density = summarize_density(checkpoint)
    if density is not None:
        yield Section("density", "Density", "train/density.html.jinja", {"density": density})


def _model(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    stages = "two-stage " if checkpoint.two_stage else ""
    parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    losses = [epoch["validation_loss"] for epoch in checkpoint.facts.get("phases", {}).get("first", [])]
    layout = ", ".join(f"{name} {_plainly(value)}" for name, value in checkpoint.settings if name != "kind")
    return [
        ("Architecture", f"{stages}{checkpoint.settings.kind} autoencoder ({layout})"),
        ("Latents", str(checkpoint.latents)),
        ("Parameters", f"{parameters:,}"),
        ("Epochs trained", str(len(losses)) if losses else "unknown"),
        ("Best validation loss", f"{min(losses):.4f}" if losses else "unknown"),
        ("Density", _density_in_short(checkpoint)),
    ]


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


def training_figure(epochs: Sequence[Mapping[str, float]]) -> Any:
    """Draw the losses and the learning rate of each epoch; of a sliced flow log p and distances of each layer."""
    sliced = "train_log_prob" in epochs[0]
    measure, second = ("log_prob", "wasserstein_first") if sliced else ("loss", "learning_rate")
    source = ColumnDataSource(
        {
            "epoch": np.arange(1, len(epochs) + 1),
            "train": _numbers(epochs, f"train_{measure}"),
            "validation": _numbers(epochs, f"validation_{measure}"),
            "rate": _numbers(epochs, second),
        }
    )
    losses = np.concatenate([source.data["train"], source.data["validation"]])
    wide = 0 < 5 * np.nanmin(losses, initial=np.inf) < np.nanmax(losses, initial=1.0)
    step = "layer" if sliced else "epoch"
    label = "mean log p (nats)" if sliced else "loss"
    loss = panel(260, step, label, y_axis_type="log" if wide else "linear")
    for name, color in (("train", COLORS["count"]), ("validation", COLORS["reconstruction"])):
        line = loss.line("epoch", name, source=source, color=color, line_width=2, legend_label=name)
        loss.scatter("epoch", name, source=source, color=color, size=4)
    loss.add_tools(
        HoverTool(
            renderers=[line],
            mode="vline",
            tooltips=[(step, "@epoch"), ("train", "@train{0.0000}"), ("validation", "@validation{0.0000}")],
        )
    )
    loss.legend.location = "bottom_right" if sliced else "top_right"
    loss.legend.background_fill_alpha = 0.7
    loss.legend.border_line_alpha = 0
    loss.legend.label_text_font_size = "12px"
    tiny = np.nanmax(np.abs(losses), initial=0.0) < 0.05
    loss.yaxis[0].formatter = PrintfTickFormatter(format="%.2g") if tiny else NumeralTickFormatter(format="0.[000]")
    rate = panel(260, step, "largest distance to a Gaussian" if sliced else "learning rate", x_range=loss.x_range)
    rate.yaxis[0].formatter = PrintfTickFormatter(format="%.2g" if sliced else "%.1e")
    rate.line("epoch", "rate", source=source, color=COLORS["flux"], line_width=2)
    return stacked([[loss, rate]])


def _numbers(epochs: Sequence[Mapping[str, float]], key: str) -> Float64[np.ndarray, "n"]:
    return np.array([float(epoch.get(key, np.nan)) for epoch in epochs])


_MOVES: Final = 10
"""Largest moves between classes that are told."""


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
