"""The embedded default: procedural scenes, a tiny CLIP and a tiny diffusion teacher, with their weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsds.diffusion.teacher import DiffusionTeacher

WEIGHTS = Path(__file__).parent / "weights"
CLIP_FOLDER, TEACHER_FOLDER = WEIGHTS / "clip", WEIGHTS / "teacher"
NOISIEST = (850, 1000)
"""The timesteps at which the teacher's caption alone says what goes where."""

__all__ = ["CLIP_FOLDER", "NOISIEST", "TEACHER_FOLDER", "load_clip", "load_teacher"]


def load_clip(folder: Path = CLIP_FOLDER) -> tuple[Any, Any, Any]:
    """The tiny CLIP as open_clip loads it: model (in evaluation mode), preprocessing, tokenizer."""
    import open_clip

    name = f"local-dir:{folder}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


def load_teacher(folder: Path = TEACHER_FOLDER) -> DiffusionTeacher:
    """The tiny teacher, from its diffusers Stable Diffusion folder."""
    from fastsds.diffusion.teacher import DiffusionTeacher

    return DiffusionTeacher.from_pretrained(folder)
