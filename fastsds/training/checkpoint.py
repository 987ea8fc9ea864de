"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastsds.clip.export import grant_reading

FORMAT_VERSION = 1
TENSORS, OPTIMIZER, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"
_LIBRARIES = ("torch", "open_clip_torch", "diffusers", "transformers", "accelerate", "safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says which, why and what is still good."""


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder beside `folder` to fill; it takes the name when the block ends well and vanishes otherwise."""
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        grant_reading(staging)
        for path in staging.iterdir():
            _flush_to_disk(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(staging, folder)
        _flush_to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def save_checkpoint(
    folder: Path, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Writes the trained tensors, the optimizer and the state as `folder`.

    Raises:
        CheckpointError: the disk refuses; nothing half-written stays, earlier checkpoints are untouched.
    """
    optimizer_tensors, optimizer_groups = _flatten_optimizer(optimizer.state_dict())
    document = {
        "format": FORMAT_VERSION,
        "libraries": {name: version(name) for name in _LIBRARIES},
        "optimizer_groups": optimizer_groups,
        **state,
    }
    try:
        with atomic_folder(folder) as staging:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, staging / TENSORS)
            save_file(optimizer_tensors, staging / OPTIMIZER)
            (staging / STATE).write_text(json.dumps(document, indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        good = latest_checkpoint(folder.parent)
        raise CheckpointError(
            f"could not write {folder}: {error}. The last good checkpoint is {good or 'none'}; "
            f"free some space and resume"
        ) from error


def load_state(folder: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint.

    Raises:
        CheckpointError: it is missing, not JSON, or of a format that this version does not read.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"could not read {folder / STATE}: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"could not read {folder / STATE}: expected a JSON object, got {type(state).__name__}")
    if state.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: expected checkpoint format {FORMAT_VERSION}, got {state.get('format')!r}; "
            f"it was written by another version of fastsds"
        )
    return state


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint, by their names in the module that was trained.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return _read(folder / TENSORS)


def load_tensors(folder: Path, into: dict[str, Tensor]) -> None:
    """Copies the trained tensors of a checkpoint into those of the same names.

    Raises:
        CheckpointError: the file cannot be read, or names or shapes differ; nothing is copied then.
    """
    stored = read_tensors(folder)
    expected = {name: list(tensor.shape) for name, tensor in into.items()}
    found = {name: list(tensor.shape) for name, tensor in stored.items()}
    if expected != found:
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        name = different[0]
        raise CheckpointError(
            f"{folder}: its trained tensors are not those of this run: {len(different)} differ, first {name}: "
            f"expected {expected.get(name, 'none')}, got {found.get(name, 'none')}; use the options it was trained with"
        )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(stored[name])


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores the optimizer from a checkpoint and its `state`."""
    per_parameter: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _read(folder / OPTIMIZER).items():
        index, key = name.split(".", 1)
        per_parameter.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": per_parameter, "param_groups": state["optimizer_groups"]})


def checkpoint_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint of the most steps below `root`, or None."""
    return max(_checkpoints(root), default=None)


def drop_old(root: Path, keep: int) -> None:
    """Removes all but the last `keep` checkpoints below `root`, and what a killed process had begun to write."""
    for path in [*_checkpoints(root)[:-keep], *root.glob(".step-*.partial")]:
        shutil.rmtree(path)


def random_state() -> dict[str, Any]:
    """The states of this process's global generators, Python's, NumPy's and PyTorch's, as JSON."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    python_version, python_internal, python_gauss = random.getstate()
    return {
        "python": [python_version, list(python_internal), python_gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` gave."""
    python_version, python_internal, python_gauss = state["python"]
    random.setstate((python_version, tuple(python_internal), python_gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))


def _checkpoints(root: Path) -> list[Path]:
    """In order; a folder of another name, such as a copy that a user has made, is none."""
    return sorted(path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name) and path.is_dir())


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not read {path}: {error}; resume from an earlier checkpoint") from error


def _flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    tensors = {
        f"{index}.{key}": torch.as_tensor(value).detach().contiguous()
        for index, entries in state["state"].items()
        for key, value in entries.items()
    }
    return tensors, state["param_groups"]


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
