from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsds.evaluation import encode_captions, encode_images

TABLE = {"a": [3.0, 4.0, 0.0], "b": [0.0, 0.0, 2.0], "c": [0.0, -5.0, 0.0]}
UNIT = {"a": [0.6, 0.8, 0.0], "b": [0.0, 0.0, 1.0], "c": [0.0, -1.0, 0.0]}


def test_captions_that_come_twice_are_encoded_once_and_the_order_is_kept(stub_clip: Any) -> None:
    clip = stub_clip(TABLE)
    captions = ["b", "a", "b", "c", "a"]
    features = encode_captions(clip, clip.tokenizer, captions)
    torch.testing.assert_close(features, torch.tensor([UNIT[caption] for caption in captions]))
    assert clip.encoded_texts == [3]


def test_captions_go_in_batches(stub_clip: Any) -> None:
    clip = stub_clip(TABLE)
    features = encode_captions(clip, clip.tokenizer, ["c", "b", "a"], batch_size=2)
    torch.testing.assert_close(features, torch.tensor([UNIT["c"], UNIT["b"], UNIT["a"]]))
    assert clip.encoded_texts == [2, 1]


def test_images_go_in_batches_in_order(stub_clip: Any) -> None:
    clip = stub_clip(TABLE)
    images = torch.tensor([TABLE["a"], TABLE["b"], TABLE["c"]]).view(3, 3, 1, 1)
    features = encode_images(clip, images, batch_size=2)
    torch.testing.assert_close(features, torch.tensor([UNIT["a"], UNIT["b"], UNIT["c"]]))
    assert clip.encoded_images == [2, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_features_are_float32_without_a_graph(stub_clip: Any, dtype: torch.dtype) -> None:
    clip = stub_clip(TABLE).to(dtype)
    captions = encode_captions(clip, clip.tokenizer, ["a", "b"])
    images = encode_images(clip, torch.ones(2, 3, 1, 1, dtype=dtype))
    for features in (captions, images):
        assert features.dtype == torch.float32 and not features.requires_grad


def test_open_clips_own_features_are_given(clip: Any, clip_tokenizer: Any) -> None:
    captions = ["a red circle", "a blue square", "a red circle"]
    images = torch.randn(3, 3, 32, 32)
    texts = clip.encode_text(clip_tokenizer(captions)).detach()
    pictures = clip.encode_image(images).detach()
    found_texts, found_images = encode_captions(clip, clip_tokenizer, captions), encode_images(clip, images)
    torch.testing.assert_close(found_texts, texts / texts.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_images, pictures / pictures.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)
