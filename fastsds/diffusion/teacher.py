"""The teacher: a frozen text-to-image latent diffusion model, reduced to what distillation asks of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastsds.diffusion.schedule import NoiseSchedule

SUPPORTED = "Stable Diffusion 1.x and 2.x text-to-image pipelines (StableDiffusionPipeline with a UNet2DConditionModel)"
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")


class UnsupportedTeacherError(ValueError):
    """A diffusion model that the library cannot use as a teacher; the message names it and what is supported."""


class DiffusionTeacher(nn.Module):
    """A frozen U-Net, VAE, text encoder and tokenizer with their noise schedule.

    All weights are frozen and in evaluation mode, whatever a surrounding module is set to.

    Args:
        unet: diffusers' `UNet2DConditionModel`.
        vae: diffusers' `AutoencoderKL`, or None where images are never encoded.
        text_encoder, tokenizer: transformers' CLIP text model and tokenizer, or None where text comes as embeddings.
        scheduler: the diffusers scheduler it was trained with, or a `NoiseSchedule`.
        text_cache_size: captions whose conditioning is kept on the device (least recently used are dropped).

    Raises:
        UnsupportedTeacherError: a network that needs more than latents, timesteps and text.
    """

    def __init__(
        self, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any, scheduler: Any, *, text_cache_size: int = 1024
    ) -> None:
        super().__init__()
        _refuse_unsupported_unet(unet, vae)
        self.unet = unet
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        schedule = scheduler if isinstance(scheduler, NoiseSchedule) else NoiseSchedule.from_scheduler(scheduler)
        self._schedule = schedule
        self._text_cache_size = text_cache_size
        self._text_cache: OrderedDict[str, Tensor] = OrderedDict()
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        text_cache_size: int = 1024,
    ) -> DiffusionTeacher:
        """Loads a Stable Diffusion 1.x or 2.x pipeline from a diffusers folder or a hub id; safetensors only.

        The convolutions become channels-last on a GPU, where that is the faster layout.

        Raises:
            UnsupportedTeacherError: SDXL, SD3, a ControlNet, inpainting, …: named, with what is supported.
            FileNotFoundError: a folder without a `model_index.json`.
        """
        import diffusers
        import transformers

        folder = Path(source)
        is_path = isinstance(source, Path) or folder.exists() or source.startswith((".", "/", "~"))
        if is_path and not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"source: expected a diffusers pipeline folder with a model_index.json, got {folder}"
            )
        index = diffusers.DiffusionPipeline.load_config(str(source))
        pipeline = index.get("_class_name")
        if pipeline not in _PIPELINES:
            raise UnsupportedTeacherError(f"source: {source} is a {pipeline}; supported are {SUPPORTED}")
        weights = {"torch_dtype": dtype, "use_safetensors": True}
        text_weights = {"dtype": dtype, "use_safetensors": True}
        scheduler_class = getattr(diffusers, index["scheduler"][1])
        with _no_progress_bar():
            text_encoder = transformers.CLIPTextModel.from_pretrained(source, subfolder="text_encoder", **text_weights)
        teacher = cls(
            unet=diffusers.UNet2DConditionModel.from_pretrained(source, subfolder="unet", **weights),
            vae=diffusers.AutoencoderKL.from_pretrained(source, subfolder="vae", **weights),
            text_encoder=text_encoder,
            tokenizer=transformers.CLIPTokenizer.from_pretrained(source, subfolder="tokenizer"),
            scheduler=scheduler_class.from_pretrained(source, subfolder="scheduler"),
            text_cache_size=text_cache_size,
        )
        teacher.to(device)
        if teacher.device.type == "cuda":
            teacher.to(memory_format=torch.channels_last)
        return teacher

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the U-Net's weights, and of what `predict` takes and returns."""
        return next(self.unet.parameters()).dtype

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule, on the teacher's device."""
        if self._schedule.alpha.device != self.device:
            self._schedule = self._schedule.to(self.device)
        return self._schedule

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents it was trained on."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the images that encode to `latent_shape`."""
        factor = 2 ** (len(self._require("vae").config.block_out_channels) - 1)
        return self.latent_shape[1] * factor, self.latent_shape[2] * factor

    def train(self, mode: bool = True) -> DiffusionTeacher:
        """Stays in evaluation mode: a frozen teacher has no other."""
        return super().train(False)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Float[Tensor, "captions tokens width"]:
        """The text conditioning of each caption, padded and truncated as the pipeline does; cached by caption.

        Raises:
            TypeError: something other than strings.
        """
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise TypeError(f"captions: expected a sequence of strings, got {captions!r:.80}")
        wanted: dict[str, Tensor] = {}
        for caption in captions:
            cached = self._text_cache.get(caption)
            if cached is not None and (cached.device, cached.dtype) == (self.device, self.dtype):
                self._text_cache.move_to_end(caption)
                wanted[caption] = cached
        new = [caption for caption in dict.fromkeys(captions) if caption not in wanted]
        if new:
            tokenizer, text_encoder = self._require("tokenizer"), self._require("text_encoder")
            tokens = tokenizer(
                new, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
            )
            encoded = text_encoder(tokens.input_ids.to(self.device))[0].to(self.dtype)
            # Cloned: a row of the batch, kept alone, would keep the whole batch in memory.
            wanted.update((caption, row.clone()) for caption, row in zip(new, encoded, strict=True))
            for caption in new:
                self._text_cache[caption] = wanted[caption]
                self._text_cache.move_to_end(caption)
            while len(self._text_cache) > self._text_cache_size:
                self._text_cache.popitem(last=False)
        return torch.stack([wanted[caption] for caption in captions])

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
        if tuple(images.shape[2:]) != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bicubic", antialias=True).clamp(0, 1)
        posterior = vae.encode((images * 2 - 1).to(self.device, next(vae.parameters()).dtype)).latent_dist
        return (posterior.mode() * vae.config.scaling_factor).float()

    def predict(
        self,
        noised: Float[Tensor, "batch channels height width"],
        t: Int[Tensor, "batch"],
        text: Float[Tensor, "batch tokens width"],
    ) -> Float[Tensor, "batch channels height width"]:
        """The U-Net's output at timesteps `t` (indices into the schedule), in the teacher's dtype.

        Differentiable in `noised`.
        """
        model_timesteps = self.schedule.model_timesteps[t]
        return self.unet(noised.to(self.dtype), model_timesteps, encoder_hidden_states=text.to(self.dtype)).sample

    def _require(self, name: str) -> Any:
        component = getattr(self, name)
        if component is None:
            raise ValueError(f"{name}: this teacher was built without one, and this call needs it")
        return component


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers shows a bar for every model it loads, also for one of a few kilobytes."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _refuse_unsupported_unet(unet: Any, vae: Any) -> None:
    name = type(unet).__name__
    if name != "UNet2DConditionModel":
        raise UnsupportedTeacherError(f"unet: got a {name}; supported are {SUPPORTED}")
    config = unet.config
    if config.addition_embed_type or config.class_embed_type or config.num_class_embeds:
        raise UnsupportedTeacherError(
            f"unet: it wants conditions beside the text (addition_embed_type={config.addition_embed_type!r}, as in "
            f"SDXL); supported are {SUPPORTED}"
        )
    if config.in_channels != config.out_channels:
        raise UnsupportedTeacherError(
            f"unet: it takes {config.in_channels} channels and predicts {config.out_channels} (an inpainting, "
            f"depth or variance-predicting model); supported are {SUPPORTED}"
        )
    if vae is not None and vae.config.latent_channels != config.in_channels:
        raise UnsupportedTeacherError(
            f"vae: expected {config.in_channels} latent channels, as the U-Net takes, got {vae.config.latent_channels}"
        )
