from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from fastsds.clip.convert import open_clip_config, to_open_clip, to_transformers
from fastsds.clip.errors import ClipFormatError

SIZES: list[dict[str, Any]] = [
    {},
    {"vision": {"image_size": 30, "patch_size": 7, "hidden_size": 30, "num_attention_heads": 3}, "size": 30},
    {
        "vision": {"intermediate_size": 77, "num_hidden_layers": 3},
        "text": {"hidden_size": 42, "num_attention_heads": 7},
    },
    {"text": {"intermediate_size": 53, "num_hidden_layers": 1}, "vision": {"layer_norm_eps": 1e-6}},
]
"""Of a tiny model; 77 and 53 are no multiples of the width 32."""


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh", "gelu_new"])
def test_features_of_a_transformers_model_by_activation(
    activation: str, make_transformers_clip: Callable[..., Any], assert_same_features: Callable[..., None]
) -> None:
    act = {"hidden_act": activation}
    model = make_transformers_clip(vision=act, text=act)
    assert_same_features(to_open_clip(model), model)


def test_the_other_activation_would_be_noticed(
    make_transformers_clip: Callable[..., Any], assert_same_features: Callable[..., None]
) -> None:
    exact, quick = (
        make_transformers_clip(vision={"hidden_act": act}, text={"hidden_act": act}) for act in ("gelu", "quick_gelu")
    )
    with pytest.raises(AssertionError):
        assert_same_features(to_open_clip(quick), exact, rtol=1e-4)


@pytest.mark.parametrize("sizes", SIZES)
def test_features_of_a_transformers_model_by_size(
    sizes: dict[str, Any], make_transformers_clip: Callable[..., Any], assert_same_features: Callable[..., None]
) -> None:
    model = make_transformers_clip(vision=sizes.get("vision"), text=sizes.get("text"))
    assert_same_features(to_open_clip(model), model, size=sizes.get("size", 32))


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_features_of_an_open_clip_model(
    kind: str, quick_gelu: bool, make_open_clip: Callable[..., Any], assert_same_features: Callable[..., None]
) -> None:
    clip = make_open_clip(kind, quick_gelu=quick_gelu)
    assert_same_features(to_transformers(clip), clip)


@pytest.mark.parametrize(
    "config",
    [
        {"vision": {"image_size": 30, "patch_size": 7, "width": 30, "head_width": 10}, "size": 30},
        {"vision": {"mlp_ratio": 2.4375}, "text": {"mlp_ratio": 1.67, "width": 42, "heads": 7}},
        {"vision": {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}},
        {"vision": {"pos_embed_type": "sin_cos_2d", "final_ln_after_pool": True, "patch_dropout": 0.5}},
        {"text": {"pool_type": "eos", "eos_id": 63}},
        {"nonscalar_logit_scale": True},
        {"kind": "CustomTextCLIP", "text": {"proj_type": "linear", "pool_type": "argmax"}},
    ],
)
def test_features_of_open_clip_models_of_other_kinds(
    config: dict[str, Any], make_open_clip: Callable[..., Any], assert_same_features: Callable[..., None]
) -> None:
    config = dict(config)
    size = config.pop("size", 32)
    clip = make_open_clip(**config)
    assert_same_features(to_transformers(clip), clip, size=size)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_there_and_back_gives_the_same_tensors(quick_gelu: bool, make_open_clip: Callable[..., Any]) -> None:
    clip = make_open_clip(quick_gelu=quick_gelu, vision={"mlp_ratio": 2.4375})
    back = to_open_clip(to_transformers(clip)).state_dict()
    assert back.keys() == clip.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in clip.state_dict().items())


def test_the_default_configurations_are_vit_b_32() -> None:
    from transformers import CLIPConfig

    config = open_clip_config(CLIPConfig())
    expected = open_clip.get_model_config("ViT-B-32-quickgelu")
    with torch.device("meta"):
        ours, theirs = open_clip.CLIP(**config), open_clip.CLIP(**expected)
    shapes = [{name: tensor.shape for name, tensor in clip.state_dict().items()} for clip in (ours, theirs)]
    assert shapes[0] == shapes[1]
    heads = [[clip.visual.transformer.resblocks[0].attn.num_heads, clip.text_pool_type] for clip in (ours, theirs)]
    assert heads[0] == heads[1]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"kind": "CustomTextCLIP", "init_logit_bias": -10.0}, "clip.logit_bias: .* a bias of the logits"),
        ({"vision": {"attentional_pool": True, "attn_pooler_heads": 2}}, "clip.visual.attn_pool: .* attentional"),
        ({"vision": {"pool_type": "avg"}}, "clip.visual.pool_type: .* pooling 'avg'"),
        ({"vision": {"no_ln_pre": True}}, "clip.visual.ln_pre: "),
        ({"vision": {"image_size": (32, 16)}}, "clip.visual.image_size: .* 32 x 16"),
        ({"vision": {"ls_init_value": 0.1}}, "clip.visual.transformer: .* LayerScale"),
        ({"text": {"qk_norm": True}}, "clip.text.transformer: .* CustomResidualAttentionBlock"),
        ({"vision": {"layers": (1, 1, 1, 1), "width": 16, "head_width": 16}}, "clip.visual: .* ModifiedResNet"),
        ({"text": {"pool_type": "last"}}, "text pooling: .* 'last'"),
        ({"text": {"pool_type": "eos"}}, "text pooling: .* the end token id 2"),
        ({"text": {"no_causal_mask": True}}, "clip.text.attn_mask: .* not causal"),
        ({"text": {"proj_type": "none", "width": 24}}, "text_projection: .* no projection"),
        ({"text": {"proj_bias": True}}, "text_projection: .* with a bias"),
        ({"kind": "CustomTextCLIP", "text": {"embed_cls": True}}, "clip.text.cls_emb: "),
    ],
)
def test_what_clipmodel_cannot_hold_is_refused_by_name(
    config: dict[str, Any], named: str, make_open_clip: Callable[..., Any]
) -> None:
    with pytest.raises(ClipFormatError, match=rf"^{named}.*export it for open_clip$"):
        to_transformers(make_open_clip(**config))


def test_another_module_is_refused() -> None:
    with pytest.raises(ClipFormatError, match="clip: transformers' CLIPModel cannot hold Linear"):
        to_transformers(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"vision": {"hidden_act": "gelu"}},
            "quick_gelu, gelu, gelu_pytorch_tanh, gelu_new in both towers, got gelu (vision) and quick_gelu (text)",
        ),
        ({"vision": {"hidden_act": "relu"}, "text": {"hidden_act": "relu"}}, "got relu (vision) and relu (text)"),
        ({"vision": {"num_channels": 1}}, "num_channels: open_clip's CLIP takes 3, got 1"),
    ],
)
def test_what_open_clip_has_not_is_refused_by_name(
    config: dict[str, Any], message: str, make_transformers_clip: Callable[..., Any]
) -> None:
    with pytest.raises(ClipFormatError, match=re.escape(message)):
        to_open_clip(make_transformers_clip(**config))
