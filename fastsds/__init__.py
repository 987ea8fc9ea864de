"""fastsds: distil a text-to-image diffusion model into CLIP, and prompt-tune CLIP with predicted attributes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsds import ops, toyworld
    from fastsds.clip import ClipSource, LoadedCLIP, PrefixTextEncoder
    from fastsds.data import CaptionDataset
    from fastsds.diffusion import DiffusionScorer, DiffusionTeacher, NoiseSchedule, SDSLoss, TeacherSource
    from fastsds.intcoop import IntCoOp
    from fastsds.sdsclip import DistillOutput, LatentProjector, SDSDistiller
    from fastsds.training import DistillConfig, DistillTrainer, IntCoOpConfig, IntCoOpTrainer, load_distilled

__version__ = "0.1.0"

# Imported when first asked for: `import fastsds` needs neither diffusers nor open_clip nor Triton.
_HOMES = {
    "CaptionDataset": "fastsds.data",
    "ClipSource": "fastsds.clip",
    "DiffusionScorer": "fastsds.diffusion",
    "DiffusionTeacher": "fastsds.diffusion",
    "DistillConfig": "fastsds.training",
    "DistillOutput": "fastsds.sdsclip",
    "DistillTrainer": "fastsds.training",
    "IntCoOp": "fastsds.intcoop",
    "IntCoOpConfig": "fastsds.training",
    "IntCoOpTrainer": "fastsds.training",
    "LatentProjector": "fastsds.sdsclip",
    "LoadedCLIP": "fastsds.clip",
    "NoiseSchedule": "fastsds.diffusion",
    "PrefixTextEncoder": "fastsds.clip",
    "SDSDistiller": "fastsds.sdsclip",
    "SDSLoss": "fastsds.diffusion",
    "TeacherSource": "fastsds.diffusion",
    "load_distilled": "fastsds.training",
}
_MODULES = ("clip", "data", "diffusion", "evaluation", "intcoop", "ops", "sdsclip", "toyworld", "training")

__all__ = [
    "CaptionDataset",
    "ClipSource",
    "DiffusionScorer",
    "DiffusionTeacher",
    "DistillConfig",
    "DistillOutput",
    "DistillTrainer",
    "IntCoOp",
    "IntCoOpConfig",
    "IntCoOpTrainer",
    "LatentProjector",
    "LoadedCLIP",
    "NoiseSchedule",
    "PrefixTextEncoder",
    "SDSDistiller",
    "SDSLoss",
    "TeacherSource",
    "load_distilled",
    "ops",
    "toyworld",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"fastsds.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastsds' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
