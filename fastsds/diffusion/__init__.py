"""The diffusion side: a noise schedule, a frozen teacher, the loss it gives and the score it gives."""

from fastsds.diffusion.cache import TensorCache
from fastsds.diffusion.conditioning import TextConditioning
from fastsds.diffusion.decisions import Answer, Question, share_kept
from fastsds.diffusion.families import UnsupportedTeacherError
from fastsds.diffusion.loss import SDSLoss
from fastsds.diffusion.schedule import NoiseSchedule
from fastsds.diffusion.score import DiffusionScorer
from fastsds.diffusion.source import TeacherSource
from fastsds.diffusion.teacher import DiffusionTeacher
from fastsds.diffusion.timesteps import SeedStream, TimestepSampler

__all__ = [
    "Answer",
    "DiffusionScorer",
    "DiffusionTeacher",
    "NoiseSchedule",
    "Question",
    "SDSLoss",
    "SeedStream",
    "TeacherSource",
    "TensorCache",
    "TextConditioning",
    "TimestepSampler",
    "UnsupportedTeacherError",
    "share_kept",
]
