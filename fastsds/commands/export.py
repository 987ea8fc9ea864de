"""`fastsds export`: what was trained, in the formats of others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastsds.clip.export import export_open_clip, export_transformers, export_tuned
from fastsds.clip.source import ClipSource
from fastsds.commands.configs import writing
from fastsds.commands.intcoop import load_run, read_run
from fastsds.intcoop.checkpoints import export_coop
from fastsds.training.distilled import read_distilled


@dataclass(frozen=True)
class ExportConfig:
    """Write a distilled CLIP for open_clip or transformers, its tuned tensors alone, or prompts for CoOp's code.

    examples:
      fastsds export --run runs/sds-clip --format open-clip --out sds-clip
      fastsds export --run runs/sds-clip --format tuned --out sds-clip.safetensors
      fastsds export --run runs/coop --format coop --out prompt_learner/model.pth.tar-50
    """

    run: Path
    """Folder of a run or of one of its checkpoints, an exported folder, or a file of tuned tensors."""
    format: Literal["open-clip", "transformers", "tuned", "coop"]
    """open-clip and transformers are folders that these load without fastsds; tuned is one .safetensors file; coop is a
    checkpoint file of a run of fastsds intcoop --method coop or cocoop."""
    out: Path
    """What to write; it must not exist."""
    clip: ClipSource = field(default_factory=lambda: ClipSource(""))


def run_export(config: ExportConfig) -> None:
    if config.format == "coop":
        _export_prompts(config)
    else:
        _export_clip(config)
    print(f"{config.run} as {config.format}: {config.out}")


def _export_clip(config: ExportConfig) -> None:
    tuned = read_distilled(config.run, config.clip if config.clip.name else None)
    if config.format == "tuned":
        with writing(config.out):
            export_tuned(config.out, tuned)
        return
    clip = tuned.load()
    with writing(config.out):
        if config.format == "transformers":
            export_transformers(config.out, clip)
        else:
            export_open_clip(config.out, clip, tuned.source)


def _export_prompts(config: ExportConfig) -> None:
    run = read_run(config.run)
    if run.method not in ("coop", "cocoop"):
        raise ValueError(f"format: coop holds prompts of coop and cocoop, got a run of {run.method}")
    model: Any = load_run(config.run)[0]
    with writing(config.out):
        export_coop(config.out, model, epoch=run.train.epochs)
