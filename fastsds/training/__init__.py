"""The loops, their checkpoints and their metrics."""

from fastsds.training.checkpoint import CheckpointError
from fastsds.training.distill import DistillConfig, DistillTrainer
from fastsds.training.intcoop import IntCoOpConfig, IntCoOpTrainer
from fastsds.training.trainer import NonFiniteLossError, TrainConfig, Trainer, TrainResult

__all__ = [
    "CheckpointError",
    "DistillConfig",
    "DistillTrainer",
    "IntCoOpConfig",
    "IntCoOpTrainer",
    "NonFiniteLossError",
    "TrainConfig",
    "TrainResult",
    "Trainer",
]
