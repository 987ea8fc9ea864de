"""transformers' `CLIPModel` and open_clip's `CLIP`: the same function under other names, converted exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from fastsds.clip.errors import ClipFormatError

_BLOCK = {
    "ln_1.weight": "layer_norm1.weight",
    "ln_1.bias": "layer_norm1.bias",
    "ln_2.weight": "layer_norm2.weight",
    "ln_2.bias": "layer_norm2.bias",
    "attn.out_proj.weight": "self_attn.out_proj.weight",
    "attn.out_proj.bias": "self_attn.out_proj.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}
_VISION = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_TANH = {"act_kwargs": {"approximate": "tanh"}}
_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "quick_gelu": {}, "gelu": {}, "gelu_pytorch_tanh": _TANH, "gelu_new": _TANH
}  # fmt: skip
"""transformers' names, and what they add to the configuration of open_clip's towers."""
_EPS = 1e-5
ARGMAX_EOS = 2
"""The `eos_token_id` at which transformers pools at the highest token id, as OpenAI's own folders have it."""


def open_clip_config(config: Any) -> dict[str, Any]:
    """open_clip's `model_cfg` of the model that a transformers `CLIPConfig` describes.

    Raises:
        ClipFormatError: open_clip's `CLIP` has no such model; the message names what.
    """
    vision, text = config.vision_config, config.text_config
    if vision.hidden_act != text.hidden_act or text.hidden_act not in _ACTIVATIONS:
        raise ClipFormatError(
            f"hidden_act: open_clip's CLIP has one of {', '.join(_ACTIVATIONS)} in both towers, "
            f"got {vision.hidden_act} (vision) and {text.hidden_act} (text)"
        )
    if vision.num_channels != 3:
        raise ClipFormatError(f"num_channels: open_clip's CLIP takes 3, got {vision.num_channels}")
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise ClipFormatError(f"{name}: expected one number, got {getattr(vision, name)}")
    if not isinstance(text.eos_token_id, int):
        raise ClipFormatError(f"eos_token_id: expected one token id, got {text.eos_token_id}")
    activation = _ACTIVATIONS[text.hidden_act]
    # The end token has the highest id in CLIP's vocabulary, where both poolings read the same position.
    last = text.eos_token_id in (ARGMAX_EOS, text.vocab_size - 1)
    pooling = {} if last else {"pool_type": "eos", "eos_id": text.eos_token_id}
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": text.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            **_tower_config(vision),
            **activation,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "heads": text.num_attention_heads,
            **_tower_config(text),
            **activation,
            **pooling,
        },
    }


def to_open_clip(model: nn.Module) -> nn.Module:
    """An open_clip `CLIP` with the features of a transformers `CLIPModel`, in evaluation mode, tensors copied.

    Raises:
        ClipFormatError: open_clip's `CLIP` has no such model; the message names what.
    """
    import open_clip

    clip = open_clip.CLIP(**open_clip_config(model.config))
    source = model.state_dict()
    state = {"logit_scale": source["logit_scale"]}
    for name, other, kind in _names(clip, ""):
        if kind == "stacked":
            state[name] = torch.cat([source[other.format(part)] for part in "qkv"])
        else:
            state[name] = source[other].T if kind == "transposed" else source[other]
    clip.load_state_dict(state)
    return clip.eval()


def to_transformers(clip: nn.Module) -> nn.Module:
    """A transformers `CLIPModel` with the features of an open_clip model, in evaluation mode, tensors copied.

    Raises:
        ClipFormatError: `CLIPModel` cannot hold the model; the message names what.
    """
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig(**transformers_config(clip)))
    source = clip.state_dict()
    state = {"logit_scale": source["logit_scale"].reshape(())}
    for name, other, kind in _names(clip, _text_prefix(clip)):
        if kind == "stacked":
            state |= {other.format(part): tensor for part, tensor in zip("qkv", source[name].chunk(3), strict=True)}
        else:
            state[other] = source[name].T if kind == "transposed" else source[name]
    model.load_state_dict(state)
    return cast(nn.Module, model.eval())


def transformers_config(clip: Any) -> dict[str, Any]:
    """transformers' `CLIPConfig`, as keyword arguments, of an open_clip model.

    Raises:
        ClipFormatError: `CLIPModel` cannot hold the model; the message names what.
    """
    import open_clip

    _require(isinstance(clip, open_clip.CLIP | open_clip.CustomTextCLIP), "clip", type(clip).__name__)
    visual = clip.visual
    text = clip if isinstance(clip, open_clip.CLIP) else clip.text
    _require(type(visual) is open_clip.transformer.VisionTransformer, "clip.visual", type(visual).__name__)
    _require(text is clip or type(text) is open_clip.transformer.TextTransformer, "clip.text", type(text).__name__)
    _require(clip.logit_bias is None, "clip.logit_bias", "a bias of the logits")
    _require(visual.attn_pool is None, "clip.visual.attn_pool", "attentional pooling")
    _require(visual.pool_type == "tok", "clip.visual.pool_type", f"pooling {visual.pool_type!r}")
    _require(isinstance(visual.ln_pre, nn.LayerNorm), "clip.visual.ln_pre", "no LayerNorm before the blocks")
    for name, size in (("image_size", visual.image_size), ("patch_size", visual.patch_size)):
        _require(size[0] == size[1], f"clip.visual.{name}", f"{size[0]} x {size[1]}, which is not square")
    _require(visual.proj is not None, "clip.visual.proj", "no projection")
    pooling, eos_id = (clip.text_pool_type, clip.text_eos_id) if text is clip else (text.pool_type, text.eos_id)
    _require(pooling in ("argmax", "eos"), "text pooling", repr(pooling))
    _require(pooling == "argmax" or eos_id != ARGMAX_EOS, "text pooling", f"the end token id {eos_id}")
    _require(text.attn_mask is not None, "clip.text.attn_mask", "attention that is not causal")
    _require(getattr(text, "cls_emb", None) is None, "clip.text.cls_emb", "a class token")
    projection = text.text_projection
    _require(projection is not None, "text_projection", "no projection")
    _require(getattr(projection, "bias", None) is None, "text_projection", "a projection with a bias")
    vocab_size, width = text.token_embedding.weight.shape
    dim = visual.proj.shape[1]
    return {
        "projection_dim": dim,
        "vision_config": {
            "image_size": visual.image_size[0],
            "patch_size": visual.patch_size[0],
            "hidden_size": visual.conv1.out_channels,
            "projection_dim": dim,
            **_transformers_tower(visual.transformer, [visual.ln_pre, visual.ln_post], "clip.visual"),
        },
        "text_config": {
            "vocab_size": vocab_size,
            "max_position_embeddings": text.positional_embedding.shape[0],
            "hidden_size": width,
            "projection_dim": dim,
            "bos_token_id": vocab_size - 2,  # of CLIP's vocabularies the start token, whatever their size
            "eos_token_id": ARGMAX_EOS if pooling == "argmax" else eos_id,
            **_transformers_tower(text.transformer, [text.ln_final], "clip.text"),
        },
    }


def _transformers_tower(transformer: Any, norms: list[nn.LayerNorm], where: str) -> dict[str, Any]:
    import open_clip

    for block in transformer.resblocks:
        plain = type(block) is open_clip.transformer.ResidualAttentionBlock
        _require(plain, f"{where}.transformer", type(block).__name__)
        _require(isinstance(block.ls_1, nn.Identity), f"{where}.transformer", "blocks with LayerScale")
        norms = [*norms, block.ln_1, block.ln_2]
    eps = {norm.eps for norm in norms}
    _require(len(eps) == 1, f"{where}.transformer", f"LayerNorms of different eps {sorted(eps)}")
    block = transformer.resblocks[0]
    return {
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.c_fc.out_features,
        "layer_norm_eps": eps.pop(),
        "hidden_act": _hidden_act(block.mlp.gelu, where),
    }


def _hidden_act(activation: nn.Module, where: str) -> str:
    kind = type(activation).__name__
    if kind == "GELU":
        return "gelu" if activation.approximate == "none" else "gelu_pytorch_tanh"
    _require(kind == "QuickGELU", f"{where}.transformer", f"the activation {kind}")
    return "quick_gelu"


def _tower_config(config: Any) -> dict[str, Any]:
    width, hidden = config.hidden_size, config.intermediate_size
    ratio = hidden / width
    tower = {
        "width": width,
        "layers": config.num_hidden_layers,
        # open_clip truncates width * mlp_ratio.
        "mlp_ratio": ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,
    }
    return tower if config.layer_norm_eps == _EPS else {**tower, "norm_kwargs": {"eps": config.layer_norm_eps}}


def _names(clip: Any, text_prefix: str) -> Iterator[tuple[str, str, str]]:
    """Of every tensor but `logit_scale`: its name in open_clip and in transformers, and how the latter keeps it.

    `same`; `transposed`; or `stacked`: open_clip's is the three for q, k and v, whose letter goes into the braces.
    """
    text = clip if text_prefix == "" else clip.text
    yield "visual.proj", "visual_projection.weight", "transposed"
    if isinstance(text.text_projection, nn.Linear):
        yield f"{text_prefix}text_projection.weight", "text_projection.weight", "same"
    else:
        yield f"{text_prefix}text_projection", "text_projection.weight", "transposed"
    towers = (
        ("visual.", "vision_model.", _VISION, clip.visual.transformer),
        (text_prefix, "text_model.", _TEXT, text.transformer),
    )
    for prefix, other_prefix, names, transformer in towers:
        for name, other in names.items():
            yield prefix + name, other_prefix + other, "same"
        for index in range(len(transformer.resblocks)):
            block, other_block = f"{prefix}transformer.resblocks.{index}.", f"{other_prefix}encoder.layers.{index}."
            for name, other in _BLOCK.items():
                yield block + name, other_block + other, "same"
            for kind in ("weight", "bias"):
                yield f"{block}attn.in_proj_{kind}", f"{other_block}self_attn.{{}}_proj.{kind}", "stacked"


def _text_prefix(clip: nn.Module) -> str:
    return "text." if hasattr(clip, "text") else ""


def _require(holds: bool, where: str, got: str) -> None:
    if not holds:
        raise ClipFormatError(f"{where}: transformers' CLIPModel cannot hold {got}; export it for open_clip")
