"""A trained model on disk: safetensors and JSON, nothing that can run code.

    <folder>/model.safetensors    weights and buffers of the autoencoder and of the density
    <folder>/model.json           architecture, grid, recipe digest, training facts, SHA-256 of the weights

A checkpoint is a folder that appears whole; in a bucket it is one once its description, written last, is there. Weights
that do not fit the description, or data on another grid or of another recipe, are refused with both named.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import save
from torch import nn

from distspec import models
from distspec.addresses import Place, address_of
from distspec.config import AnyDensity, Architecture, Sliced, Spline
from distspec.errors import CheckpointError, ConfigError
from distspec.files import read_json, read_tensors, write_folder
from distspec.models import flows
from distspec.models.flows.density import LatentDensity
from distspec.spectra import WaveGrid

__all__ = ["SCHEMA", "Checkpoint"]

SCHEMA = 2
"""Number of the layout above; another one is refused."""

_LONGEST_REASON = 300


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with what is needed to use it on the right data.

    Arguments:
        model: the autoencoder, in evaluation mode.
        settings: its architecture.
        grid: wavelengths that it was trained on.
        recipe: digest of the recipe that prepared the training spectra.
        facts: training facts for the reader (epochs, losses, versions).
        two_stage: whether the model is a second autoencoder behind a first one.
        density: of the latents, if one was fitted.
        density_settings: of its flow.
        sha256: of the weights file; names the model.
        folder: where it lies, once saved or loaded.
    """

    model: nn.Module
    settings: Architecture
    grid: WaveGrid
    recipe: str
    facts: dict[str, Any] = field(default_factory=dict)
    two_stage: bool = False
    density: LatentDensity | None = None
    density_settings: Sliced | Spline | None = None
    sha256: str = ""
    folder: str = ""

    @property
    def latents(self) -> int:
        """Length of a latent vector."""
        return int(self.model.latents)  # type: ignore[arg-type]

    def save(self, folder: str | Place) -> "Checkpoint":
        """Write the checkpoint; the folder appears whole or not at all.

        Raises:
            StoreError: the folder cannot be written.
        """
        tensors = _joined(self.model, self.density)
        weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        sha256 = hashlib.sha256(weights).hexdigest()
        density = None
        if self.density is not None and self.density_settings is not None:
            density = {
                "settings": self.density_settings.model_dump(mode="json"),
                "shape": self.density.flow.shape,
                "names": list(self.density.names),
            }
        text = {
            "schema": SCHEMA,
            "settings": self.settings.model_dump(mode="json"),
            "two_stage": self.two_stage,
            "density": density,
            "grid": self.grid.to_dict(),
            "recipe": self.recipe,
            "facts": self.facts,
            "sha256": sha256,
        }
        description = json.dumps(text, indent=2, sort_keys=True).encode()
        write_folder(address_of(folder), {"model.safetensors": weights, "model.json": description})
        return replace(self, sha256=sha256, folder=str(folder))

    @classmethod
    def load(cls, folder: str | Place) -> "Checkpoint":
        """Read a checkpoint.

        Raises:
            CheckpointError: it is absent, damaged, of another schema, or its weights do not fit its description.
        """
        folder = address_of(folder)
        text = read_json(folder / "model.json")
        if text.get("schema") != SCHEMA:
            raise CheckpointError(f"{folder} has schema {text.get('schema')}; expected {SCHEMA}; train again")
        try:
            # On the meta device, which has no memory: a description may claim a network of any size.
            with torch.device("meta"):
                expected = {name: _kind(tensor) for name, tensor in _joined(*_described(text)).items()}
            sha256, recipe, facts = str(text["sha256"]), str(text["recipe"]), dict(text["facts"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, ConfigError) as error:
            reason = " ".join(repr(error).split())[:_LONGEST_REASON]
            raise CheckpointError(f"{folder}/model.json is not a checkpoint's description: {reason}") from None
        tensors = read_tensors(folder / "model.safetensors", sha256)
        found = {name: _kind(tensor) for name, tensor in tensors.items()}
        if found != expected:
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
            raise CheckpointError(
                f"{folder}: {wrong} has shape {found.get(wrong)}; its description needs {expected.get(wrong)}"
            )
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{folder}: {name} holds values that are not finite; train again")
        model, density = _described(text)
        for prefix, module in (("autoencoder.", model), ("density.", density)):
            mine = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            if module is not None:
                module.load_state_dict(mine)
                module.eval()
        settings, grid, density_settings = _settings(text)
        two_stage = bool(text["two_stage"])
        return cls(model, settings, grid, recipe, facts, two_stage, density, density_settings, sha256, str(folder))

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


def _settings(text: dict[str, Any]) -> tuple[Architecture, WaveGrid, Sliced | Spline | None]:
    architecture: TypeAdapter[Architecture] = TypeAdapter(Architecture)
    density: TypeAdapter[AnyDensity] = TypeAdapter(AnyDensity)
    stated = text["density"]
    return (
        architecture.validate_json(json.dumps(text["settings"])),
        WaveGrid(**text["grid"]),
        None if stated is None else density.validate_json(json.dumps(stated["settings"])),
    )


def _described(text: dict[str, Any]) -> tuple[nn.Module, LatentDensity | None]:
    """Make the networks that a description tells of, with weights that mean nothing yet."""
    settings, grid, density = _settings(text)
    model = models.build(settings, grid, two_stage=bool(text["two_stage"]))
    if density is None:
        return model, None
    stated = text["density"]
    shape = {str(name): int(size) for name, size in stated["shape"].items()}
    return model, flows.build(density, shape, tuple(str(name) for name in stated["names"]))


def _joined(model: nn.Module, density: nn.Module | None) -> dict[str, torch.Tensor]:
    tensors = {f"autoencoder.{name}": tensor for name, tensor in model.state_dict().items()}
    if density is not None:
        tensors |= {f"density.{name}": tensor for name, tensor in density.state_dict().items()}
    return tensors


def _kind(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
