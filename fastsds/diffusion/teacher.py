"""The teacher: a frozen text-to-image latent diffusion model, reduced to what distillation asks of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastsds.diffusion.attention import Attention, use_attention
from fastsds.diffusion.cache import TensorCache
from fastsds.diffusion.conditioning import ConditioningCache, TextConditioning
from fastsds.diffusion.families import SDXL, family_of
from fastsds.diffusion.fingerprint import fingerprint
from fastsds.diffusion.loading import load_parts
from fastsds.diffusion.schedule import NoiseSchedule


class DiffusionTeacher(nn.Module):
    """A frozen denoiser, VAE, text encoders and tokenizers, named as in the diffusers pipelines, with their schedule.

    All weights are frozen and in evaluation mode, whatever a surrounding module is set to.

    Args:
        unet: diffusers' `UNet2DConditionModel` of Stable Diffusion 1.x, 2.x or SDXL; None beside a `transformer`.
        vae: diffusers' `AutoencoderKL`, or None where images are never encoded.
        text_encoder, tokenizer: transformers' CLIP text model and tokenizer, or None where text comes as embeddings.
        scheduler: the diffusers scheduler it was trained with, or a `NoiseSchedule`.
        transformer: diffusers' `SD3Transformer2DModel`.
        text_encoder_2, tokenizer_2: of SDXL and SD3.
        text_encoder_3, tokenizer_3: the T5 of SD3, which does without.
        force_zeros_for_empty_prompt: whether SDXL without a caption is told zeros, not the empty caption.
        cache: keeps text conditioning and, for `encode_images_cached`, latents between runs.
        text_cache_size: captions whose conditioning is kept on the device (least recently used are dropped).

    Raises:
        UnsupportedTeacherError: a network that needs more than latents, timesteps and text.
    """

    def __init__(
        self,
        unet: Any = None,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        scheduler: Any = None,
        *,
        transformer: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        cache: TensorCache | None = None,
        text_cache_size: int = 1024,
    ) -> None:
        super().__init__()
        self.family = family_of(transformer if unet is None else unet, vae, text_encoder_2)
        self.unet = unet
        self.transformer = transformer
        self.vae = vae
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.text_encoder_3, self.tokenizer_3 = text_encoder_3, tokenizer_3
        self.cache = cache
        self._zeros_for_no_text = self.family is SDXL and force_zeros_for_empty_prompt
        self._schedule = scheduler if isinstance(scheduler, NoiseSchedule) else NoiseSchedule.from_scheduler(scheduler)
        self._text_cache = ConditioningCache(text_cache_size, cache)
        self._fingerprints: dict[tuple[tuple[str, ...], torch.dtype], str] = {}
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: Attention = "torch",
        cache: TensorCache | None = None,
        text_cache_size: int = 1024,
    ) -> DiffusionTeacher:
        """Loads a Stable Diffusion (1.x, 2.x, XL, 3.x) pipeline from a diffusers folder or hub id; safetensors only.

        The convolutions become channels-last on a GPU, where that is the faster layout.

        Args:
            attention: kernels of the denoiser's attention; PyTorch's own serve where xformers cannot, with a warning.

        Raises:
            UnsupportedTeacherError: a refiner, a ControlNet, inpainting, …: named, with what is supported.
            FileNotFoundError: a folder without a `model_index.json`.
        """
        teacher = cls(**load_parts(source, dtype), cache=cache, text_cache_size=text_cache_size)
        teacher.to(device)
        if teacher.device.type == "cuda":
            teacher.to(memory_format=torch.channels_last)
        use_attention(teacher.denoiser, attention)
        return teacher

    @property
    def denoiser(self) -> Any:
        """The U-Net or transformer."""
        return getattr(self, self.family.denoiser)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's weights, and of what `predict` takes and returns."""
        return next(self.denoiser.parameters()).dtype

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule, on the teacher's device."""
        if self._schedule.alpha.device != self.device:
            self._schedule = self._schedule.to(self.device)
        return self._schedule

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents it was trained on."""
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.denoiser.config.in_channels, height, width

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the images that encode to `latent_shape`; without a VAE, its 8-fold."""
        return self._pixels(*self.latent_shape[1:])

    def train(self, mode: bool = True) -> DiffusionTeacher:
        """Stays in evaluation mode: a frozen teacher has no other."""
        return super().train(False)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextConditioning:
        """The conditioning of each caption, padded and truncated as the pipeline does, in the teacher's dtype.

        It is kept by caption, in memory and in the `cache`.

        Raises:
            TypeError: something other than strings.
        """
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise TypeError(f"captions: expected a sequence of strings, got {captions!r:.80}")
        prefix = "" if self.cache is None else f"text {self._fingerprint(*self.family.text)} {self.dtype}"
        rows = self._text_cache.lookup(captions, prefix, self.device, self.dtype)
        new = [caption for caption in dict.fromkeys(captions) if caption not in rows]
        if new:
            with self._without_autocast():  # what is kept must not depend on who asked first
                encoded = self.family.encode(self._text_components(), new, self.device)
            # Copied: a row of the batch, kept alone, would keep the whole batch in memory.
            pieces = (encoded[i : i + 1].map(lambda tensor: tensor.to(self.dtype, copy=True)) for i in range(len(new)))
            made = dict(zip(new, pieces, strict=True))
            self._text_cache.keep(prefix, made)
            rows |= made
        return TextConditioning.cat([rows[caption] for caption in captions])

    def encode_no_text(self) -> TextConditioning:
        """One row: what guidance leads away from, as in the pipeline without a negative prompt."""
        empty = self.encode_text([""])
        return empty.map(torch.zeros_like) if self._zeros_for_no_text else empty

    @torch.no_grad()
    def encode_images(
        self, images: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images channels latent_height latent_width"]:
        """Scaled VAE latents (the posterior's mode) in float32, of images in [0, 1], resized to `image_size`.

        Raises:
            ValueError: not three channels, or not floating point.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images: expected floating point [images, 3, height, width] in [0, 1], "
                f"got {images.dtype} {list(images.shape)}"
            )
        vae = self._require("vae")
        # Resized there, and not in half precision, for which a CPU has no such kernel.
        images = images.to(self.device, torch.promote_types(images.dtype, torch.float32))
        if tuple(images.shape[2:]) != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bicubic", antialias=True).clamp(0, 1)
        with self._without_autocast():
            posterior = vae.encode((images * 2 - 1).to(next(vae.parameters()).dtype)).latent_dist
            return ((posterior.mode() - (vae.config.shift_factor or 0)) * vae.config.scaling_factor).float()

    def encode_images_cached(
        self, keys: Sequence[str], images: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images channels latent_height latent_width"]:
        """`encode_images`, for those whose latents are not in the `cache` under their keys; they are put there.

        Args:
            keys: what tells the images' contents apart, such as `content_key(image)`; for augmented images of no use.

        Raises:
            ValueError: another number of keys than images, or images that `encode_images` refuses.
        """
        if len(keys) != len(images):
            raise ValueError(f"keys: expected one for each of {len(images)} images, got {len(keys)}")
        if self.cache is None:
            return self.encode_images(images)
        prefix = f"latents {self._fingerprint('vae')} {self.image_size}"
        kept = [self.cache.get(f"{prefix} {key}") for key in keys]
        missing = [row for row, tensors in enumerate(kept) if tensors is None]
        if missing:
            for row, latents in zip(missing, self.encode_images(images[missing]), strict=True):
                kept[row] = {"latents": latents}
                self.cache.put(f"{prefix} {keys[row]}", {"latents": latents})
        return torch.stack([tensors["latents"].to(self.device) for tensors in kept if tensors is not None])

    def predict(
        self,
        noised: Float[Tensor, "batch channels height width"],
        t: Int[Tensor, "batch"],
        text: TextConditioning | Float[Tensor, "batch tokens width"],
    ) -> Float[Tensor, "batch channels height width"]:
        """The denoiser's output at timesteps `t` (indices into the schedule), in the teacher's dtype.

        Differentiable in `noised`. Autocast speeds a float32 denoiser up; one of lower precision keeps to its own.

        Raises:
            ValueError: embeddings alone for a family that takes a pooled embedding too.
        """
        if isinstance(text, Tensor):
            text = TextConditioning(text)
        if self.family.pooled and text.pooled is None:
            raise ValueError("text: expected with a pooled embedding, as encode_text gives it, got embeddings alone")
        text = text.map(lambda tensor: tensor.to(self.dtype))
        with nullcontext() if self.dtype == torch.float32 else self._without_autocast():
            predicted = self.denoiser(
                noised.to(self.dtype),
                timestep=self.schedule.model_timesteps[t],
                encoder_hidden_states=text.embeddings,
                **self.family.conditions(text, self._pixels(*noised.shape[2:])),
            ).sample
        return predicted.to(self.dtype)

    def _pixels(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the images whose latents have these."""
        factor = 8 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        return height * factor, width * factor

    def _without_autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)

    def _text_components(self) -> dict[str, Any]:
        for name in self.family.text:
            if name not in self.family.optional:
                self._require(name)
        return {name: getattr(self, name) for name in (*self.family.text, "transformer")}

    def _fingerprint(self, *names: str) -> str:
        """Of components; computed once for each dtype that they are cast to."""
        key = names, self.dtype
        if key not in self._fingerprints:
            self._fingerprints[key] = fingerprint(getattr(self, name) for name in names)
        return self._fingerprints[key]

    def _require(self, name: str) -> Any:
        component = getattr(self, name)
        if component is None:
            raise ValueError(f"{name}: this teacher was built without one, and this call needs it")
        return component
