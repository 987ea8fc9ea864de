"""The baselines of the text tower's GPU figures compute what ours computes; no figure is judged here."""

from __future__ import annotations

import json
from typing import Any

import open_clip
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import text_tower_gpu
from benchmarks.packed import Packed


@pytest.fixture
def small_clip() -> Any:
    """Two layers of the width that the benchmark learns for, over the real vocabulary."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    return open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).eval().requires_grad_(False)


def test_flex_attention_attends_as_the_op_does() -> None:
    packed = Packed(2, 20, torch.device("cpu"))
    packed.qkv, packed.prefix = packed.qkv.detach(), [each.detach() for each in packed.prefix]
    torch.testing.assert_close(packed.flex(flex_attention, packed.block_mask()), packed.ours(), rtol=1e-4, atol=1e-5)


def test_figures_of_a_small_tower(small_clip: Any) -> None:
    figures = text_tower_gpu.measure(torch.device("cpu"), classes=3, batch=5, rounds=1, clip=small_clip)
    assert figures["relative_error"] <= text_tower_gpu.MOST_ERROR
    ours = figures["sides"]["fastsds"]["ms_per_image"]
    for name in ("loop", "loop, torch.compile"):
        side = figures["sides"][name]
        assert side["over_fastsds"] == pytest.approx(side["ms_per_image"] / ours)
    json.dumps(figures)


def test_the_gate_refuses_a_loop_that_computes_something_else(small_clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = text_tower_gpu.text_tower.loop
    monkeypatch.setattr(text_tower_gpu.text_tower, "loop", lambda *given: [1.5 * each for each in loop(*given)])
    with pytest.raises(AssertionError, match=r"expected results equal to 0.05, got a relative error of 0\.3"):
        text_tower_gpu.measure(torch.device("cpu"), classes=3, batch=5, rounds=1, clip=small_clip)
