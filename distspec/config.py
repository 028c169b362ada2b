"""One experiment's settings: a tree of frozen, strictly checked values with defaults in code.

A TOML file states only what differs. Choices are unions told apart by `kind`. `digest` names results by the settings
that made them, so a new setting never overwrites an old result.
"""

import difflib
import hashlib
import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distspec.errors import ConfigError

__all__ = [
    "AtWavelength",
    "Cuts",
    "Dense",
    "Desi",
    "Distance",
    "DustColumn",
    "DustMap",
    "Experiment",
    "Explain",
    "Grid",
    "Ingest",
    "Mean",
    "Median",
    "NoDust",
    "NoScale",
    "Prepare",
    "Report",
    "Runtime",
    "Score",
    "ScoreName",
    "Sdss",
    "Settings",
    "Simulate",
    "Sky",
    "Tracking",
    "Train",
    "digest",
    "dump",
    "load",
    "presets",
]

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
ScoreName = Literal[
    "mse",
    "mse_filtered",
    "mse_trimmed",
    "mse_filtered_trimmed",
    "relative",
    "relative_filtered",
    "relative_trimmed",
    "relative_filtered_trimmed",
    "chi2",
]
"""Scores of detectors/reconstruction.py: eight of Ortiz & Boquien, and the masked chi-squared per good pixel."""


class Settings(BaseModel):
    """Base of all settings classes: frozen, no unknown keys, no silent conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# --- ingest: where spectra come from -------------------------------------------------------------------------------


class Simulate(Settings):
    """A simulated survey with truth (sources/simulate.py)."""

    kind: Literal["simulate"] = "simulate"
    spectra: Count = 20_000
    galaxies: Fraction = 0.85
    quasars: Fraction = 0.08
    stars: Fraction = 0.07
    anomalies: Fraction = 0.01
    """Share of the spectra that carry a planted anomaly, all kinds in equal number."""
    z_max: Positive = 0.4
    """Largest galaxy redshift; quasars and stars have their own ranges."""
    snr: Positive = 20.0
    """Median over the survey of the median signal-to-noise ratio per observed pixel."""

    @model_validator(mode="after")
    def _shares(self) -> "Simulate":
        if abs(self.galaxies + self.quasars + self.stars - 1) > 1e-6:
            raise ValueError("galaxies + quasars + stars must be 1")
        return self


class Sdss(Settings):
    """SDSS, BOSS and eBOSS `spec` files, lite or full (sources/sdss.py)."""

    kind: Literal["sdss"] = "sdss"
    path: str
    """A file, or a folder that is searched for `*.fits` and `*.fits.gz`."""


class Desi(Settings):
    """DESI `coadd` files with their `redrock` files (sources/desi.py)."""

    kind: Literal["desi"] = "desi"
    path: str
    """A coadd file, or a folder that is searched for `coadd-*.fits` and `coadd-*.fits.gz`."""
    catalog: str | None = None
    """A FITS table with TARGETID and Z, for spectra that have no redrock file."""


Source = Annotated[Simulate | Sdss | Desi, Field(discriminator="kind")]


# --- ingest: the recipe (prepare.py) ---------------------------------------------------------------------------------


class Grid(Settings):
    """Wavelength grid of the store: first and last pixel centre, Å vacuum."""

    scale: Literal["log", "linear"] = "log"
    first: Positive = 3388.0
    last: Positive = 8318.0
    pixels: Annotated[int, Field(ge=16)] = 1000

    @model_validator(mode="after")
    def _order(self) -> "Grid":
        if self.last <= self.first:
            raise ValueError("last must be larger than first")
        return self


class Sky(Settings):
    """What to do with observed-frame windows that hold strong sky lines."""

    mode: Literal["mask", "patch", "none"] = "mask"
    """`patch` writes the mean of the two neighbouring windows over the flux, as Ortiz & Boquien do; it can copy a
    strong line into the window. `mask` sets ivar = 0."""
    windows: tuple[tuple[Positive, Positive], ...] = ((5565.0, 5590.0),)


class NoDust(Settings):
    """The flux is left as it is: already corrected, or not to be."""

    kind: Literal["none"] = "none"


class DustColumn(Settings):
    """Correct by the source's own E(B-V) column; a spectrum without a value is set aside."""

    kind: Literal["column"] = "column"
    scale: Positive = 0.86
    """Factor on the column: surveys give the SFD map's own value, to which 0.86 applies as for `DustMap`."""
    law: Literal["F99", "CCM89", "O94", "G23"] = "F99"
    r_v: Positive = 3.1


class DustMap(Settings):
    """Correct by the SFD dust map in a folder that the `dustmaps` package filled."""

    kind: Literal["sfd"] = "sfd"
    path: str
    scale: Positive = 0.86
    """Factor on the map's E(B-V); 0.86 is the recalibration of Schlafly & Finkbeiner (2011)."""
    law: Literal["F99", "CCM89", "O94", "G23"] = "F99"
    r_v: Positive = 3.1


class Median(Settings):
    """Divide each spectrum by the median of its good pixels."""

    kind: Literal["median"] = "median"


class Mean(Settings):
    """Divide each spectrum by the mean of its good pixels."""

    kind: Literal["mean"] = "mean"


class AtWavelength(Settings):
    """Divide each spectrum by its mean flux in a window around one wavelength."""

    kind: Literal["wavelength"] = "wavelength"
    wave: Positive
    width: Positive = 10.0


class Distance(Settings):
    """Scale the amplitude to a common luminosity distance in the Planck 2018 cosmology: f (D_L(z) / D_L(z0))²."""

    kind: Literal["distance"] = "distance"
    redshift: Positive = 0.1


class NoScale(Settings):
    """Keep the survey's flux unit."""

    kind: Literal["none"] = "none"


class Cuts(Settings):
    """Quality limits; a spectrum outside any of them keeps its row and is set aside."""

    z_min: float | None = None
    z_max: float | None = None
    snr_min: Annotated[float, Field(ge=0)] = 0.0
    """Smallest median signal-to-noise ratio per pixel of the grid."""
    total_snr_min: Annotated[float, Field(ge=0)] = 0.0
    """Smallest cumulative signal-to-noise ratio, sqrt(Σ (f/σ)²)."""
    coverage_min: Fraction = 0.6
    """Smallest share of good pixels on the grid."""
    zwarn: bool = True
    """Set aside what the redshift pipeline warns about."""


class Prepare(Settings):
    """The recipe that turns observed spectra into comparable ones."""

    frame: Literal["rest", "observed"] = "rest"
    grid: Grid = Grid()
    sky: Sky = Sky()
    dust: Annotated[NoDust | DustColumn | DustMap, Field(discriminator="kind")] = NoDust()
    normalize: Annotated[Median | Mean | AtWavelength | Distance | NoScale, Field(discriminator="kind")] = Median()
    flux_factor: bool = False
    """Multiply the rest-frame flux density by 1 + z; the papers do not."""
    max_pixel_snr: Positive | None = 50.0
    """Noise floor: σ is raised so that no pixel has a larger signal-to-noise ratio."""
    cuts: Cuts = Cuts()


class Ingest(Settings):
    """Survey files -> store (stages/ingest.py)."""

    source: Source = Simulate()
    prepare: Prepare = Prepare()
    shard_rows: Count = 16_384
    """Spectra in a shard, the unit of distributed work."""
    chunk_rows: Count = 1_024
    """Spectra in a compressed chunk inside a shard; must divide shard_rows."""

    @model_validator(mode="after")
    def _chunks(self) -> "Ingest":
        if self.shard_rows % self.chunk_rows:
            raise ValueError("chunk_rows must divide shard_rows")
        if self.source.kind != "simulate" and "dust" not in self.prepare.model_fields_set:
            raise ValueError("say how to correct Galactic extinction: prepare.dust.kind = 'column', 'sfd' or 'none'")
        return self


# --- train, score, explain, report -----------------------------------------------------------------------------------


class Dense(Settings):
    """Dense autoencoder (Böhm et al.): hidden layers of the encoder, mirrored in the decoder."""

    kind: Literal["dense"] = "dense"
    hidden: tuple[Count, ...] = (800, 590)
    latents: Count = 10
    activation: Literal["relu", "leaky_relu"] = "leaky_relu"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scale: Literal["unit", "mean"] = "unit"
    """What the centred flux is divided by before the first layer: 1, or the mean spectrum of the training set."""


class Train(Settings):
    """Store -> checkpoint and registered model (stages/train.py)."""

    model: Dense = Dense()
    epochs: Count = 40
    batch: Count = 512
    """Spectra in a step, over all workers together."""
    learning_rate: Positive = 1e-3
    final_learning_rate: Positive = 1e-5
    """The rate falls linearly from one to the other over all steps (Böhm et al., polynomial of power 1)."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the spectra kept for validation, drawn by row."""
    patience: Count = 8
    """Epochs without a better validation loss before training stops."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Ray Train workers; 0 trains in the driver's own process, which saves their start on one machine."""
    gpu: bool = False
    cache_gb: Annotated[float, Field(ge=0)] = 4.0
    """Training spectra that fit in this much memory are read once; others are read again in every epoch."""


class Score(Settings):
    """Store and checkpoint -> latents and scores (stages/score.py)."""

    checkpoint: str | None = None
    """Folder of a finished checkpoint to use in place of the experiment's own; nothing is trained then."""
    filter_velocity: Positive = 250.0
    """Half-width of the windows that filtered scores leave out around emission lines, km/s."""
    trim_percentage: Annotated[float, Field(gt=0, le=100)] = 97.0
    """Trimmed scores keep this percentage of the smallest residuals."""
    epsilon: Positive = 1e-3
    """Added to the flux that the weighted scores divide by."""
    top: Count = 1_000
    """Length of the top lists that the summary keeps."""
    batch: Count = 1_024
    """Spectra in one pass through the model."""


class Explain(Settings):
    """Top rows and model -> weights per segment (stages/explain.py)."""

    scores: Annotated[tuple[ScoreName, ...], Field(min_length=1)] = ("mse",)
    """Scores whose top lists are explained."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the scored spectra that is explained."""
    limit: Count = 10_000
    """Largest number of spectra explained per score."""
    segments: Count = 125
    """Segments of equal width in pixels; pixels that remain form one more, so a divisor of the grid serves best."""
    samples: Annotated[int, Field(ge=2)] = 5_000
    perturbation: Literal["scale", "flat", "with_mean"] = "scale"
    factor: float = 0.9
    """`scale`: factor on the smooth shape around its median; `flat`: the level."""
    smoothing: Positive = 3.0
    """Standard deviation of the Gaussian that parts noise from shape, pixels."""
    kernel_width: Positive = 0.25
    ridge: Annotated[float, Field(ge=0)] = 1.0


class Report(Settings):
    """Everything -> one HTML page (stages/report.py)."""

    score: ScoreName = "mse"
    """The score that ranks the spectra shown."""
    spectra: Count = 12
    """Top spectra shown with figures."""
    table: Count = 100
    """Rows of the ranked table."""


class Runtime(Settings):
    """Where the work runs; nothing here changes a result."""

    address: str | None = None
    """Ray cluster to join; none starts Ray on this machine, or takes RAY_ADDRESS."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Actors that ingest, score and explain; 0 takes one for each core."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0


class Tracking(Settings):
    """MLflow; nothing here changes a result."""

    uri: str | None = None
    """Tracking server or database; none takes MLFLOW_TRACKING_URI, else a SQLite file in the output folder."""
    model: str | None = None
    """Name in the model registry; none takes the experiment's name."""


class Experiment(Settings):
    """All settings of one experiment."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "experiment"
    output: str = "distspec-output"
    """Folder that receives everything."""
    seed: Annotated[int, Field(ge=0)] = 0
    ingest: Ingest = Ingest()
    train: Train = Train()
    score: Score = Score()
    explain: Explain = Explain()
    report: Report = Report()
    runtime: Runtime = Runtime()
    tracking: Tracking = Tracking()


def presets() -> dict[str, str]:
    """Give the name and TOML text of each shipped preset."""
    folder = resources.files("distspec") / "presets"
    return {p.name.removesuffix(".toml"): p.read_text("utf-8") for p in folder.iterdir() if p.name.endswith(".toml")}


def load(name: str | None, overrides: list[str] | tuple[str, ...] = ()) -> Experiment:
    """Read an experiment's settings.

    Arguments:
        name: a TOML file, the name of a preset, or None for the defaults. A file may name a preset to start from in
            a top-level key `preset`.
        overrides: TOML assignments such as `train.epochs=40`; a bare word is taken as a string.

    Raises:
        ConfigError: no such file or preset, no valid TOML, or a key or value that is refused.

    Example:
        >>> load("demo", ["train.epochs=3"]).train.epochs
        3
    """
    tree = _read(name) if name is not None else {}
    for override in overrides:
        tree = _merge(tree, _assignment(override))
    base = tree.pop("preset", None)
    if base is not None:
        known = presets()
        if base not in known:
            raise ConfigError(f"no preset {base!r}; expected one of {', '.join(sorted(known))}")
        tree = _merge(tomllib.loads(known[base]), tree)
    try:
        return Experiment.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise ConfigError(_explain_refusal(error, tree)) from None


def _read(name: str) -> dict[str, Any]:
    path = Path(name)
    if not path.is_file():
        known = presets()
        if name in known:
            return tomllib.loads(known[name])
        raise ConfigError(f"no settings file {name!r}; give a TOML file or a preset: {', '.join(sorted(known))}")
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from None


def _assignment(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r} is not an assignment; write it as key=value, for example train.epochs=40")
    try:
        return tomllib.loads(f"{key} = {value}")
    except tomllib.TOMLDecodeError:
        # The shell eats quotes; a bare word or path is meant as a string.
        try:
            return tomllib.loads(f"{key} = {json.dumps(value.strip())}")
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"override {text!r} is not valid TOML: {error}") from None


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Lay one tree over another; a table that names another `kind` replaces the old one whole."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _explain_refusal(error: ValidationError, tree: dict[str, Any]) -> str:
    """Say in one line which setting was refused and what to write instead."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    # In a union the location holds the kind that was tried, which is no key of the file.
    shown, node = [], tree
    for part in place:
        if isinstance(node, dict) and part not in node and node.get("kind") == part:
            continue
        shown.append(part)
        node = node.get(part, {}) if isinstance(node, dict) else {}
    key = ".".join(shown)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(shown[-1], sorted(_keys()), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; see `distspec config`"
        return f"unknown setting {key!r}{hint}{more}"
    if first["type"] == "union_tag_not_found":
        return f"setting '{key}.kind' is missing: say which kind of {shown[-1]} you mean{more}"
    message = first["msg"].removeprefix("Value error, ")
    found = "" if first["type"] == "missing" or isinstance(first["input"], dict) else f", got {first['input']!r}"
    return f"setting {key!r}: {message}{found}{more}" if key else f"{message}{more}"


def _keys() -> set[str]:
    """Collect the names of all settings, however deep."""
    return {name for model in Settings.__subclasses__() for name in model.model_fields}


def dump(settings: Settings) -> str:
    """Write settings as TOML that `load` turns back into equal ones (unset values are left out)."""
    return tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))


def digest(*parts: Any) -> str:
    """Name a result by what made it: 12 hexadecimal digits of the SHA-256 of the parts' canonical JSON.

    Example:
        >>> digest({"a": 1}, "x") == digest({"a": 1}, "x")
        True
    """
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
