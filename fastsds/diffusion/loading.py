"""The parts of a teacher from a diffusers pipeline folder or hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastsds.diffusion.families import FAMILIES, SDXL, SUPPORTED, UnsupportedTeacherError
from fastsds.hub import is_fetched, require_on_hub


def load_parts(source: str | Path, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of `DiffusionTeacher`; safetensors only, and no code but that of diffusers and transformers.

    Raises:
        UnsupportedTeacherError: SDXL's refiner, a ControlNet, inpainting, …: named, with what is supported.
        FileNotFoundError: a folder without a `model_index.json`, or without a tokenizer's files.
        OSError: no such hub id, or a part that is absent, not whole or not in safetensors; the message names it.
    """
    import diffusers
    import transformers

    folder = Path(source)
    is_path = isinstance(source, Path) or folder.exists() or source.startswith((".", "/", "~")) or "/" not in source
    if is_path:
        folder = folder.expanduser()
        if not (folder / "model_index.json").is_file():
            advice = "; diffusers' from_single_file and save_pretrained make one of it" if folder.is_file() else ""
            raise FileNotFoundError(
                f"source: expected a diffusers pipeline folder with a model_index.json, got {folder}{advice}"
            )
        source = str(folder)
    try:
        if not is_path and not is_fetched(str(source), "model_index.json"):
            require_on_hub(str(source), "model_index.json")
        index = diffusers.DiffusionPipeline.load_config(source)
    except (OSError, ValueError) as error:
        where = "" if is_path else " is no folder, and as a hub id it"
        raise OSError(f"source: {source}{where} could not be loaded: {' '.join(str(error).split())}") from error
    pipeline = index.get("_class_name")
    family = next((family for family in FAMILIES if pipeline in family.pipelines), None)
    if family is None:
        raise UnsupportedTeacherError(f"source: {source} is a {pipeline}; supported are {SUPPORTED}")
    classes = {family.denoiser: (diffusers, family.denoiser_class), "vae": (diffusers, "AutoencoderKL")}
    classes |= {name: (transformers, class_name) for name, class_name in family.text.items()}
    # The folders of large optional encoders are often not downloaded.
    left_out = family.optional if is_path and not all((folder / name).is_dir() for name in family.optional) else ()
    parts: dict[str, Any] = {}
    with _no_progress_bar():
        for name, (library, class_name) in classes.items():
            if name in left_out or index.get(name, (None, None))[1] is None:
                continue
            part_class = getattr(library, class_name)
            if name.startswith("tokenizer"):
                if is_path:
                    _require_tokenizer(folder / name)
                parts[name] = part_class.from_pretrained(source, subfolder=name)
                continue
            # SDXL's VAE overflows in float16.
            wide = family is SDXL and name == "vae" and dtype == torch.float16
            # diffusers and transformers name it differently.
            options: dict[str, Any] = {
                "torch_dtype" if library is diffusers else "dtype": torch.float32 if wide else dtype
            }
            if is_path and _has_half_alone(folder / name):
                options["variant"] = "fp16"
            parts[name] = _load_model(part_class, str(source), name, options)
    scheduler = index.get("scheduler", (None, None))[1]
    scheduler_class = getattr(diffusers, str(scheduler), None)
    if scheduler_class is None:
        raise UnsupportedTeacherError(
            f"source: the scheduler of {source} is a {scheduler}, which diffusers does not have"
        )
    parts["scheduler"] = scheduler_class.from_pretrained(source, subfolder="scheduler")
    if family is SDXL:
        parts["force_zeros_for_empty_prompt"] = index.get("force_zeros_for_empty_prompt", True)
    return parts


def _load_model(model_class: Any, source: str, name: str, options: dict[str, Any]) -> Any:
    """
    Raises:
        OSError: its weights are absent, not whole or not in safetensors.
    """
    try:
        model, report = model_class.from_pretrained(
            source, subfolder=name, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"source: {name} of {source} could not be loaded, which takes whole safetensors files: "
            f"{' '.join(str(error).split())}"
        ) from error
    # The libraries would draw them at random.
    if missing := sorted(report["missing_keys"]):
        raise OSError(f"source: the weights of {name} of {source} lack {len(missing)} tensors, first {missing[0]}")
    return model


def _has_half_alone(folder: Path) -> bool:
    """Whether a part's folder has weights of the variant `fp16`, and no others."""
    names = [path.name for path in folder.glob("*.safetensors*")]
    return bool(names) and all("fp16" in name for name in names)


def _require_tokenizer(folder: Path) -> None:
    """
    Raises:
        FileNotFoundError: there is none, of which transformers would make an empty one.
    """
    expected = ("tokenizer.json", "vocab.json", "spiece.model")
    if not any((folder / name).is_file() for name in expected):
        raise FileNotFoundError(f"source: expected a tokenizer's {' or '.join(expected)} in {folder}, got none")


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
