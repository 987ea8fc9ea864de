"""The loops, their checkpoints and their metrics."""

from fastsds.training.checkpoint import CheckpointError
from fastsds.training.config import TrainConfig, TrainResult
from fastsds.training.distill import DistillConfig, DistillTrainer
from fastsds.training.distilled import load_distilled, read_distilled
from fastsds.training.intcoop import IntCoOpConfig, IntCoOpTrainer
from fastsds.training.interrupt import TrainingInterrupted
from fastsds.training.trainer import NonFiniteLossError, Trainer

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
    "TrainingInterrupted",
    "load_distilled",
    "read_distilled",
]
