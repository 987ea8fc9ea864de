"""The distillation run: the paper's settings on the common loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from fastsds.sdsclip.distiller import SDSDistiller
from fastsds.training.config import TrainConfig
from fastsds.training.trainer import Evaluate, Trainer


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """The paper's settings are *secondary*: 5 epochs, learning rate 5e-5, an Adam-family optimizer, batch 32."""

    out: Path = Path("runs/sds-clip")


class DistillTrainer(Trainer):
    """Trains an `SDSDistiller`.

    Batches hold `images`, `tokens` and `captions`, and for ranking the candidates; `data.CaptionDataset` makes them.
    """

    def __init__(
        self,
        distiller: SDSDistiller,
        loader: DataLoader[Any],
        config: DistillConfig | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        super().__init__(distiller, loader, config or DistillConfig(), evaluate)
