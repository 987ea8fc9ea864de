"""`fastsds toyworld`."""

from __future__ import annotations

import shlex

from fastsds.commands.configs import FILE_NAME, config_text, writing
from fastsds.toyworld.files import ToyWorldConfig, write_toyworld

__all__ = ["ToyWorldConfig", "run_toyworld"]


def run_toyworld(config: ToyWorldConfig) -> None:
    with writing(config.out):
        write_toyworld(config, {FILE_NAME: config_text(config, "toyworld")})
    coco = config.out / "coco"
    captions, images = (shlex.quote(str(coco / name)) for name in ("annotations/captions_train.json", "train"))
    print(
        f"{config.out} holds coco, winoground and fewshot; distil with `fastsds distill --clip.name toyworld "
        f"--teacher.source toyworld --captions.path {captions} --captions.images {images}`"
    )
