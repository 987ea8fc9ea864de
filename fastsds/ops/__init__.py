"""The fused ops, registered as `torch.ops.fastsds.*`: one file per op, with its contract and its definition."""

from fastsds.ops._dispatch import BackendUnavailableError
from fastsds.ops.add_noise import add_noise
from fastsds.ops.embed_prompts import EmbeddedPrompts, embed_prompts
from fastsds.ops.prefix_attention import prefix_attention
from fastsds.ops.sample_timesteps import TimestepDraw, sample_timesteps
from fastsds.ops.sds_loss import LossAndGradients, guidance_scale_from_offset, sds_loss, sds_loss_and_gradients

__all__ = [
    "BackendUnavailableError",
    "EmbeddedPrompts",
    "LossAndGradients",
    "TimestepDraw",
    "add_noise",
    "embed_prompts",
    "guidance_scale_from_offset",
    "prefix_attention",
    "sample_timesteps",
    "sds_loss",
    "sds_loss_and_gradients",
]
