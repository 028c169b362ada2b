"""What was run on what, in words: the texts of the report that describe data, model, training and density."""

from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from distspec import __version__
from distspec.config import Experiment
from distspec.models.checkpoint import Checkpoint
from distspec.stages.ingest.section import recipe_facts, source_facts
from distspec.store import Layer, SpectraStore

__all__ = ["summary"]


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
        ("Source", source_facts(experiment)),
        ("Spectra", f"{store.rows:,}"),
        *recipe_facts(experiment.ingest.prepare, store.statistics),
    ]
    return {"Data and recipe": data, "Model": model, "Provenance": made}
