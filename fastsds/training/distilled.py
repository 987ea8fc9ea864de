"""Distilled models by path: of a run, a checkpoint, tuned tensors or an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from fastsds.clip.errors import ClipSourceError
from fastsds.clip.locate import OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG
from fastsds.clip.source import ClipSource, LoadedCLIP
from fastsds.clip.tuned import TunedCLIP
from fastsds.training.checkpoint import STATE, latest_checkpoint, load_state, read_tensors

RUN_CONFIG = "config.yaml"
"""Of a run: `clip` in it is the base model's `ClipSource.to_json()`."""
_CLIP = "clip."
"""What `SDSDistiller` puts before CLIP's parameter names."""


def load_distilled(path: str | Path, device: str | torch.device = "cpu", clip: ClipSource | None = None) -> LoadedCLIP:
    """A distilled CLIP model with its preprocessing and tokenizer.

    Args:
        path: the folder of a run, of one of its checkpoints or of an exported model, or a file of tuned tensors.
        clip: the base model, where the run or file does not say or it has moved.

    Raises:
        ClipSourceError: there is nothing such at the path, or the base model cannot be loaded.
        CheckpointError: the checkpoint cannot be read.
        ModelMismatchError: the tensors were tuned on another model, or under another activation.
    """
    return read_distilled(path, clip).load(device)


def read_distilled(path: str | Path, clip: ClipSource | None = None) -> TunedCLIP:
    """As `load_distilled`, without loading the base model; `export_tuned` writes it."""
    path = Path(path)
    if path.is_file():
        return TunedCLIP.read(path, clip)
    if (path / STATE).is_file():
        return _read_checkpoint(path, path.parent.parent, clip)
    if (last := latest_checkpoint(path / "checkpoints")) is not None:
        return _read_checkpoint(last, path, clip)
    if any((path / name).is_file() for name in (OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG)):
        if clip is not None:
            raise ClipSourceError(f"clip: {path} is a whole model; expected None, got {clip.name!r}")
        return TunedCLIP(ClipSource(str(path)), {})
    if not path.exists():
        raise ClipSourceError(f"path: there is no {path}")
    raise ClipSourceError(
        f"path: {path} is no run with a checkpoint, checkpoint or exported model: expected in it checkpoints/step-…, "
        f"{STATE}, {OPEN_CLIP_CONFIG} or {TRANSFORMERS_CONFIG}"
    )


def _read_checkpoint(folder: Path, run: Path, clip: ClipSource | None) -> TunedCLIP:
    model: dict[str, Any] = load_state(folder)["model"]
    if "tuned" not in model:
        raise ClipSourceError(
            f"path: {folder} is a checkpoint of {model.get('method', 'another method')}, which leaves CLIP as it is; "
            f"expected one of SDSDistiller"
        )
    tensors = {
        name.removeprefix(_CLIP): tensor for name, tensor in read_tensors(folder).items() if name.startswith(_CLIP)
    }
    return TunedCLIP(clip or _base_of(run), tensors, model["clip"])


def _base_of(run: Path) -> ClipSource:
    file = run / RUN_CONFIG
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ClipSourceError(
            f"clip: {file} is missing, which names the base model; pass the ClipSource it was trained on"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ClipSourceError(f"path: could not read {file}: {' '.join(str(error).split())}") from error
    base = document.get("clip") if isinstance(document, dict) else None
    if not isinstance(base, dict):
        raise ClipSourceError(f"clip: {file} names no base model under clip; pass the ClipSource it was trained on")
    return ClipSource.from_json(base)
