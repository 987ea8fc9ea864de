"""A tuned CLIP for others: an open_clip folder, a transformers folder, or the tuned tensors alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastsds.clip.convert import to_transformers
from fastsds.clip.errors import ClipFormatError, ClipSourceError
from fastsds.clip.identity import ClipIdentity
from fastsds.clip.locate import OPEN_CLIP_CONFIG
from fastsds.clip.source import IDENTITY_KEY, ClipSource, LoadedCLIP
from fastsds.clip.tuned import TunedCLIP

_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


def export_open_clip(folder: Path, clip: LoadedCLIP, source: ClipSource) -> None:
    """Writes a folder that open_clip's own `create_model_from_pretrained("local-dir:…")` and `get_tokenizer` read.

    Args:
        source: what `clip` was loaded from, before it was tuned; it has the model's configuration.

    Raises:
        FileExistsError: the folder exists.
        ClipSourceError: the source is of another model.
        ClipFormatError: a tokenizer that open_clip does not find in a folder.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    config = source.model_config()
    text_config = config["text_cfg"] = dict(config["text_cfg"])
    if isinstance(clip.tokenizer, HFTokenizer):
        text_config.setdefault("hf_tokenizer_name", folder.name)
    elif not isinstance(clip.tokenizer, SimpleTokenizer) or text_config.get("hf_tokenizer_name"):
        raise ClipFormatError(
            f"tokenizer: expected open_clip's HFTokenizer or SimpleTokenizer, as the model was loaded with, "
            f"got {type(clip.tokenizer).__name__}"
        )
    config["custom_text"] = type(clip.model).__name__ == "CustomTextCLIP"
    identity = ClipIdentity.of(clip.model)
    _require_described(identity, config)
    preprocess = _preprocess_config(clip.model)
    with whole_path(folder) as staging:
        staging.mkdir()
        document = {"model_cfg": config, "preprocess_cfg": {name: preprocess[name] for name in _PREPROCESS}}
        (staging / OPEN_CLIP_CONFIG).write_text(json.dumps(document, indent=2), encoding="utf-8")
        if isinstance(clip.tokenizer, HFTokenizer):
            clip.tokenizer.save_pretrained(staging)
        metadata = {IDENTITY_KEY: json.dumps(identity.to_json()), "format": "pt"}
        save_file(_stored(clip.model.state_dict()), staging / "open_clip_model.safetensors", metadata)


def export_transformers(folder: Path, clip: LoadedCLIP) -> None:
    """Writes a folder that transformers' own `CLIPModel` and `CLIPProcessor` read.

    Raises:
        FileExistsError: the folder exists.
        ClipFormatError: `CLIPModel` or `CLIPProcessor` cannot hold the model; the message names what.
    """
    from fastsds.clip.transformers_folder import save_processor

    model: Any = to_transformers(clip.model)
    with whole_path(folder) as staging:
        staging.mkdir()
        model.save_pretrained(staging)
        length = model.config.text_config.max_position_embeddings
        save_processor(staging, _preprocess_config(clip.model), clip.tokenizer, length)


def export_tuned(file: Path, tuned: TunedCLIP) -> None:
    """Writes the tuned tensors alone; where the base model comes from and what it is stand in the file's metadata.

    Raises:
        FileExistsError: the file exists.
        ValueError: not a .safetensors file, or nothing was tuned.
    """
    if file.suffix != ".safetensors":
        raise ValueError(f"out: expected a file that ends with .safetensors, got {file}")
    if not tuned.tensors or tuned.identity is None:
        raise ValueError(f"clip: {tuned.source.name} has no tuned tensors; export a run or a checkpoint")
    with whole_path(file) as staging:
        save_file(_stored(tuned.tensors), staging, tuned.metadata())


def _require_described(identity: ClipIdentity, config: dict[str, Any]) -> None:
    """
    Raises:
        ClipSourceError: the configuration builds another model.
    """
    import open_clip

    options = {name: value for name, value in config.items() if name != "custom_text"}
    with torch.device("meta"):
        described = (open_clip.CustomTextCLIP if config["custom_text"] else open_clip.CLIP)(**options)
    expected = ClipIdentity.of(described)
    for name in ("parameters", "activation", "context_length", "image_size"):
        there, here = getattr(expected, name), getattr(identity, name)
        if there != here:
            raise ClipSourceError(f"source: it describes another model than clip: {name} is {there} there, {here} here")


def _preprocess_config(clip: Any) -> dict[str, Any]:
    try:
        return dict(clip.visual.preprocess_cfg)
    except AttributeError:
        raise ClipSourceError(
            "clip: its preprocessing is not known; load it with ClipSource or open_clip's factories"
        ) from None


def _stored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


@contextmanager
def whole_path(target: Path) -> Iterator[Path]:
    """Yields a path beside `target` to write to; it takes the name when the block ends well and vanishes otherwise.

    Raises:
        FileExistsError: the target exists.
    """
    if target.exists():
        raise FileExistsError(f"out: {target} exists; name another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.partial")
    _remove(staging)
    try:
        yield staging
        grant_reading(staging)
        os.rename(staging, target)
    finally:
        _remove(staging)


def grant_reading(path: Path) -> None:
    """Gives a file, or those in a folder, the mode of new files: safetensors lets their owner alone read its own."""
    mask = os.umask(0)
    os.umask(mask)
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            file.chmod(0o666 & ~mask)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
