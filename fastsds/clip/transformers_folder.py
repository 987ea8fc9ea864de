"""transformers folders and hub ids of a `CLIPModel`: its configuration, weights, preprocessing and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastsds.clip.convert import ARGMAX_EOS, open_clip_config, to_open_clip
from fastsds.clip.errors import ClipFormatError, ClipSourceError, misfit_error

_INTERPOLATION = {"bilinear": 2, "bicubic": 3}
"""PIL's numbers, which `resample` takes."""


def load_transformers(
    place: str, *, cache_dir: Path | None, trust_remote_code: bool
) -> tuple[nn.Module, Callable[[Any], Tensor], Callable[..., Tensor]]:
    """The model as open_clip's `CLIP`, its preprocessing and its tokenizer, as open_clip's.

    Args:
        place: a folder or a hub id.

    Raises:
        ClipSourceError: another kind of model, weights, preprocessing or tokenizer that are missing or do not fit.
    """
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from transformers import CLIPModel

    _read_clip_config(place, cache_dir)
    model, report = CLIPModel.from_pretrained(place, cache_dir=cache_dir, output_loading_info=True)
    misfits = [f"{name} (missing)" for name in sorted(report["missing_keys"])]
    misfits += [f"{name} (unexpected)" for name in sorted(report["unexpected_keys"]) if "position_ids" not in name]
    if misfits:
        raise misfit_error(f"name: {place}", misfits)
    clip = to_open_clip(model.float())
    tokenizer = _load_tokenizer(place, model.config.text_config, cache_dir, trust_remote_code)
    preprocess = _read_preprocessing(place, model.config.vision_config.image_size, cache_dir)
    set_model_preprocess_cfg(clip, preprocess)
    return clip, image_transform_v2(PreprocessCfg(**preprocess), is_train=False), tokenizer


def read_config(place: str, *, cache_dir: Path | None) -> dict[str, Any]:
    """open_clip's `model_cfg` of the model.

    Raises:
        ClipSourceError: another kind of model, or one that open_clip's `CLIP` cannot hold.
    """
    config = open_clip_config(_read_clip_config(place, cache_dir))
    # Says that the tokenizer is one of transformers; open_clip takes it from the folder that holds the configuration.
    config["text_cfg"]["hf_tokenizer_name"] = Path(place).name
    return config


def save_processor(
    folder: Path, preprocess: dict[str, Any], tokenizer: Callable[..., Tensor], context_length: int
) -> None:
    """Writes the files that `CLIPProcessor.from_pretrained(folder)` reads.

    Args:
        preprocess: as open_clip notes it on the model, `clip.visual.preprocess_cfg`.

    Raises:
        ClipFormatError: preprocessing or a tokenizer that transformers' CLIP has not.
    """
    from transformers import CLIPImageProcessor, CLIPProcessor

    size = preprocess["size"] if isinstance(preprocess["size"], int) else preprocess["size"][0]
    square = {"height": size, "width": size}
    mode = preprocess["resize_mode"]
    if mode not in ("shortest", "squash"):
        raise ClipFormatError(f"preprocessing: transformers' CLIPImageProcessor has no resize_mode {mode!r}")
    images = CLIPImageProcessor(
        size={"shortest_edge": size} if mode == "shortest" else square,
        crop_size=square,
        do_center_crop=mode == "shortest",
        resample=_INTERPOLATION.get(preprocess["interpolation"], _INTERPOLATION["bicubic"]),
        image_mean=list(preprocess["mean"]),
        image_std=list(preprocess["std"]),
    )
    # The processor's own file is read by new versions of transformers, this one by all.
    images.save_pretrained(folder)
    CLIPProcessor(images, _clip_tokenizer(folder, tokenizer, context_length)).save_pretrained(folder)


def _clip_tokenizer(folder: Path, tokenizer: Any, context_length: int) -> Any:
    import open_clip.tokenizer
    from transformers import CLIPTokenizer, CLIPTokenizerFast

    if isinstance(tokenizer, open_clip.tokenizer.SimpleTokenizer):
        named = {tokenizer.sot_token_id: "<|startoftext|>", tokenizer.eot_token_id: "<|endoftext|>"}
        vocabulary = {named.get(index, token): index for token, index in tokenizer.encoder.items()}
        merges = "".join(f"{left} {right}\n" for left, right in tokenizer.bpe_ranks)
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    else:
        inner = getattr(tokenizer, "tokenizer", tokenizer)
        if not isinstance(inner, CLIPTokenizer | CLIPTokenizerFast):
            raise ClipFormatError(
                f"tokenizer: transformers' CLIPProcessor takes a CLIPTokenizer, got {type(inner).__name__}"
            )
        inner.save_pretrained(folder)
    # Read anew, so that the caller's keeps its length.
    return CLIPTokenizer.from_pretrained(folder, model_max_length=context_length)


def _read_clip_config(place: str, cache_dir: Path | None) -> Any:
    from transformers import CLIPConfig, PretrainedConfig

    document, _ = PretrainedConfig.get_config_dict(place, cache_dir=cache_dir)
    if document.get("model_type") != "clip":
        raise ClipSourceError(
            f"name: {place}: expected a transformers CLIPModel, model_type 'clip' in config.json, "
            f"got {document.get('model_type')!r}"
        )
    return CLIPConfig.from_dict(document)


def _load_tokenizer(place: str, text: Any, cache_dir: Path | None, trust_remote_code: bool) -> Callable[..., Tensor]:
    import open_clip.tokenizer

    if Path(place).is_dir() and not any((Path(place) / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ClipSourceError(
            f"name: {place} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"
        )
    tokenizer = open_clip.tokenizer.HFTokenizer(
        place, text.max_position_embeddings, cache_dir=cache_dir, trust_remote_code=trust_remote_code
    )
    end, size = tokenizer.tokenizer.eos_token_id, len(tokenizer.tokenizer)
    if size > text.vocab_size or text.eos_token_id not in (ARGMAX_EOS, end):
        raise ClipSourceError(
            f"name: {place}: its tokenizer has {size} tokens and the end token {end}, which do not fit the model's "
            f"vocab_size {text.vocab_size} and eos_token_id {text.eos_token_id}"
        )
    return tokenizer  # type: ignore[no-any-return]


def _read_preprocessing(place: str, image_size: int, cache_dir: Path | None) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` of a `CLIPImageProcessor`."""
    from transformers import CLIPImageProcessor

    images = CLIPImageProcessor.from_pretrained(place, cache_dir=cache_dir)
    square = [image_size, image_size]
    crop = [images.crop_size["height"], images.crop_size["width"]] if images.do_center_crop else square
    squashed = [_get(images.size, "height"), _get(images.size, "width")]
    shortest = _get(images.size, "shortest_edge")
    interpolation = {number: name for name, number in _INTERPOLATION.items()}.get(int(images.resample))
    expected = {
        "do_resize, do_rescale and do_normalize": (
            images.do_resize and images.do_rescale and images.do_normalize,
            True,
        ),
        "rescale_factor": (round(1 / images.rescale_factor, 6), 255),
        "resample": (interpolation is not None, True),
        "crop_size": (crop, square),
        "size": (shortest if images.do_center_crop and shortest else squashed, image_size if shortest else square),
    }
    for name, (got, wanted) in expected.items():
        if got != wanted:
            raise ClipSourceError(
                f"name: {place}: its image processor's {name} is not what open_clip's preprocessing for "
                f"{image_size} pixels does: expected {wanted}, got {got}"
            )
    return {
        "size": image_size,
        "mode": "RGB",
        "mean": tuple(images.image_mean),
        "std": tuple(images.image_std),
        "interpolation": interpolation,
        "resize_mode": "shortest" if shortest else "squash",
        "fill_color": 0,
    }


def _get(size: Any, name: str) -> Any:
    return size.get(name) if hasattr(size, "get") else getattr(size, name, None)
