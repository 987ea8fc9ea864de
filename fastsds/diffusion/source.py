"""One typed description of where a teacher comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fastsds.diffusion.attention import Attention
from fastsds.diffusion.cache import TensorCache
from fastsds.diffusion.teacher import DiffusionTeacher

TOYWORLD = "toyworld"
_SHIPPED = Path(__file__).parents[1] / "toyworld" / "weights" / "teacher"


@dataclass(frozen=True)
class TeacherSource:
    """A text-to-image diffusion model and how to run it; also the option group of the commands that need one."""

    source: str
    """A diffusers pipeline folder or hub id (Stable Diffusion 1.x, 2.x, SDXL or SD3), or toyworld, the shipped one."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the weights, and of what the teacher computes in."""
    attention: Attention = "torch"
    """Kernels of the denoiser's attention; PyTorch's own serve where xformers cannot, and a warning says so."""
    cache: Path | None = None
    """Folder that keeps text conditioning and VAE latents between runs; processes may share it."""
    cache_size_gb: float = 20.0
    """Size, in 10^9 bytes, above which the cache drops what was used longest ago."""

    def load(self, device: torch.device | str = "cpu") -> DiffusionTeacher:
        """The frozen teacher on `device`.

        Raises:
            UnsupportedTeacherError: another kind of model.
            FileNotFoundError: a folder that is no diffusers pipeline.
        """
        source = _SHIPPED if self.source == TOYWORLD else self.source
        return DiffusionTeacher.from_pretrained(
            source,
            dtype=getattr(torch, self.dtype),
            device=device,
            attention=self.attention,
            cache=None if self.cache is None else TensorCache(self.cache, int(self.cache_size_gb * 1e9)),
        )
