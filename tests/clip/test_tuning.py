from __future__ import annotations

import re
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from fastsds.clip import select_parameters, set_tuned


def _vit_b_32() -> nn.Module:
    with torch.device("meta"):
        return open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))


def test_layernorm_of_vit_b_32_is_the_papers_65536_numbers() -> None:
    selected = select_parameters(_vit_b_32(), "layernorm")
    assert sum(parameter.numel() for parameter in selected.values()) == 65_536
    # 2 per block, ln_pre, ln_post and ln_final: a scale and a shift each
    assert len(selected) == 2 * (2 * 12 + 2 * 12 + 3)
    assert all(re.search(r"(^|\.)ln_(1|2|pre|post|final)\.(weight|bias)$", name) for name in selected)


def test_layernorm_selects_every_norm_of_both_towers_and_nothing_else(clip: Any) -> None:
    selected = select_parameters(clip, "layernorm")
    text = "text." if type(clip).__name__ == "CustomTextCLIP" else ""
    blocks = [
        f"{tower}transformer.resblocks.{block}.{norm}"
        for tower in ("visual.", text)
        for block in range(2)
        for norm in ("ln_1", "ln_2")
    ]
    norms = [*blocks, "visual.ln_pre", "visual.ln_post", f"{text}ln_final"]
    assert set(selected) == {f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")}


def test_selected_parameters_are_the_models_own_in_its_order(clip: Any) -> None:
    named = dict(clip.named_parameters())
    selected = select_parameters(clip, "layernorm")
    assert all(parameter is named[name] for name, parameter in selected.items())
    assert list(selected) == [name for name in named if name in selected]


def test_projector_selects_nothing_and_all_selects_everything(clip: Any) -> None:
    assert select_parameters(clip, "projector") == {}
    assert list(select_parameters(clip, "all")) == [name for name, _ in clip.named_parameters()]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"^logit_scale$", {"logit_scale"}),
        (r"1\.ln_1\.bias$", {"visual.transformer.resblocks.1.ln_1.bias", "transformer.resblocks.1.ln_1.bias"}),
        (r"^visual\.(proj|class_embedding)$", {"visual.proj", "visual.class_embedding"}),
    ],
)
def test_regular_expression_is_searched_in_the_names(clip: Any, pattern: str, expected: set[str]) -> None:
    if type(clip).__name__ == "CustomTextCLIP":
        expected = {re.sub("^transformer", "text.transformer", name) for name in expected}
    assert set(select_parameters(clip, pattern)) == expected


def test_set_tuned_freezes_the_others_and_thaws_what_was_frozen(clip: Any) -> None:
    clip.requires_grad_(False)
    selected = set_tuned(clip, "layernorm")
    assert {name for name, parameter in clip.named_parameters() if parameter.requires_grad} == set(selected)
    set_tuned(clip, "^logit_scale$")
    assert [name for name, parameter in clip.named_parameters() if parameter.requires_grad] == ["logit_scale"]
    set_tuned(clip, "projector")
    assert not any(parameter.requires_grad for parameter in clip.parameters())


def test_bad_expression_is_named_with_its_error(clip: Any) -> None:
    with pytest.raises(
        ValueError, match=r"tune: expected layernorm, projector, all or a regular .*got 'ln_\(': .*unterm"
    ):
        select_parameters(clip, "ln_(")


def test_expression_without_a_match_shows_names_and_freezes_nothing(clip: Any) -> None:
    count = len(list(clip.parameters()))
    with pytest.raises(
        ValueError, match=rf"tune: 'lora_a' matches none of the model's {count} parameters \(\w+.*, …\)"
    ):
        set_tuned(clip, "lora_a")
    assert all(parameter.requires_grad for parameter in clip.parameters())


def test_model_without_layernorm_is_refused() -> None:
    with pytest.raises(ValueError, match="'layernorm' matches none"):
        select_parameters(nn.Linear(2, 2), "layernorm")
