"""The architectures of the toy world: one tokenizer, a tiny CLIP, a tiny Stable Diffusion."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from fastsds.toyworld.scenes import COLOURS, IMAGE_SIZE, RELATIONS, SHAPES, SINGLE_TEMPLATES, SIZES

CONTEXT_LENGTH = 12  # tokens; the longest caption has 10
START, END = "<|startoftext|>", "<|endoftext|>"

CLIP_CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "width": 128, "heads": 4, "layers": 3},
}
CLIP_MEAN = CLIP_STD = (0.5, 0.5, 0.5)

VAE_CONFIG = {
    "sample_size": IMAGE_SIZE,
    "block_out_channels": (16, 32, 48),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
}
UNET_CONFIG = {
    "sample_size": IMAGE_SIZE // 4,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 64,
}
TEXT_ENCODER_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT_LENGTH,
    "projection_dim": 64,
}
SCHEDULER_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def write_tokenizer(folder: Path) -> None:
    """Writes a CLIP byte-pair tokenizer that knows the toy world's words whole and spells every other lower-case one.

    The end token has the highest id, as in CLIP, so that pooling by `argmax` finds it.
    """
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in _words():
        while len(pieces := _split(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
            vocabulary.append(pieces[0] + pieces[1])
    vocabulary += [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "vocab.json": json.dumps({token: index for index, token in enumerate(vocabulary)}),
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT_LENGTH)
    tokenizer.save_pretrained(folder)


def _split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The byte-pair pieces of a word: of the merges that apply, the earliest first."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while pairs := set(itertools.pairwise(pieces)) & set(merges):
        first = min(pairs, key=merges.index)
        at = list(itertools.pairwise(pieces)).index(first)
        pieces[at : at + 2] = ["".join(first)]
    return pieces


def _words() -> list[str]:
    phrases = (*SIZES, *COLOURS, *SHAPES, *RELATIONS, *SINGLE_TEMPLATES, "a", "and", "of", "the")
    words = {word for phrase in phrases for word in phrase.split() if word.isalpha()}
    return sorted(words, key=lambda word: (len(word), word))
