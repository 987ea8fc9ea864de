"""The toy tokenizer knows every word of the toy world whole, so that no caption is cut."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fastsds.toyworld import load_clip, load_teacher
from fastsds.toyworld.models import CONTEXT_LENGTH, write_tokenizer
from fastsds.toyworld.scenes import COLOURS, SHAPES, SIZES, random_pair, random_single, training_caption


def test_a_word_is_one_token(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    for word in (*COLOURS, *SHAPES, *SIZES, "above", "below", "left", "right", "of", "and", "a", "photo", "picture"):
        start, *pieces, end = tokenizer(word).input_ids
        assert len(pieces) == 1, f"{word}: {tokenizer.convert_ids_to_tokens(pieces)}"
        assert (start, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_other_words_are_spelled(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("a quick brown fox").input_ids, skip_special_tokens=True).strip() == (
        "a quick brown fox"
    )


@pytest.mark.parametrize("model", ["clip", "teacher"])
def test_no_caption_is_cut(model: str) -> None:
    tokenizer = load_clip()[2].tokenizer if model == "clip" else load_teacher().tokenizer
    rng = random.Random(0)
    captions = [training_caption(random_single(rng), rng) for _ in range(300)]
    captions += [random_pair(rng).caption for _ in range(300)]
    assert max(len(tokenizer(caption).input_ids) for caption in captions) <= CONTEXT_LENGTH
