"""A trained model on disk: safetensors and JSON, nothing that can run code.

    <folder>/model.safetensors    weights and buffers
    <folder>/model.json           architecture, grid, recipe digest, training facts, SHA-256 of the weights

A checkpoint is a folder that appears whole by a rename. Weights that do not fit the description, or data on another
grid or of another recipe, are refused with both named.
"""

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from distspec.config import Dense
from distspec.errors import CheckpointError
from distspec.models.autoencoder import DenseAutoencoder
from distspec.spectra import WaveGrid

__all__ = ["SCHEMA", "Checkpoint", "read_tensors", "write_folder"]

SCHEMA = 1
"""Number of the layout above; another one is refused."""

_LARGEST_JSON = 1 << 24

_LONGEST_REASON = 300


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with what is needed to use it on the right data.

    Arguments:
        model: the network, in evaluation mode.
        settings: its architecture.
        grid: wavelengths that it was trained on.
        recipe: digest of the recipe that prepared the training spectra.
        facts: training facts for the reader (epochs, losses, versions).
        sha256: of the weights file; names the model.
        folder: where it lies, once saved or loaded.
    """

    model: DenseAutoencoder
    settings: Dense
    grid: WaveGrid
    recipe: str
    facts: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    folder: str = ""

    def save(self, folder: str | Path) -> "Checkpoint":
        """Write the checkpoint; the folder appears whole or not at all.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()})
        sha256 = hashlib.sha256(weights).hexdigest()
        text = {
            "schema": SCHEMA,
            "settings": self.settings.model_dump(mode="json"),
            "grid": self.grid.to_dict(),
            "recipe": self.recipe,
            "facts": self.facts,
            "sha256": sha256,
        }
        description = json.dumps(text, indent=2, sort_keys=True).encode()
        write_folder(Path(folder), {"model.safetensors": weights, "model.json": description})
        return Checkpoint(self.model, self.settings, self.grid, self.recipe, self.facts, sha256, str(folder))

    @classmethod
    def load(cls, folder: str | Path) -> "Checkpoint":
        """Read a checkpoint.

        Raises:
            CheckpointError: it is absent, damaged, of another schema, or its weights do not fit its description.
        """
        folder = Path(folder)
        text = _read_json(folder / "model.json")
        if text.get("schema") != SCHEMA:
            raise CheckpointError(f"{folder} has schema {text.get('schema')}; expected {SCHEMA}; train again")
        try:
            settings = Dense.model_validate_json(json.dumps(text["settings"]))
            grid = WaveGrid(**text["grid"])
            sha256, recipe, facts = str(text["sha256"]), str(text["recipe"]), dict(text["facts"])
            # On the meta device, which has no memory: a description may claim a network of any size.
            with torch.device("meta"):
                state = DenseAutoencoder(settings, grid.pixels).state_dict()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(repr(error).split())[:_LONGEST_REASON]
            raise CheckpointError(f"{folder}/model.json is not a checkpoint's description: {reason}") from None
        tensors = read_tensors(folder / "model.safetensors", sha256)
        expected = {name: _kind(tensor) for name, tensor in state.items()}
        found = {name: _kind(tensor) for name, tensor in tensors.items()}
        if found != expected:
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
            raise CheckpointError(
                f"{folder}: {wrong} has shape {found.get(wrong)}; its description needs {expected.get(wrong)}"
            )
        model = DenseAutoencoder(settings, grid.pixels)
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{folder}: {name} holds values that are not finite; train again")
        model.load_state_dict(tensors)
        return cls(model.eval(), settings, grid, recipe, facts, sha256, str(folder))

    def require(self, grid: WaveGrid, recipe: str) -> None:
        """Refuse data that this model was not trained for.

        Arguments:
            grid: wavelengths of the data.
            recipe: digest of the recipe that made the data.

        Raises:
            CheckpointError: grid or recipe differ; the message names both.
        """
        if grid != self.grid:
            raise CheckpointError(f"the model was trained on {self.grid}, the store keeps {grid}; train on this store")
        if recipe != self.recipe:
            raise CheckpointError(
                f"the model was trained on spectra prepared by recipe {self.recipe}, the store by {recipe}; "
                "train on this store or ingest with the model's recipe"
            )


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write a folder of files that appears whole: made under another name, then renamed over the old one."""
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.partial"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        for name, content in files.items():
            with open(partial / name, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error


def read_tensors(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    """Read a safetensors file whose SHA-256 is known.

    Raises:
        CheckpointError: the file is absent, altered or not safetensors.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"no weights at {path}: {error.strerror or error}; train again") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CheckpointError(f"{path} is damaged or was changed: its SHA-256 is not the one in its description")
    try:
        tensors: dict[str, torch.Tensor] = load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
    return tensors


def _kind(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{path} is far too large for a checkpoint's description")
        text = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"no checkpoint at {path.parent}: {error.strerror or error}; train first") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(text, dict):
        raise CheckpointError(f"{path} is not a checkpoint's description")
    return text
