"""One experiment's settings: a tree of frozen, strictly checked values with defaults in code.

A TOML file states only what differs. Choices are unions told apart by `kind`. `digest` names results by the settings
that made them, so a new setting never overwrites an old result. The sentence under a setting says what it means, its
unit included; `distspec config --explain` prints it.

- `base`: what all settings share; names of scores.
- `experiment`: all settings of one experiment, and what must hold between them.
- `load`: TOML -> settings -> TOML; their differences and their digest.
- `reference`: what each setting means, may be and is by default, as text.
- `presets/`: recipes of papers and surveys.

- `fetch`: archives, and how gently they are asked.
- `ingest`: survey, recipe, store, value-added tables.
- `sources`: where spectra come from.
- `prepare`: the recipe: grid, sky, dust, norm, cuts, statistics of the sample.
- `train`: which network, on what machines.
- `models`: autoencoders, densities of their latents, how each is fitted.
- `tune`: trials of training, between which values.
- `score`: scores of residuals.
- `detect`: classical detectors.
- `compare`: lists of detectors, side by side.
- `explain`: explaining methods, segments, perturbations, ascents of the density.
- `cluster`: groups of explanations.
- `evaluate`: anomalies that are planted.
- `report`: how much the page shows.
- `export`: tables for other programs.
- `runtime`: Ray and MLflow.
"""

from distspec.config.base import (
    ENSEMBLES,
    METRICS,
    RECONSTRUCTION,
    ScoreName,
    Settings,
    Span,
    anchored,
    metric_scores,
)
from distspec.config.cluster import Cluster
from distspec.config.compare import Compare, Errors
from distspec.config.detect import AnyDetector, Detect, Fisher, Forest, Isolation, Pca
from distspec.config.evaluate import Evaluate
from distspec.config.experiment import Experiment
from distspec.config.explain import (
    Ablation,
    AnyMethod,
    AnyPerturbation,
    AnySegments,
    Ascent,
    ExpectedGradients,
    Explain,
    Flat,
    Gaussians,
    Gradient,
    GradientInput,
    Imo,
    IntegratedGradients,
    Lime,
    LineSegments,
    Occlusion,
    Reconstructed,
    SameShape,
    Scale,
    SegmentMean,
    Slic,
    Unchanged,
    Uniform,
)
from distspec.config.export import Export
from distspec.config.fetch import Fetch, FetchDesi, FetchSdss, FetchSparcl, Transfer
from distspec.config.ingest import Ingest, Values
from distspec.config.load import differences, digest, dump, load, load_fetch
from distspec.config.models import (
    AnyDensity,
    Architecture,
    Convolutional,
    Dense,
    Density,
    Fit,
    Redshifted,
    Sliced,
    Spline,
    Variational,
)
from distspec.config.prepare import (
    AtWavelength,
    Cuts,
    Distance,
    DustColumn,
    DustMap,
    Grid,
    Mean,
    Median,
    NoDust,
    NoScale,
    Prepare,
    Sample,
    Sky,
)
from distspec.config.presets import presets
from distspec.config.report import Report
from distspec.config.runtime import Needs, Runtime, Tracking
from distspec.config.score import Score
from distspec.config.sources import Condition, Desi, Lamost, Sdss, Simulate, Source, Specutils, Table, Wanted
from distspec.config.train import Second, Train
from distspec.config.tune import Tune

__all__ = [
    "ENSEMBLES",
    "METRICS",
    "RECONSTRUCTION",
    "Ablation",
    "AnyDensity",
    "AnyDetector",
    "AnyMethod",
    "AnyPerturbation",
    "AnySegments",
    "Architecture",
    "Ascent",
    "AtWavelength",
    "Cluster",
    "Compare",
    "Condition",
    "Convolutional",
    "Cuts",
    "Dense",
    "Density",
    "Desi",
    "Detect",
    "Distance",
    "DustColumn",
    "DustMap",
    "Errors",
    "Evaluate",
    "ExpectedGradients",
    "Experiment",
    "Explain",
    "Export",
    "Fetch",
    "FetchDesi",
    "FetchSdss",
    "FetchSparcl",
    "Fisher",
    "Fit",
    "Flat",
    "Forest",
    "Gaussians",
    "Gradient",
    "GradientInput",
    "Grid",
    "Imo",
    "Ingest",
    "IntegratedGradients",
    "Isolation",
    "Lamost",
    "Lime",
    "LineSegments",
    "Mean",
    "Median",
    "Needs",
    "NoDust",
    "NoScale",
    "Occlusion",
    "Pca",
    "Prepare",
    "Reconstructed",
    "Redshifted",
    "Report",
    "Runtime",
    "SameShape",
    "Sample",
    "Scale",
    "Score",
    "ScoreName",
    "Sdss",
    "Second",
    "SegmentMean",
    "Settings",
    "Simulate",
    "Sky",
    "Slic",
    "Sliced",
    "Source",
    "Span",
    "Specutils",
    "Spline",
    "Table",
    "Tracking",
    "Train",
    "Transfer",
    "Tune",
    "Unchanged",
    "Uniform",
    "Values",
    "Variational",
    "Wanted",
    "anchored",
    "differences",
    "digest",
    "dump",
    "load",
    "load_fetch",
    "metric_scores",
    "presets",
]
