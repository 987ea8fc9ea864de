"""Tiny pipelines of the other families, of the genuine classes, with random weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsds.toyworld import models


def _clip_text(class_name: str, tokenizer: Any, width: int, projection: int) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        **{**models.TEXT_ENCODER_CONFIG, "hidden_size": width, "projection_dim": projection},
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return getattr(transformers, class_name)(config).eval()


def _t5_tokenizer(folder: Path) -> Any:
    """A byte-fallback-free unigram tokenizer of letters, in T5's format."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import Unigram
    from transformers import T5TokenizerFast

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return T5TokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), extra_ids=0)


@pytest.fixture(scope="session")
def sdxl_parts(tokenizer_folder: Path) -> dict[str, Any]:
    """The objects of a tiny SDXL pipeline, by their names there; do not change them."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTokenizer

    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    unet = {
        **models.UNET_CONFIG,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "cross_attention_dim": 64 + 40,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    }
    return {
        "unet": UNet2DConditionModel(**unet).eval(),
        "vae": AutoencoderKL(**{**models.VAE_CONFIG, "scaling_factor": 0.13025}).eval(),
        "text_encoder": _clip_text("CLIPTextModel", tokenizer, 64, 64),
        "tokenizer": tokenizer,
        "text_encoder_2": _clip_text("CLIPTextModelWithProjection", tokenizer, 40, 24),
        "tokenizer_2": CLIPTokenizer.from_pretrained(tokenizer_folder, pad_token="!"),
        "scheduler": EulerDiscreteScheduler(**{**_BETAS, "prediction_type": "epsilon"}),
    }


@pytest.fixture(scope="session")
def sd3_parts(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The objects of a tiny Stable Diffusion 3 pipeline, by their names there; do not change them."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTokenizer, T5Config, T5EncoderModel

    torch.manual_seed(2)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    t5_tokenizer = _t5_tokenizer(tmp_path_factory.mktemp("t5"))
    vae = {"latent_channels": 8, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    return {
        "transformer": SD3Transformer2DModel(
            sample_size=8,
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=112,
            caption_projection_dim=32,
            pooled_projection_dim=16 + 24,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ).eval(),
        "vae": AutoencoderKL(**{**models.VAE_CONFIG, **vae}, use_quant_conv=False, use_post_quant_conv=False).eval(),
        "text_encoder": _clip_text("CLIPTextModelWithProjection", tokenizer, 64, 16),
        "tokenizer": tokenizer,
        "text_encoder_2": _clip_text("CLIPTextModelWithProjection", tokenizer, 40, 24),
        "tokenizer_2": CLIPTokenizer.from_pretrained(tokenizer_folder, pad_token="!"),
        "text_encoder_3": T5EncoderModel(
            T5Config(vocab_size=len(t5_tokenizer), d_model=112, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ).eval(),
        "tokenizer_3": t5_tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


@pytest.fixture(params=["sdxl", "sd3", "sd3 without T5"])
def family_parts(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A copy of the parts of one of the other families."""
    parts = request.getfixturevalue(f"{request.param.split()[0]}_parts")
    if request.param == "sd3 without T5":
        parts = {**parts, "text_encoder_3": None, "tokenizer_3": None}
    return {name: copy.deepcopy(part) for name, part in parts.items()}


@pytest.fixture
def family_pipeline(family_parts: dict[str, Any]) -> Any:
    """The genuine pipeline of the same parts."""
    import diffusers

    if "transformer" in family_parts:
        return diffusers.StableDiffusion3Pipeline(**family_parts)
    return diffusers.StableDiffusionXLPipeline(**family_parts, add_watermarker=False)


_BETAS = {name: models.SCHEDULER_CONFIG[name] for name in ("beta_start", "beta_end", "beta_schedule")}
