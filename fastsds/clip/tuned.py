"""A base model and the tensors that were tuned of it: what distillation leaves behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fastsds.clip.errors import ClipSourceError, misfit_error, one_line_errors
from fastsds.clip.identity import ClipIdentity
from fastsds.clip.source import IDENTITY_KEY, ClipSource, LoadedCLIP

SOURCE_KEY = "clip_source"
"""In the metadata of tuned tensors: `ClipSource.to_json()` of the base model, as JSON."""


@dataclass(frozen=True)
class TunedCLIP:
    """Loads as the base model with the tuned tensors in place."""

    source: ClipSource
    """Of the base model."""
    tensors: dict[str, Tensor]
    """By CLIP's parameter names."""
    identity: dict[str, Any] | None = None
    """`ClipIdentity.to_json()` of the model that the tensors were tuned on; None where there are none."""

    def load(self, device: str | torch.device = "cpu") -> LoadedCLIP:
        """
        Raises:
            ClipSourceError: the base model cannot be loaded, or the tensors do not fit it.
            ModelMismatchError: the tensors were tuned on another model, or under another activation.
        """
        loaded = self.source.load(device)
        if self.identity is not None:
            ClipIdentity.of(loaded.model).require_match(self.identity)
        own = dict(loaded.model.named_parameters())
        misfits = [
            f"{name} ({list(tensor.shape)}, expected {list(own[name].shape)})"
            if name in own
            else f"{name} (unexpected)"
            for name, tensor in self.tensors.items()
            if name not in own or own[name].shape != tensor.shape
        ]
        if misfits:
            raise misfit_error(f"clip: {self.source.name}", misfits)
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                own[name].copy_(tensor)
        return loaded

    @classmethod
    def read(cls, file: Path, clip: ClipSource | None = None) -> TunedCLIP:
        """From a file that `export_tuned` wrote.

        Args:
            clip: the base model, where it is no longer where the file says.

        Raises:
            ClipSourceError: the file cannot be read, or holds no tuned tensors.
        """
        if file.suffix != ".safetensors":
            raise ClipSourceError(
                f"path: expected tuned tensors in a .safetensors file, got {file}; of a checkpoint file's whole model, "
                f"load ClipSource(architecture, file)"
            )
        with one_line_errors(f"path: {file}"), safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            if SOURCE_KEY not in metadata or IDENTITY_KEY not in metadata:
                raise ClipSourceError(
                    f"path: {file} holds no tuned tensors that export_tuned wrote; of a checkpoint file's whole model, "
                    f"load ClipSource(architecture, file)"
                )
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        source = clip or ClipSource.from_json(json.loads(metadata[SOURCE_KEY]))
        return cls(source, tensors, json.loads(metadata[IDENTITY_KEY]))

    def metadata(self) -> dict[str, str]:
        """What `read` finds beside the tensors."""
        return {SOURCE_KEY: json.dumps(self.source.to_json()), IDENTITY_KEY: json.dumps(self.identity), "format": "pt"}
