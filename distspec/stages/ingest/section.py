"""Its part of the page: what was read, and how it was prepared, in words."""

from distspec.config import Experiment, Prepare, Simulate
from distspec.stages.stage import Job, Section
from distspec.store.frozen import Statistics

__all__ = ["section"]


def section(job: Job) -> Section:
    """Say where the spectra come from and what was done to them."""
    pairs = [
        ("Source", _source(job.experiment)),
        ("Spectra", f"{job.store.rows:,}"),
        *_recipe(job.experiment.ingest.prepare, job.store.statistics),
    ]
    shown = {"heading": "What was run on what", "title": "Data and recipe", "pairs": pairs}
    return Section("run", "What was run", "report/facts.html.jinja", shown)


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
