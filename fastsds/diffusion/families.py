"""The kinds of diffusion model that can teach: how each is told apart, and what it takes beside latents and tokens."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fastsds.diffusion.conditioning import TextConditioning

SUPPORTED = (
    "Stable Diffusion 1.x and 2.x (StableDiffusionPipeline), SDXL (StableDiffusionXLPipeline) and Stable Diffusion 3.x "
    "(StableDiffusion3Pipeline) text-to-image pipelines"
)
_OTHER_CONDITIONS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
_TIME_IDS = 6  # original height and width, crop's top and left, target height and width


class UnsupportedTeacherError(ValueError):
    """A diffusion model that the library cannot use as a teacher; the message names it and what is supported."""


@dataclass(frozen=True)
class Family:
    """Models that take the same conditions."""

    pipelines: tuple[str, ...]
    """Names of the diffusers pipelines; the first computes the text conditioning."""
    denoiser: str
    """Its component in the pipeline: `unet` or `transformer`."""
    denoiser_class: str
    text: Mapping[str, str]
    """Class, in transformers, of each tokenizer and text encoder, by component."""
    conditions: Callable[[TextConditioning, tuple[int, int]], dict[str, Any]]
    """What the denoiser takes beside tokens, from the text and the images' height and width."""
    optional: tuple[str, ...] = ()
    """Those of `text` that the pipeline does without."""
    pooled: bool = True
    """Whether the denoiser takes a pooled embedding too."""
    pipeline_options: Mapping[str, Any] = field(default_factory=dict)
    prompt_options: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, components: Mapping[str, Any], captions: list[str], device: torch.device) -> TextConditioning:
        """The conditioning of captions, as the pipeline of these components computes it.

        Without the U-Net, which has no part in it, and whose config the pipeline rewrites where it is an old one.
        """
        import diffusers

        pipeline_class = getattr(diffusers, self.pipelines[0])
        needed = inspect.signature(pipeline_class).parameters.values()
        given = {part.name: components.get(part.name) for part in needed if part.default is part.empty}
        with _quiet("transformers.tokenization_utils_base", pipeline_class.__module__):
            embeddings, _, *pooled = pipeline_class(**given, **self.pipeline_options).encode_prompt(
                prompt=captions,
                device=device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
                **self.prompt_options,
            )
        return TextConditioning(embeddings, *pooled[:1])


def _no_conditions(text: TextConditioning, image_size: tuple[int, int]) -> dict[str, Any]:
    return {}


def _sdxl_conditions(text: TextConditioning, image_size: tuple[int, int]) -> dict[str, Any]:
    """Of images that were neither scaled nor cropped."""
    # Filled on the device: a list would be copied there at every call, and the host would wait for it.
    time_ids = [text.embeddings.new_full((len(text),), size) for size in (*image_size, 0, 0, *image_size)]
    return {"added_cond_kwargs": {"text_embeds": text.pooled, "time_ids": torch.stack(time_ids, dim=1)}}


def _sd3_conditions(text: TextConditioning, image_size: tuple[int, int]) -> dict[str, Any]:
    return {"pooled_projections": text.pooled}


_CLIP_TEXT = {"tokenizer": "CLIPTokenizer", "text_encoder": "CLIPTextModel"}
_CLIP_TEXT_2 = {"tokenizer_2": "CLIPTokenizer", "text_encoder_2": "CLIPTextModelWithProjection"}
_T5_TEXT = {"tokenizer_3": "T5TokenizerFast", "text_encoder_3": "T5EncoderModel"}

SD = Family(
    pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    text=_CLIP_TEXT,
    conditions=_no_conditions,
    pooled=False,
    pipeline_options={"requires_safety_checker": False},
)
SDXL = Family(
    pipelines=("StableDiffusionXLPipeline",),
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    text=_CLIP_TEXT | _CLIP_TEXT_2,
    conditions=_sdxl_conditions,
    pipeline_options={"add_watermarker": False},
)
SD3 = Family(
    pipelines=("StableDiffusion3Pipeline",),
    denoiser="transformer",
    denoiser_class="SD3Transformer2DModel",
    text=_CLIP_TEXT | {"text_encoder": "CLIPTextModelWithProjection"} | _CLIP_TEXT_2 | _T5_TEXT,
    conditions=_sd3_conditions,
    optional=tuple(_T5_TEXT),
    prompt_options={"prompt_2": None, "prompt_3": None},
)
FAMILIES = (SD, SDXL, SD3)


def family_of(denoiser: Any, vae: Any, text_encoder_2: Any) -> Family:
    """The family that a denoiser belongs to, after a look at whether the parts go together.

    Raises:
        UnsupportedTeacherError: a network that needs conditions which no caption gives, or a VAE of other latents.
    """
    name, component = type(denoiser).__name__, "transformer" if "Transformer" in type(denoiser).__name__ else "unet"
    if name not in {family.denoiser_class for family in FAMILIES}:
        raise UnsupportedTeacherError(f"{component}: got a {name}; supported are {SUPPORTED}")
    config = denoiser.config
    if config.in_channels != config.out_channels:
        raise UnsupportedTeacherError(
            f"{component}: it takes {config.in_channels} channels and predicts {config.out_channels} (an inpainting, "
            f"depth or variance-predicting model); supported are {SUPPORTED}"
        )
    if vae is not None and vae.config.latent_channels != config.in_channels:
        raise UnsupportedTeacherError(
            f"vae: expected {config.in_channels} latent channels, as the denoiser takes, "
            f"got {vae.config.latent_channels}"
        )
    if name == SD3.denoiser_class:
        return SD3
    wanted = [f"{option}={config.get(option)!r}" for option in _OTHER_CONDITIONS if config.get(option)]
    if config.addition_embed_type not in (None, "text_time"):
        wanted.insert(0, f"addition_embed_type={config.addition_embed_type!r}")
    if wanted:
        raise UnsupportedTeacherError(
            f"unet: it wants conditions that a caption does not give ({', '.join(wanted)}); supported are {SUPPORTED}"
        )
    if config.addition_embed_type is None:
        return SD
    expected = config.projection_class_embeddings_input_dim - _TIME_IDS * config.addition_time_embed_dim
    if text_encoder_2 is not None and text_encoder_2.config.projection_dim != expected:
        raise UnsupportedTeacherError(
            f"unet: beside {_TIME_IDS} sizes it takes a pooled embedding of width {expected}, and text_encoder_2 gives "
            f"{text_encoder_2.config.projection_dim} (a refiner takes other conditions); supported are {SUPPORTED}"
        )
    return SDXL


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """A caption that is too long is cut, as in training; the libraries warn of it."""
    before = {logger: logger.disabled for logger in map(logging.getLogger, loggers)}
    for logger in before:
        logger.disabled = True  # unlike a level, costs the other loggers nothing
    try:
        yield
    finally:
        for logger, disabled in before.items():
            logger.disabled = disabled
