"""The baselines against CLIP's own text tower run on the prompts in words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsds.intcoop import CoCoOp, CoOp, IntCoOp, ZeroShot

CLASSNAMES = ("circle", "large square", "ring")


def _of_words(clip: Any, tokenizer: Any, template: str, classnames: tuple[str, ...] = CLASSNAMES) -> Tensor:
    return clip.encode_text(tokenizer([template.format(name) for name in classnames]), normalize=True)


def _logits(clip: Any, images: Tensor, classes: Tensor) -> Tensor:
    return clip.logit_scale.exp() * clip.encode_image(images, normalize=True) @ classes.T


def test_zero_shot_is_the_mean_over_its_templates(clip: Any, clip_tokenizer: Any, images: Tensor) -> None:
    templates = ("a photo of a {}.", "{}", "a picture of the {}.")
    model = ZeroShot(clip, CLASSNAMES, tokenizer=clip_tokenizer, templates=templates)
    mean = torch.stack([_of_words(clip, clip_tokenizer, template) for template in templates]).mean(dim=0)
    torch.testing.assert_close(model(images), _logits(clip, images, F.normalize(mean, dim=-1)), rtol=1e-4, atol=1e-4)
    assert model.trained_parameters() == {}
    novel = model.for_classes(["cross"])
    assert novel.text_features(novel.encode_images(images)).shape == (1, 1, 32)


@pytest.mark.parametrize("templates", [(), ("a photo",), ("a {} of {}",)])
def test_templates_without_a_place_for_the_class_are_refused(
    clip: Any, clip_tokenizer: Any, templates: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=r"templates: expected at least one, each with one \{\} for the class name"):
        ZeroShot(clip, CLASSNAMES, tokenizer=clip_tokenizer, templates=templates)


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize(
    ("position", "template"),
    [("end", "a photo of a {}."), ("middle", "a photo {} of a."), ("front", "{} a photo of a.")],
)
def test_coop_starts_as_its_words(
    clip: Any, clip_tokenizer: Any, images: Tensor, class_specific: bool, position: Any, template: str
) -> None:
    model = CoOp(
        clip, CLASSNAMES, tokenizer=clip_tokenizer, class_specific=class_specific, class_position=position
    )  # fmt: skip
    expected = _logits(clip, images, _of_words(clip, clip_tokenizer, template))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert model.context.shape == ((3, 4, 32) if class_specific else (4, 32))


def test_coop_with_a_context_per_class(
    clip: Any, clip_tokenizer: Any, dense: Callable[..., Tensor], images: Tensor
) -> None:
    model = CoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer, context_length=2, context_init=None, class_specific=True)
    torch.nn.init.normal_(model.context)
    classes = [dense(clip, vectors, f"{name}.") for vectors, name in zip(model.context, CLASSNAMES, strict=True)]
    expected = _logits(clip, images, F.normalize(torch.stack(classes), dim=-1))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="classnames: a class-specific context has no vectors for other classes"):
        model.for_classes(["cross"])


def test_cocoop_shifts_the_context_by_the_image(
    clip: Any, clip_tokenizer: Any, dense: Callable[..., Tensor], images: Tensor
) -> None:
    model = CoCoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer, reduction=4)
    assert model.shift[0].out_features == 8
    first, last = model.shift[0], model.shift[2]
    embedding = clip.encode_image(images, normalize=True)
    hidden = (embedding @ first.weight.T + first.bias).clamp(min=0)
    shifts = hidden @ last.weight.T + last.bias
    for row, shift in enumerate(shifts):
        classes = torch.stack([dense(clip, model.context + shift, f"{name}.") for name in CLASSNAMES])
        expected = _logits(clip, images[row : row + 1], F.normalize(classes, dim=-1))
        torch.testing.assert_close(model(images)[row : row + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [CoOp, CoCoOp])
def test_baselines_have_one_loss_and_train_no_part_of_clip(
    clip: Any, clip_tokenizer: Any, images: Tensor, method: Any
) -> None:
    model = method(clip, CLASSNAMES, tokenizer=clip_tokenizer)
    labels = torch.tensor([0, 2, 1])
    losses = model.losses(model.encode_images(images), labels)
    torch.testing.assert_close(losses.loss, F.cross_entropy(model(images), labels))
    assert (losses.attribute, losses.regulariser) == (0, 0)
    losses.loss.backward()
    assert all(parameter.grad is not None for parameter in model.trained_parameters().values())
    assert not any(name.startswith("clip.") for name in model.trained_parameters())


def test_new_classes_leave_a_model_as_it_was(clip: Any, clip_tokenizer: Any, images: Tensor) -> None:
    for method in (ZeroShot, CoOp, CoCoOp, IntCoOp):
        model = method(clip, CLASSNAMES, tokenizer=clip_tokenizer).eval()
        before = model(images)
        assert model.for_classes(["cross", "diamond"])(images).shape == (3, 2)
        torch.testing.assert_close(model(images), before)
        assert model.classnames == CLASSNAMES


def test_options_of_the_encoder_reach_it_for_new_classes_too(clip: Any, clip_tokenizer: Any) -> None:
    model = CoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer, class_chunk=2, class_position="front")
    other = model.for_classes(["cross"])
    assert (other.encoder.class_chunk, other.encoder.class_position) == (2, "front")


@pytest.mark.parametrize("context_init", ["a photo of a", None])
def test_the_context_lies_where_the_model_does(clip: Any, clip_tokenizer: Any, context_init: str | None) -> None:
    clip.to("meta")
    getattr(clip, "text", clip).attn_mask = torch.full((12, 12), -torch.inf).triu(1)  # is looked at
    assert CoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer, context_init=context_init).context.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", [ZeroShot, CoOp, CoCoOp, IntCoOp])
def test_clip_of_another_dtype(clip: Any, clip_tokenizer: Any, images: Tensor, method: Any, dtype: torch.dtype) -> None:
    """What is learned stays float32; logits are of float32 or wider, and near those of the same weights in float32."""
    clip.to(dtype)
    torch.manual_seed(1)
    expected = method(copy.deepcopy(clip).float(), CLASSNAMES, tokenizer=clip_tokenizer)(images.to(dtype).float())
    torch.manual_seed(1)
    model = method(clip, CLASSNAMES, tokenizer=clip_tokenizer)
    logits = model(images.to(dtype))
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    assert (logits - expected).abs().max() <= tolerance * clip.logit_scale.exp()
    assert {parameter.dtype for parameter in model.trained_parameters().values()} <= {torch.float32}
    loss = model.losses(model.encode_images(images.to(dtype)), torch.tensor([0, 1, 2]), ["red", "blue", "red"]).loss
    assert loss.dtype == logits.dtype
    for parameter in model.trained_parameters().values():
        (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        assert gradient.isfinite().all()
