"""Context vectors: where they start, and how they attend to the image."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsds.clip import PrefixTextEncoder
from fastsds.intcoop.prompts import ConditionedContext, start_context


def test_conditioned_context_starts_at_the_context_itself() -> None:
    context = torch.randn(4, 16)
    conditioned = ConditionedContext(context.clone(), image_width=12, heads=2)
    torch.testing.assert_close(conditioned(torch.randn(3, 5, 12)), context.expand(3, -1, -1))


def test_context_vectors_attend_to_the_patches() -> None:
    conditioned = ConditionedContext(torch.randn(4, 16), image_width=12, heads=2).double()
    for parameter in conditioned.parameters():
        torch.nn.init.normal_(parameter)
    patches = torch.randn(3, 5, 12, dtype=torch.float64)
    attention = conditioned.attention
    bias_q, bias_k, bias_v = attention.in_proj_bias.chunk(3)
    q = conditioned.context @ attention.q_proj_weight.T + bias_q
    k, v = patches @ attention.k_proj_weight.T + bias_k, patches @ attention.v_proj_weight.T + bias_v
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        weights = torch.softmax(q[:, head] @ k[..., head].transpose(1, 2) / 8**0.5, dim=-1)
        heads.append(weights @ v[..., head])
    attended = torch.cat(heads, dim=-1) @ attention.out_proj.weight.T + attention.out_proj.bias
    torch.testing.assert_close(conditioned(patches), conditioned.context + attended)


def test_heads_divide_the_width() -> None:
    with pytest.raises(ValueError, match="heads: expected a divisor of the text width 16, got 3"):
        ConditionedContext(torch.randn(4, 16), image_width=12, heads=3)


def test_context_starts_as_words_or_at_random(clip: Any, clip_tokenizer: Any) -> None:
    encoder = PrefixTextEncoder(clip, ["circle"], tokenizer=clip_tokenizer)
    table = getattr(clip, "text", clip).token_embedding.weight
    words = clip_tokenizer(["a photo of a"])[0][1:5]
    torch.testing.assert_close(start_context(encoder, 4, "a photo of a"), table[words])
    drawn = start_context(encoder, 64, None)
    assert drawn.shape == (64, 32)
    assert 0.018 < drawn.std().item() < 0.022


@pytest.mark.parametrize(
    ("length", "text", "message"),
    [
        (3, "a photo of a", "context_init: expected 3 tokens, as context_length says, got 4 in 'a photo of a'"),
        (0, None, "context_length: expected at least 1, got 0"),
    ],
)
def test_context_that_does_not_fit_is_refused(
    clip: Any, clip_tokenizer: Any, length: int, text: str | None, message: str
) -> None:
    encoder = PrefixTextEncoder(clip, ["circle"], tokenizer=clip_tokenizer)
    with pytest.raises(ValueError, match=message):
        start_context(encoder, length, text)
