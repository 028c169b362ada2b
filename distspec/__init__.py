"""Find anomalous spectra in survey-size data, and say why they are odd.

From the top floor to the ground; nothing imports what stands above it.

- `__main__`: python -m distspec.
- `cli`: the command line: parse, call, print.
- `pipeline`: walks the list of stages: run, plan, check; the lock on an output; SIGTERM.
- `stages/`: one folder a verb, the list of them, and what a stage is.
- `detectors/`: spectra -> one number, higher = odder.
- `explainers/`: a score -> the wavelengths that make a spectrum odd.
- `results/`: what stages left, named and opened row by row.
- `runtime/`: Ray and MLflow.
- `models/`: autoencoders, densities of their latents, how they are trained and kept.
- `sources/`: where spectra come from: surveys, tables, simulation, archives.
- `prepare/`: observed -> comparable: the recipe.
- `store/`: rows x pixels on Zarr.
- `config/`: settings, one file a verb; presets.
- `files`: files and folders that appear whole or not at all.
- `addresses`: addresses of folders and buckets.
- `statistics/`: arrays -> numbers.
- `spectra/`: the vocabulary: spectra, their grid, status and lines.
- `errors`: all errors.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Give `dataset` and `write_layer`; with them Ray is imported, which takes a second that --help does without."""
    if name in ("dataset", "write_layer"):
        return getattr(import_module("distspec.runtime.datasets"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
