"""IntCoOp against its prompts run densely, its losses against their formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsds.clip import ModelMismatchError
from fastsds.intcoop import IntCoOp

CLASSNAMES = ("circle", "large square", "ring")
WORDS = ("red", "small", "large blue")


@pytest.fixture
def model(clip: Any, clip_tokenizer: Any) -> IntCoOp:
    """With every trained tensor away from where it starts."""
    model = IntCoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer, attributes=WORDS, context_length=2, context_init=None)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _class_features(model: IntCoOp, dense: Any, images: Tensor, classnames: tuple[str, ...] = CLASSNAMES) -> Tensor:
    """`[images, classes, dim]` of unit length, every prompt run alone with all its tokens."""
    features = model.encode_images(images)
    context, attribute = model.conditioned(features["patches"]), model.extractor(features["tokens"])
    rows = [
        torch.stack([dense(model.clip, torch.cat([vectors, word.unsqueeze(0)]), f"{name}.") for name in classnames])
        for vectors, word in zip(context, attribute, strict=True)
    ]
    return F.normalize(torch.stack(rows), dim=-1)


def test_logits_are_those_of_the_dense_prompts(model: IntCoOp, dense: Callable[..., Tensor], images: Tensor) -> None:
    text = _class_features(model, dense, images)
    image = model.clip.encode_image(images, normalize=True)
    expected = model.clip.logit_scale.exp() * (text @ image.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert model.classify(images) == [CLASSNAMES[row] for row in expected.argmax(dim=1).tolist()]


def test_other_classes_share_the_trained_tensors(model: IntCoOp, dense: Callable[..., Tensor], images: Tensor) -> None:
    before = model(images)
    others = ("cross", "small diamond")
    other = model.for_classes(others)
    text = _class_features(model, dense, images, others)
    image = model.clip.encode_image(images, normalize=True)
    expected = model.clip.logit_scale.exp() * (text @ image.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(other(images), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(images), before)
    own = model.trained_parameters()
    assert all(parameter is own[name] for name, parameter in other.trained_parameters().items())


@pytest.mark.parametrize("space", ["token", "text"])
def test_losses_are_their_formulas(
    clip: Any, clip_tokenizer: Any, dense: Callable[..., Tensor], images: Tensor, space: Any
) -> None:
    model = IntCoOp(
        clip, CLASSNAMES, tokenizer=clip_tokenizer, attribute_space=space, attribute_weight=3.0, regulariser_weight=0.5
    )
    torch.nn.init.normal_(model.extractor.head.weight, std=0.1)
    labels, attributes = torch.tensor([2, 0, 1]), ["red", "large blue", "red"]
    features = model.encode_images(images)
    losses = model.losses(features, labels, attributes)
    predicted = model.extractor(features["tokens"])
    table = getattr(clip, "text", clip).token_embedding.weight
    if space == "token":
        ids = [clip_tokenizer([word])[0] for word in attributes]
        targets = torch.stack([table[row[1 : int(row.argmax())]].mean(dim=0) for row in ids])
    else:
        targets = clip.encode_text(clip_tokenizer(attributes), normalize=True)
    torch.testing.assert_close(losses.attribute, (predicted - targets).square().sum(dim=1).mean())
    text = _class_features(model, dense, images)
    prompts = [f"a photo of a {word} {name}." for word in attributes for name in CLASSNAMES]
    written = clip.encode_text(clip_tokenizer(prompts), normalize=True).view(3, 3, -1)
    torch.testing.assert_close(losses.regulariser, (text - written).square().sum(dim=-1).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.classification, F.cross_entropy(model(images), labels))
    total = losses.classification + 3.0 * losses.attribute + 0.5 * losses.regulariser
    torch.testing.assert_close(losses.loss, total)


def test_gradients_reach_what_is_trained_and_nothing_of_clip(model: IntCoOp, images: Tensor) -> None:
    model.losses(model.encode_images(images), torch.tensor([0, 1, 2]), ["red", "small", "red"]).loss.backward()
    trained = model.trained_parameters()
    assert {name.split(".")[0] for name in trained} == {"extractor", "conditioned"}
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in trained.values())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.clip.parameters())


def test_handwritten_prompts_are_encoded_once(model: IntCoOp, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    encode = model.encoder.encode_text
    monkeypatch.setattr(model.encoder, "encode_text", lambda texts: asked.append(list(texts)) or encode(texts))
    first = model.handwritten_features(["red", "small", "red"])
    again = model.handwritten_features(["small", "red"])
    assert asked == [[f"a photo of a {word} {name}." for name in CLASSNAMES] for word in ("red", "small")]
    torch.testing.assert_close(again, first[[1, 0]])
    # Other classes have prompts of their own.
    assert model.for_classes(["cross"]).handwritten_features(["red"]).shape == (1, 1, 32)


def test_what_is_kept_does_not_depend_on_autocast(model: IntCoOp) -> None:
    expected = copy.deepcopy(model).handwritten_features(["red"])
    with torch.autocast("cpu", torch.bfloat16):
        model.handwritten_features(["red"])
    assert torch.equal(model.handwritten_features(["red"]), expected)


def test_what_is_kept_follows_the_model_to_its_device(model: IntCoOp) -> None:
    model.handwritten_features(["red"])
    model.attribute_targets(["red"])
    model.to("meta")
    assert model.handwritten_features(["red"]).device.type == model.attribute_targets(["red"]).device.type == "meta"


def test_clip_stays_in_evaluation_mode(model: IntCoOp) -> None:
    model.train()
    assert model.extractor.training
    assert not any(module.training for module in model.clip.modules())


def test_explain_names_the_word_that_is_predicted(model: IntCoOp, clip: Any, images: Tensor) -> None:
    table = getattr(clip, "text", clip).token_embedding.weight
    small = table[int(model.tokenizer(["small"])[0][1])]
    with torch.no_grad():
        model.extractor.head.weight.zero_()
        model.extractor.head.bias.copy_(2 * small)
    explanation = model.explain(images, top=2)
    assert [words[0] for words in explanation.words] == ["small"] * 3
    torch.testing.assert_close(explanation.similarities[:, 0], torch.ones(3))
    assert bool((explanation.similarities[:, 1] < 1).all())
    assert explanation.classnames == model.classify(images)
    assert model.explain(images, words=["green"]).words == [["green"]] * 3


def test_explanation_has_a_picture_of_every_image(model: IntCoOp, images: Tensor) -> None:
    explanation = model.explain(images, top=2)
    titles = [axis.get_title() for axis in explanation.figure(images.sigmoid(), columns=2).axes]
    for title, name, words in zip(titles, explanation.classnames, explanation.words, strict=False):
        first, *rest = title.splitlines()
        assert first == name
        assert [line.rsplit(" ", 1)[0] for line in rest] == words
    assert titles[3] == ""
    with pytest.raises(ValueError, match="images: expected the 3 that were explained, got 2"):
        explanation.figure(images[:2])


def test_explain_without_words_says_where_they_come_from(model: IntCoOp, images: Tensor) -> None:
    model.attributes = ()
    with pytest.raises(ValueError, match=r"words: expected attribute words .*, got none; pass some or train the model"):
        model.explain(images)
    with pytest.raises(ValueError, match="top: expected at least 1, got 0"):
        model.explain(images, words=["red"], top=0)


def test_checkpoints_of_other_models_are_refused(model: IntCoOp, clip_tokenizer: Any) -> None:
    recorded = model.identity()
    model.require_identity(recorded)
    with pytest.raises(ModelMismatchError, match=r"classnames was \['ring'\] when it was written"):
        model.require_identity({**recorded, "classnames": ["ring"]})
    with pytest.raises(ModelMismatchError, match="method was 'CoOp' when it was written and is 'IntCoOp'"):
        model.require_identity({**recorded, "method": "CoOp"})
    other = copy.deepcopy(recorded)
    other["clip"]["activation"] = "QuickGELU"
    with pytest.raises(ModelMismatchError, match="activation was 'QuickGELU'"):
        model.require_identity(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classnames": ["ring", "circle", "ring"]}, r"classnames: expected each name once, .*\['ring'\]"),
        ({"classnames": ["ring", " "]}, r"classnames: expected names, got empty ones at \[1\]"),
        ({"attribute_weight": -1.0}, r"attribute_weight: expected a number >= 0, got -1\.0"),
        ({"regulariser_weight": float("inf")}, "regulariser_weight: expected a number >= 0, got inf"),
    ],
)
def test_bad_options_are_named(clip: Any, clip_tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IntCoOp(clip, **{"classnames": CLASSNAMES, "tokenizer": clip_tokenizer, **options})


def test_losses_need_an_attribute_for_every_image(model: IntCoOp, images: Tensor) -> None:
    features, labels = model.encode_images(images), torch.tensor([0, 1, 2])
    for attributes, got in ((None, "none"), (["red"], "1")):
        with pytest.raises(ValueError, match=f"attributes: expected one for each of 3 images, got {got}"):
            model.losses(features, labels, attributes)
    with pytest.raises(ValueError, match="attributes: expected a word each, got ' '"):
        model.losses(features, labels, ["red", " ", "red"])


def test_text_targets_need_a_joint_embedding_of_the_text_width(clip_tokenizer: Any, images: Tensor) -> None:
    narrow = open_clip.CLIP(
        embed_dim=24,
        vision_cfg={"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        text_cfg={
            "context_length": 12, "vocab_size": len(clip_tokenizer.tokenizer), "width": 32, "heads": 2, "layers": 2
        },
    )  # fmt: skip
    model = IntCoOp(narrow, CLASSNAMES, tokenizer=clip_tokenizer, attribute_space="text")
    with pytest.raises(ValueError, match="attribute_space: text needs a joint embedding of the text tower's width 32"):
        model.losses(model.encode_images(images), torch.tensor([0, 1, 2]), ["red"] * 3)


def test_a_convolutional_tower_is_refused_by_name(clip_tokenizer: Any) -> None:
    resnet = open_clip.CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        text_cfg={
            "context_length": 12, "vocab_size": len(clip_tokenizer.tokenizer), "width": 32, "heads": 2, "layers": 2
        },
    )  # fmt: skip
    with pytest.raises(TypeError, match="got ModifiedResNet"):
        IntCoOp(resnet, CLASSNAMES, tokenizer=clip_tokenizer)
