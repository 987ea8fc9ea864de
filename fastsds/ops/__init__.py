"""The fused ops, registered as `torch.ops.fastsds.*`: one file per op, with its contract and its definition."""

from fastsds.ops._dispatch import BackendUnavailableError
from fastsds.ops.add_noise import add_noise
from fastsds.ops.sample_timesteps import TimestepDraw, sample_timesteps
from fastsds.ops.sds_loss import LossAndGradients, guidance_scale_from_offset, sds_loss, sds_loss_and_gradients

__all__ = [
    "BackendUnavailableError",
    "LossAndGradients",
    "TimestepDraw",
    "add_noise",
    "guidance_scale_from_offset",
    "sample_timesteps",
    "sds_loss",
    "sds_loss_and_gradients",
]
