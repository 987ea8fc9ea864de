"""`fastsds toyworld`."""

from __future__ import annotations

from fastsds.commands.configs import FILE_NAME, save_config
from fastsds.toyworld.files import ToyWorldConfig, write_toyworld

__all__ = ["ToyWorldConfig", "run_toyworld"]


def run_toyworld(config: ToyWorldConfig) -> None:
    write_toyworld(config)
    save_config(config.out / FILE_NAME, config, "toyworld")
    print(
        f"{config.out} holds coco, winoground and fewshot; distil with `fastsds distill --clip.name toyworld "
        f"--teacher.source toyworld --captions.path {config.out / 'coco/annotations/captions_train.json'} "
        f"--captions.images {config.out / 'coco/train'}`"
    )
