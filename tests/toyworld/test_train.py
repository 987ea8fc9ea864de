"""The recipe in miniature: it writes genuine folders that the public loaders read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastsds.toyworld import load_clip, load_teacher
from fastsds.toyworld.train import TrainConfig, main


def test_recipe_writes_what_the_loaders_read(tmp_path: Path) -> None:
    config = TrainConfig(
        out=tmp_path / "weights",
        clip_steps=2,
        clip_batch=4,
        vae_steps=2,
        vae_batch=2,
        teacher_scenes=8,
        teacher_binding_steps=2,
        teacher_full_steps=1,
        teacher_batch=4,
        report_pairs=2,
    )
    main(config)
    clip, preprocess, tokenizer = load_clip(config.out / "clip")
    assert clip.encode_text(tokenizer(["a red circle"])).shape == (1, 128)
    assert clip.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 128)
    assert preprocess is not None
    teacher = load_teacher(config.out / "teacher")
    assert teacher.schedule.prediction_type == "v_prediction"
    assert teacher.latent_shape == (4, 8, 8)
    assert (tmp_path / "weights-samples.png").is_file()
    assert sorted(path.name for path in config.out.iterdir()) == ["clip", "teacher"]


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parts: expected any of clip, vae, teacher, report; got"):
        main(TrainConfig(out=tmp_path, parts=("decoder",)))
