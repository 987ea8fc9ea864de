"""What a run may be told, and how it ended."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """Options of a run."""

    out: Path = Path("runs/fastsds")
    """Folder of the run: checkpoints, metrics.jsonl, tensorboard. It must not exist, unless the run is resumed."""
    lr: float = 5e-5
    """Peak learning rate."""
    epochs: int = 5
    steps: int | None = None
    """Optimizer steps in all, in place of `epochs`."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    decay_share: float = 1.0
    """Share of the run, at its end, over which a cosine takes the learning rate to zero; the peak is held before."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    """Of AdamW; these are the ones that CLIP's own training uses."""
    max_grad_norm: float | None = 1.0
    """Norm that gradients are clipped to; None leaves them."""
    accumulation: int = 1
    """Batches per optimizer step. The contrastive loss sees one batch at a time."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """fp16 waits for the device at every step, to see whether a gradient overflowed; bf16 does not."""
    save_every: int | None = None
    """Steps between checkpoints; at the end of every epoch by default, and always at the end."""
    keep_checkpoints: int = 3
    evaluate_every: int | None = None
    """Steps between evaluations; only at the end by default."""
    log_every: int = 10
    """Steps between writes of the metrics, which is when the device is waited for."""
    tensorboard: bool = True
    progress: bool = True
    """A bar on a terminal, elsewhere a line a minute."""
    seed: int = 0
    """Of the order of the data; the loss's noise has its own."""

    def __post_init__(self) -> None:
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"decay_share: expected a share in (0, 1], got {self.decay_share!r}")
        positive = ("lr", "epochs", "accumulation", "keep_checkpoints", "log_every")
        optional = ("steps", "save_every", "evaluate_every", "max_grad_norm")
        for name in (*positive, *(name for name in optional if getattr(self, name) is not None)):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)!r}")

    def lr_factor(self, step: int, total_steps: int) -> float:
        """The learning rate of the step after `step` steps, as a share of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        start = max(self.warmup_steps, round(total_steps * (1 - self.decay_share)))
        progress = (step - start) / max(total_steps - start, 1)
        return 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    checkpoint: Path
    """The last one."""
    evaluation: dict[str, float]
    """The last evaluation; empty without one."""
