from __future__ import annotations

import json
from typing import Any

import open_clip
import pytest
import torch

from fastsds.clip import ClipIdentity, ModelMismatchError
from fastsds.toyworld import models

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


def _clip(
    kind: str = "CLIP",
    *,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    **options: Any,
) -> Any:
    with torch.device("meta"):
        clip = getattr(open_clip, kind)(
            embed_dim=32, vision_cfg=VISION | (vision or {}), text_cfg=TEXT | (text or {}), **options
        )
    clip.visual.image_mean, clip.visual.image_std = mean, std
    return clip


def _recorded(clip: Any) -> dict[str, Any]:
    """As a checkpoint gives it back."""
    return json.loads(json.dumps(ClipIdentity.of(clip).to_json()))


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_the_same_architecture_matches_after_json(kind: str) -> None:
    ClipIdentity.of(_clip(kind)).require_match(_recorded(_clip(kind)))


def test_facts_are_the_models(clip: Any) -> None:
    clip.visual.image_mean, clip.visual.image_std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    identity = ClipIdentity.of(clip)
    assert identity.architecture == type(clip).__name__
    assert identity.activation == "GELU"
    assert (identity.context_length, identity.image_size) == (models.CONTEXT_LENGTH, 32)
    assert (identity.image_mean, identity.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_weights_are_no_part_of_the_identity(clip: Any) -> None:
    recorded = _recorded(clip)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(1.0)
    ClipIdentity.of(clip).require_match(recorded)


def test_a_model_built_without_create_model_has_an_identity(clip: Any) -> None:
    # only open_clip's factory notes the preprocessing on the model
    assert not hasattr(clip.visual, "image_mean")
    ClipIdentity.of(clip).require_match(_recorded(clip))


@pytest.mark.parametrize(("written", "loaded"), [(True, False), (False, True)])
def test_quick_gelu_against_gelu_is_explained(written: bool, loaded: bool) -> None:
    names = {True: "QuickGELU", False: "GELU"}
    message = (
        f"activation was '{names[written]}' when it was written and is '{names[loaded]}' in this model; "
        "GELU and QuickGELU have the same weights but other features"
    )
    with pytest.raises(ModelMismatchError, match=message):
        ClipIdentity.of(_clip(quick_gelu=loaded)).require_match(_recorded(_clip(quick_gelu=written)))


def test_the_approximation_of_gelu_is_part_of_the_identity() -> None:
    tanh = {"act_kwargs": {"approximate": "tanh"}}
    with pytest.raises(ModelMismatchError, match=r"activation was 'GELU-tanh' .* is 'GELU' in this model"):
        ClipIdentity.of(_clip()).require_match(_recorded(_clip(vision=tanh, text=tanh)))


@pytest.mark.parametrize(
    ("other", "fact"),
    [
        ({"kind": "CustomTextCLIP"}, "architecture was 'CustomTextCLIP'"),
        ({"vision": {"width": 48}}, "parameters was"),
        ({"text": {"width": 64}}, "parameters was"),
        ({"vision": {"layers": 2}}, "parameters was"),
        ({"text": {"context_length": 20}}, "parameters was"),
        ({"mean": (0.48, 0.46, 0.41)}, r"image_mean was \[0.48, 0.46, 0.41\] .* is \[0.5, 0.5, 0.5\]"),
        ({"std": (0.27, 0.26, 0.28)}, r"image_std was \[0.27, 0.26, 0.28\]"),
    ],
)
def test_another_model_is_named_by_the_fact_that_differs(other: dict[str, Any], fact: str) -> None:
    with pytest.raises(ModelMismatchError, match=f"checkpoint: {fact}.*load it into the model that it was trained on"):
        ClipIdentity.of(_clip()).require_match(_recorded(_clip(**other)))


@pytest.mark.parametrize("fact", ["architecture", "parameters", "activation", "context_length", "image_size"])
def test_a_missing_or_changed_fact_is_a_mismatch(fact: str) -> None:
    clip = _clip()
    recorded = _recorded(clip)
    with pytest.raises(ModelMismatchError, match=f"{fact} was 7 "):
        ClipIdentity.of(clip).require_match(recorded | {fact: 7})
    del recorded[fact]
    with pytest.raises(ModelMismatchError, match=f"{fact} was None "):
        ClipIdentity.of(clip).require_match(recorded)
