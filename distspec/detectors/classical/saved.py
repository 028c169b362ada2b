"""A fitted classical detector on disk: safetensors and JSON, for the grid and recipe that it was fitted on.

No pickle is written or read: trees, components and mixtures are arrays of numbers, and are checked before use.
"""

import hashlib
import io
import json
import zipfile
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float32
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save

from distspec.addresses import Place, address_of
from distspec.config import AnyDetector
from distspec.detectors import ClassicalDetector
from distspec.detectors.classical import class_of
from distspec.errors import CheckpointError
from distspec.files import read_json, read_tensors, write_file, write_folder
from distspec.spectra import Spectra, WaveGrid

__all__ = [
    "FieldDetector",
    "copy_detector",
    "load_detector",
    "read_summary",
    "require_detector",
    "save_detector",
    "write_summary",
]

SCHEMA: Final = 1


def save_detector(detector: ClassicalDetector, folder: str | Place, recipe: str) -> str:
    """Write a detector, finished or still asking for looks; the folder appears whole or not at all.

    Returns:
        SHA-256 of its arrays, which names what was made with it.

    Raises:
        StoreError: the folder cannot be written.
    """
    tensors = {name: torch.from_numpy(values.copy()) for name, values in sorted(detector.to_arrays().items())}
    content = save(tensors)
    sha256 = hashlib.sha256(content).hexdigest()
    text = {
        "schema": SCHEMA,
        "settings": detector.settings.model_dump(mode="json"),
        "grid": detector.grid.to_dict(),
        "recipe": recipe,
        "sha256": sha256,
    }
    description = json.dumps(text, indent=2, sort_keys=True).encode()
    write_folder(address_of(folder), {"detector.safetensors": content, "detector.json": description})
    return sha256


def copy_detector(folder: Place, other: Place) -> None:
    """Write the files of a detector to another folder, which appears whole or not at all.

    Raises:
        StoreError: the folder cannot be written.
    """
    write_folder(other, {name: (folder / name).read_bytes() for name in ("detector.safetensors", "detector.json")})


def load_detector(folder: str | Place) -> tuple[ClassicalDetector, str]:
    """Read a detector and the SHA-256 of its arrays.

    Raises:
        CheckpointError: it is absent, damaged, of another schema, or not what its description says.
    """
    text = _description(folder)
    try:
        adapter: TypeAdapter[AnyDetector] = TypeAdapter(AnyDetector)
        settings = adapter.validate_json(json.dumps(text["settings"]))
        grid, sha256 = WaveGrid(**text["grid"]), str(text["sha256"])
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise CheckpointError(f"{folder}/detector.json does not describe a detector: {_short(error)}") from None
    tensors = read_tensors(address_of(folder) / "detector.safetensors", sha256)
    try:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        detector = class_of(settings).from_arrays(settings, grid, arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no {settings.kind} detector: {_short(error)}; remove it") from None
    return detector, sha256


def require_detector(folder: str | Place, grid: WaveGrid, recipe: str) -> None:
    """Refuse data that a detector was not fitted for.

    Raises:
        CheckpointError: grid or recipe differ; the message names both.
    """
    text = _description(folder)
    for what, mine, theirs in (("grid", text.get("grid"), grid.to_dict()), ("recipe", text.get("recipe"), recipe)):
        if mine != theirs:
            raise CheckpointError(f"{folder} was fitted on {what} {mine}, the store has {theirs}; fit on this store")


def write_summary(path: Place, summary: Any) -> None:
    """Write what a detector's look at some spectra gave; the file appears whole.

    Raises:
        StoreError: the file cannot be written.
    """
    stream = io.BytesIO()
    np.savez(stream, **summary.to_arrays())
    write_file(path, stream.getbuffer())


def read_summary(path: Place, detector: ClassicalDetector) -> Any:
    """Read what `write_summary` wrote for this detector.

    Raises:
        CheckpointError: it is absent or damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            return detector.summary({name: found[name] for name in found.files})
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read ({_short(error)}); remove it, and detect again") from error


class FieldDetector:
    """One of the scores of a classical detector as a `Detector`.

    Arguments:
        detector: fitted.
        field: name of the score among its fields.
    """

    def __init__(self, detector: ClassicalDetector, field: str) -> None:
        self._detector, self._field = detector, field

    def score(self, spectra: Spectra) -> Float32[np.ndarray, "n"]:
        """Score spectra; higher = odder."""
        values: Float32[np.ndarray, "n"] = self._detector.details(spectra)[self._field]
        return values


def _description(folder: str | Place) -> dict[str, Any]:
    text = read_json(address_of(folder) / "detector.json", "run `distspec detect` first")
    if text.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{folder} has schema {text.get('schema')}; expected {SCHEMA}; run `distspec detect` again"
        )
    return text


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
