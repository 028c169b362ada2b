"""A checkpoint comes back bit for bit or is refused in one line; it never runs code."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from distspec.config import Dense, Score
from distspec.detectors.neural.scores import ModelScores
from distspec.errors import CheckpointError, StoreError
from distspec.files import read_tensors, write_folder
from distspec.models.autoencoders.dense import DenseAutoencoder
from distspec.models.checkpoint import SCHEMA, Checkpoint
from distspec.spectra import Spectra, WaveGrid

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


def describe(folder: Path, **changes: Any) -> None:
    text = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(text | changes))


def put_weights(folder: Path, content: bytes) -> None:
    """Put other weights in place and their right SHA-256 into the description, as a forger would."""
    (folder / WEIGHTS).write_bytes(content)
    describe(folder, sha256=hashlib.sha256(content).hexdigest())


def refused(folder: Path, match: str) -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        Checkpoint.load(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    return message


@pytest.fixture
def folder(checkpoint: Checkpoint) -> Path:
    return Path(checkpoint.folder)


# --- round trip ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_bit_for_bit(checkpoint: Checkpoint, tmp_path: Path) -> None:
    facts = {"phases": {"first": [{"train_loss": 1.25}]}, "torch": "2", "nested": {"a": [1, 2]}}
    kept = replace(checkpoint, facts=facts)
    kept.model.scale *= torch.rand(300) + 0.5
    saved = kept.save(tmp_path / "deep" / "er" / "model")
    found = Checkpoint.load(saved.folder)
    before, after = kept.model.state_dict(), found.model.state_dict()
    assert before.keys() == after.keys()
    assert {"mean", "scale"} <= after.keys()
    for name, tensor in before.items():
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name
        assert tensor.dtype == after[name].dtype
    for name in ("settings", "grid", "recipe", "facts", "sha256", "folder"):
        assert getattr(found, name) == getattr(saved, name), name
    assert found.facts == facts
    assert found.sha256 == hashlib.sha256((Path(saved.folder) / WEIGHTS).read_bytes()).hexdigest()
    assert not found.model.training
    assert all(parameter.requires_grad for parameter in found.model.parameters())


def test_a_loaded_model_gives_the_same_scores(checkpoint: Checkpoint, spectra: Spectra, device: str) -> None:
    first = ModelScores(checkpoint, Score(), device)(spectra)
    second = ModelScores(Checkpoint.load(checkpoint.folder), Score(), device)(spectra)
    for one, two in zip(first, second, strict=True):
        assert one.tobytes() == two.tobytes()


def test_the_same_model_has_the_same_name_everywhere(checkpoint: Checkpoint, tmp_path: Path) -> None:
    again = Checkpoint.load(checkpoint.folder).save(tmp_path / "copy")
    assert again.sha256 == checkpoint.sha256
    with torch.no_grad():
        again.model.mean[7] += 1e-6
    assert again.save(tmp_path / "other").sha256 != checkpoint.sha256


def test_a_folder_holds_two_files_and_no_code(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [DESCRIPTION, WEIGHTS]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    text = json.loads((folder / DESCRIPTION).read_text())
    assert text["schema"] == SCHEMA
    assert text["settings"]["hidden"] == [24]


def test_saving_again_replaces_the_folder(checkpoint: Checkpoint, folder: Path) -> None:
    (folder / "stray").write_text("old")
    replace(checkpoint, facts={"second": 2}).save(folder)
    assert Checkpoint.load(folder).facts == {"second": 2}
    assert not (folder / "stray").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failed_save_leaves_nothing(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    parent = tmp_path / "new"
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(StoreError, match="cannot write .*No space left on device"):
        checkpoint.save(parent / "model")
    assert list(parent.iterdir()) == []


def test_a_reader_never_sees_half_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(source: Any, target: Any) -> None:
        seen.append((Path(target).exists(), sorted(path.name for path in Path(source).iterdir())))
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", spy)
    write_folder(tmp_path / "model", {"a": b"1", "b": b"2"})
    assert seen == [(False, ["a", "b"])]
    assert (tmp_path / "model" / "b").read_bytes() == b"2"


def test_a_place_that_cannot_be_written_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match="cannot write"):
        checkpoint.save(tmp_path / "file" / "model")


# --- damage ----------------------------------------------------------------------------------------------------------


def truncated(content: bytes) -> bytes:
    return content[:-100]


def flipped(content: bytes) -> bytes:
    return content[:-50] + bytes([content[-50] ^ 1]) + content[-49:]


def longer(content: bytes) -> bytes:
    return content + b"\0" * 8


def giant_header(content: bytes) -> bytes:
    return (1 << 62).to_bytes(8, "little") + content[8:]


def large_header(content: bytes) -> bytes:
    return (len(content) + 1000).to_bytes(8, "little") + content[8:]


def emptied(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncated, flipped, longer, giant_header, large_header, emptied])
def test_altered_weights_are_refused(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    refused(folder, "SHA-256")


@pytest.mark.parametrize("damage", [truncated, longer, giant_header, large_header, emptied])
def test_weights_that_are_not_safetensors_are_refused_whatever_their_hash(
    folder: Path, damage: Callable[[bytes], bytes]
) -> None:
    put_weights(folder, damage((folder / WEIGHTS).read_bytes()))
    refused(folder, "not a safetensors file")


@pytest.mark.parametrize(
    "name", ["autoencoder.encoder.0.weight", "autoencoder.decoder.2.bias", "autoencoder.mean", "autoencoder.scale"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name].view(-1)[3] = value
    put_weights(folder, save(tensors))
    refused(folder, f"{name} holds values that are not finite")


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    model = DenseAutoencoder(Dense(hidden=(25,), latents=4), WaveGrid("linear", 4000.0, 1.0, 300))
    put_weights(folder, save({f"autoencoder.{name}": tensor for name, tensor in model.state_dict().items()}))
    refused(folder, r"has shape \(.*25.*its description needs \(.*24")


def test_a_transposed_weight_is_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["autoencoder.encoder.0.weight"] = tensors["autoencoder.encoder.0.weight"].T.contiguous()
    put_weights(folder, save(tensors))
    refused(folder, r"autoencoder.encoder.0.weight has shape \(300, 24\).*needs \(24, 300\)")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_weights_of_another_type_are_refused(folder: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    put_weights(folder, save(tensors))
    refused(folder, f"{str(dtype).removeprefix('torch.')}; its description needs .* float32")


def test_a_missing_or_additional_tensor_is_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    mean = tensors.pop("autoencoder.mean")
    put_weights(folder, save(tensors))
    refused(folder, "mean has shape None")
    put_weights(folder, save({**tensors, "autoencoder.mean": mean, "zzz": torch.zeros(1)}))
    refused(folder, "zzz has shape .*needs None")
    put_weights(folder, save({**tensors, "autoencoder.mean": mean}))
    Checkpoint.load(folder)


@pytest.mark.parametrize("name", [WEIGHTS, DESCRIPTION])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, "no weights at" if name == WEIGHTS else "no checkpoint at")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no checkpoint at .*nowhere.*train first")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\x80\x04\x95garbage", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[1, 2]", "not a checkpoint's description"),
        (b"null", "not a checkpoint's description"),
        (b'"text"', "not a checkpoint's description"),
        (b"{}", "schema None; expected 2"),
        (b'{"schema": 2}', "not a checkpoint's description"),
    ],
    ids=["empty", "cut", "bytes", "deep", "list", "null", "text", "nothing", "bare"],
)
def test_a_description_that_is_none_is_refused(folder: Path, content: bytes, match: str) -> None:
    (folder / DESCRIPTION).write_bytes(content)
    refused(folder, match)


def test_a_giant_description_is_refused_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(folder / DESCRIPTION, "wb") as stream:
        stream.truncate(1 << 40)  # a sparse file: a terabyte that takes no room
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"read {path}"))
    refused(folder, "far too large")


@pytest.mark.parametrize("schema", [0, 1, None, "2"])
def test_another_schema_is_refused(folder: Path, schema: Any) -> None:
    describe(folder, schema=schema)
    refused(folder, f"has schema {schema}; expected {SCHEMA}; train again")


@pytest.mark.parametrize(
    "change",
    [
        {"settings": None},
        {"settings": {"kind": "dense", "latents": -1}},
        {"settings": {"kind": "dense", "unknown": 1}},
        {"settings": {"kind": "dense", "hidden": [24.5]}},
        {"grid": None},
        {"grid": {"scale": "log", "first": 3600.0, "step": 1e-3}},
        {"grid": {"scale": "cubic", "first": 3600.0, "step": 1e-3, "pixels": 300}},
        {"grid": {"scale": "log", "first": "3600", "step": 1e-3, "pixels": 300}},
        {"grid": {"scale": "log", "first": 3600.0, "step": 1e-3, "pixels": 300.0}},
        {"grid": {"scale": "log", "first": 3600.0, "step": 1e-3, "pixels": 10**30}},
        {"facts": 5},
    ],
)
def test_a_description_of_no_model_is_refused(folder: Path, change: dict[str, Any]) -> None:
    describe(folder, **change)
    refused(folder, "not a checkpoint's description")


def test_a_network_larger_than_memory_is_refused_before_it_is_made(folder: Path) -> None:
    # 10^12 weights; only their shape may ever exist.
    settings = json.loads((folder / DESCRIPTION).read_text())["settings"]
    describe(folder, settings=settings | {"hidden": [10**6, 10**6]})
    refused(folder, "its description needs .*1000000")


# --- code ------------------------------------------------------------------------------------------------------------


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "torch", "named"])
def test_a_pickle_is_refused_and_runs_nothing(folder: Path, tmp_path: Path, kind: str) -> None:
    canary = tmp_path / "canary"
    if kind == "torch":
        torch.save({"weights": Canary(canary)}, tmp_path / "model.pt")
        content = (tmp_path / "model.pt").read_bytes()
    else:
        content = pickle.dumps(Canary(canary))
    if kind == "named":
        # The right name and a matching hash, or files beside the weights that another loader would run.
        for name in ("model.pt", "model.pkl", "MLmodel", "data.pkl"):
            (folder / name).write_bytes(content)
        (folder / WEIGHTS).unlink()
        refused(folder, "no weights at")
    else:
        (folder / WEIGHTS).write_bytes(content)
        refused(folder, "SHA-256")
        put_weights(folder, content)
        refused(folder, "not a safetensors file")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))  # the trap works
    assert canary.exists()


def test_a_pickled_description_is_refused_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / DESCRIPTION).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    refused(folder, "not valid JSON")
    assert not (tmp_path / "canary").exists()


def test_loading_never_unpickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("a pickle was loaded")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (np, "load")):
        monkeypatch.setattr(module, name, fail)
    Checkpoint.load(folder)


# --- belonging together ----------------------------------------------------------------------------------------------


def test_data_of_the_models_own_grid_and_recipe_are_accepted(checkpoint: Checkpoint, grid: WaveGrid) -> None:
    checkpoint.require(WaveGrid(**grid.to_dict()), "recipe")


@pytest.mark.parametrize(
    "other",
    [
        WaveGrid.between("log", 3600.0, 7200.0, 301),
        WaveGrid.between("linear", 3600.0, 7200.0, 300),
        WaveGrid.between("log", 3700.0, 7200.0, 300),
    ],
)
def test_another_grid_is_refused_and_both_are_named(checkpoint: Checkpoint, other: WaveGrid) -> None:
    with pytest.raises(CheckpointError, match="train on this store") as caught:
        checkpoint.require(other, "recipe")
    assert repr(other) in str(caught.value)
    assert repr(checkpoint.grid) in str(caught.value)


def test_another_recipe_is_refused_and_both_are_named(checkpoint: Checkpoint, grid: WaveGrid) -> None:
    with pytest.raises(CheckpointError, match="prepared by recipe recipe, the store by other-recipe"):
        checkpoint.require(grid, "other-recipe")


def test_a_checkpoint_may_be_moved(folder: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "elsewhere")
    found = Checkpoint.load(tmp_path / "elsewhere")
    assert found.sha256 == checkpoint.sha256
    assert found.folder == str(tmp_path / "elsewhere")


def test_tensors_of_a_known_hash_are_read_back(folder: Path, checkpoint: Checkpoint) -> None:
    tensors = read_tensors(folder / WEIGHTS, checkpoint.sha256)
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(tensor, tensors[f"autoencoder.{name}"])
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_tensors(folder / WEIGHTS, "0" * 64)
