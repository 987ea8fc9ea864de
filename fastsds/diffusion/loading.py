"""The parts of a teacher from a diffusers pipeline folder or hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastsds.diffusion.families import FAMILIES, SDXL, SUPPORTED, UnsupportedTeacherError


def load_parts(source: str | Path, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of `DiffusionTeacher`; safetensors only, and no code but that of diffusers and transformers.

    Raises:
        UnsupportedTeacherError: SDXL's refiner, a ControlNet, inpainting, …: named, with what is supported.
        FileNotFoundError: a folder without a `model_index.json`.
    """
    import diffusers
    import transformers

    folder = Path(source)
    is_path = isinstance(source, Path) or folder.exists() or source.startswith((".", "/", "~"))
    if is_path:
        folder = folder.expanduser()
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"source: expected a diffusers pipeline folder with a model_index.json, got {folder}"
            )
        source = str(folder)
    index = diffusers.DiffusionPipeline.load_config(source)
    pipeline = index.get("_class_name")
    family = next((family for family in FAMILIES if pipeline in family.pipelines), None)
    if family is None:
        raise UnsupportedTeacherError(f"source: {source} is a {pipeline}; supported are {SUPPORTED}")
    classes = {family.denoiser: (diffusers, family.denoiser_class), "vae": (diffusers, "AutoencoderKL")}
    classes |= {name: (transformers, class_name) for name, class_name in family.text.items()}
    parts: dict[str, Any] = {}
    with _no_progress_bar():
        for name, (library, class_name) in classes.items():
            left_out = name in family.optional and is_path and not (folder / name).is_dir()
            if left_out or index.get(name, (None, None))[1] is None:
                continue
            options: dict[str, Any] = {}
            if not name.startswith("tokenizer"):
                # SDXL's VAE overflows in float16.
                wide = family is SDXL and name == "vae" and dtype == torch.float16
                # diffusers and transformers name it differently.
                options["torch_dtype" if library is diffusers else "dtype"] = torch.float32 if wide else dtype
                options["use_safetensors"] = True
            parts[name] = getattr(library, class_name).from_pretrained(source, subfolder=name, **options)
    scheduler_class = getattr(diffusers, index["scheduler"][1], None)
    if scheduler_class is None:
        raise UnsupportedTeacherError(
            f"source: the scheduler of {source} is a {index['scheduler'][1]}, which diffusers does not have"
        )
    parts["scheduler"] = scheduler_class.from_pretrained(source, subfolder="scheduler")
    if family is SDXL:
        parts["force_zeros_for_empty_prompt"] = index.get("force_zeros_for_empty_prompt", True)
    return parts


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers shows a bar for every model it loads, also for one of a few kilobytes."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
