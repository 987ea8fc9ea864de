"""ARO's word-order benchmarks: captions in wrong order, drawn once and stored."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fastsds.evaluation.records import read_rows

Tagger = Callable[[str], Sequence[tuple[str, str]]]
"""From a caption to its tokens, each with its Penn Treebank tag: `[("a", "DT"), ("red", "JJ"), ("car", "NN")]`."""

_MAX_WORDS = 30  # ARO's
_TOKEN = re.compile(r"'\w+|\w+(?:-\w+)*|[^\w\s]")


def write_shuffles(captions: Path, out: Path, tagger: Tagger, seed: int = 0) -> int:
    """Draws the options of COCO-Order or Flickr30k-Order and stores them, so that every model sees the same.

    Captions none of whose shuffles reads otherwise, such as those of one word, are left out.

    Args:
        captions: `coco_karpathy_test.json` or `flickr30k_test.json`: rows `{"image", "caption": [...]}`.
        out: receives rows `{"image", "caption", "options"}`, which `aro.read_order` reads.
        tagger: ARO uses spaCy's `en_core_web_sm`: `lambda text: [(word.text, word.tag_) for word in nlp(text)]`.
        seed: of the draws.

    Returns:
        The number of rows.

    Raises:
        DataError: captions that cannot be read.
    """
    rng = random.Random(seed)
    drawn = (
        {"image": row["image"], "caption": caption, "options": caption_options(caption, tagger, rng)}
        for row in read_rows(captions, {"image": str, "caption": list})
        for caption in row["caption"]
    )
    rows = [row for row in drawn if len(set(row["options"])) > 1]
    staging = out.with_name(f".{out.name}.partial")
    staging.write_text(json.dumps(rows), encoding="utf-8")
    os.replace(staging, out)
    return len(rows)


def caption_options(caption: str, tagger: Tagger, rng: random.Random) -> list[str]:
    """The caption and ARO's four shuffles of it.

    Nouns among nouns and adjectives among adjectives; everything but these; the words within each three; the threes.
    The last two need no tagger: a token is a word or a punctuation mark. (ARO's come from NLTK, which splits
    contractions elsewhere.) All five are cleaned as ARO cleans captions.
    """
    tagged = tagger(caption)
    words = [word for word, _ in tagged]
    nouns = [at for at, (_, tag) in enumerate(tagged) if tag.startswith("NN")]
    adjectives = [at for at, (_, tag) in enumerate(tagged) if tag.startswith("JJ")]
    others = sorted(set(range(len(words))) - {*nouns, *adjectives})
    tokens = _TOKEN.findall(caption)
    threes = [tokens[start : start + 3] for start in range(0, len(tokens), 3)]
    within = [word for three in threes for word in rng.sample(three, len(three))]
    moved = [word for three in rng.sample(threes, len(threes)) for word in three]
    shuffled = (
        _permuted(_permuted(words, nouns, rng), adjectives, rng), _permuted(words, others, rng), within, moved,
    )  # fmt: skip
    return [clean_caption(caption), *(clean_caption(" ".join(option)) for option in shuffled)]


def clean_caption(caption: str, max_words: int = _MAX_WORDS) -> str:
    """ARO's preparation: lower case, without ``. ! " ( ) * # : ; ~``, single spaces, the first `max_words` words."""
    kept = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
    return " ".join(kept.split()[:max_words])


def _permuted(words: Sequence[str], positions: Sequence[int], rng: random.Random) -> list[str]:
    result = list(words)
    for at, taken in zip(positions, rng.sample(positions, len(positions)), strict=True):
        result[at] = words[taken]
    return result
