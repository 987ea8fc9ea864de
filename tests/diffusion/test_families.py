"""SDXL and Stable Diffusion 3 as teachers, against the genuine pipelines run on the same parts."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fastsds.diffusion import DiffusionTeacher, SDSLoss, TextConditioning, UnsupportedTeacherError
from fastsds.diffusion import loss as loss_module
from fastsds.ops import philox, sample_timesteps
from fastsds.toyworld import models

CAPTIONS = ["a red circle", "a blue square above a green triangle", ""]
SEED = torch.tensor(21)


@pytest.fixture
def teacher(family_parts: dict[str, Any]) -> DiffusionTeacher:
    return DiffusionTeacher(**family_parts)


@pytest.fixture
def folder(family_pipeline: Any, tmp_path: Path) -> Path:
    family_pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def _prompts(pipeline: Any) -> dict[str, None]:
    return {"prompt_2": None, "prompt_3": None} if hasattr(pipeline, "transformer") else {}


def _run(
    pipeline: Any, captions: list[str], guidance_scale: float, height: int = 32, width: int = 32
) -> tuple[Tensor, dict[str, Any], Tensor]:
    """The noisy latents of the pipeline's first step, what its denoiser was told, and what it predicted."""
    denoiser = pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet
    calls: list[tuple[Any, ...]] = []
    handle = denoiser.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, output[0])), with_kwargs=True
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        captions, num_inference_steps=2, guidance_scale=guidance_scale, height=height, width=width,
        output_type="latent", generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    handle.remove()
    args, kwargs, output = calls[0]
    return (
        args[0] if args else kwargs["hidden_states"],
        {"timestep": args[1] if len(args) > 1 else None, **kwargs},
        output,
    )


@pytest.mark.parametrize("guided", [False, True])
def test_predicts_what_the_pipeline_predicts(teacher: DiffusionTeacher, family_pipeline: Any, guided: bool) -> None:
    """Of a whole generation: the same conditioning and, at the first step, the same prediction."""
    noised, told, output = _run(family_pipeline, CAPTIONS, 5.0 if guided else 1.0)
    text = teacher.encode_text(CAPTIONS)
    if guided:
        text = TextConditioning.cat([teacher.encode_no_text().expand(3), text])
    torch.testing.assert_close(text.embeddings, told["encoder_hidden_states"], rtol=1e-5, atol=1e-5)
    pooled = told["pooled_projections"] if "pooled_projections" in told else told["added_cond_kwargs"]["text_embeds"]
    torch.testing.assert_close(text.pooled, pooled, rtol=1e-5, atol=1e-5)
    timestep = told["timestep"].flatten()[0]
    (t,) = (teacher.schedule.model_timesteps == timestep).nonzero().flatten()
    prediction = teacher.predict(noised, t.expand(len(noised)), text)
    torch.testing.assert_close(prediction, output, rtol=1e-4, atol=1e-5)
    for wrong in (text.map(lambda tensor: tensor.flip(0)), TextConditioning(text.embeddings, text.pooled.flip(0))):
        assert not torch.allclose(teacher.predict(noised, t.expand(len(noised)), wrong), output, atol=1e-4)


def test_latents_of_another_size_are_predicted_as_the_pipeline_does(
    teacher: DiffusionTeacher, family_pipeline: Any
) -> None:
    """SDXL is told the size."""
    noised, told, output = _run(family_pipeline, CAPTIONS, 1.0, height=16, width=24)
    assert noised.shape[2:] == (4, 6)
    (t,) = (teacher.schedule.model_timesteps == told["timestep"].flatten()[0]).nonzero().flatten()
    prediction = teacher.predict(noised, t.expand(len(noised)), teacher.encode_text(CAPTIONS))
    torch.testing.assert_close(prediction, output, rtol=1e-4, atol=1e-5)


def test_prediction_is_given_no_numbers_of_the_hosts(teacher: DiffusionTeacher, placements: Any) -> None:
    text, noised = teacher.encode_text(CAPTIONS), torch.randn(3, *teacher.latent_shape)
    t = torch.zeros(3, dtype=torch.int64)
    with placements() as placed:
        teacher.predict(noised, t, text)
    assert placed.count == 0


def test_text_is_encoded_as_the_pipeline_does(teacher: DiffusionTeacher, family_pipeline: Any) -> None:
    captions = [*CAPTIONS, "a red circle and " * 20]
    embeddings, negative, pooled, negative_pooled = family_pipeline.encode_prompt(
        captions, **_prompts(family_pipeline), device="cpu", do_classifier_free_guidance=True
    )
    text = teacher.encode_text(captions)
    torch.testing.assert_close(text.embeddings, embeddings, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text.pooled, pooled, rtol=1e-5, atol=1e-5)
    nothing = teacher.encode_no_text()
    torch.testing.assert_close(nothing.embeddings, negative[:1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nothing.pooled, negative_pooled[:1], rtol=1e-5, atol=1e-5)
    for i in range(3):
        assert not torch.allclose(text.embeddings[i], text.embeddings[i + 1], atol=1e-3)
        assert not torch.allclose(text.pooled[i], text.pooled[i + 1], atol=1e-3)


def test_long_captions_are_cut_in_silence(teacher: DiffusionTeacher) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        teacher.encode_text(["a red circle and " * 100])
        assert records == []
        logging.getLogger("diffusers.pipelines").warning("others are heard")
        assert len(records) == 1
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


@pytest.mark.parametrize("zeros", [True, False])
def test_what_sdxl_without_a_caption_is_told(sdxl_parts: dict[str, Any], tmp_path: Path, zeros: bool) -> None:
    parts = {name: copy.deepcopy(part) for name, part in sdxl_parts.items()}
    pipeline = diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    pipeline.save_pretrained(tmp_path)
    _, negative, _, negative_pooled = pipeline.encode_prompt("a red circle", device="cpu")
    nothing = DiffusionTeacher.from_pretrained(tmp_path).encode_no_text()
    torch.testing.assert_close(nothing.embeddings, negative, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nothing.pooled, negative_pooled, rtol=1e-5, atol=1e-5)
    assert (nothing.embeddings.abs().max() == 0) == zeros


def test_from_pretrained_is_the_teacher_of_its_parts(teacher: DiffusionTeacher, folder: Path) -> None:
    loaded = DiffusionTeacher.from_pretrained(folder)
    state, expected = loaded.state_dict(), teacher.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    noised, t = torch.randn(3, *teacher.latent_shape), torch.tensor([3, 700, 999])
    text = loaded.encode_text(CAPTIONS)
    prediction = loaded.predict(noised, t, text)
    torch.testing.assert_close(prediction, teacher.predict(noised, t, teacher.encode_text(CAPTIONS)))
    images = torch.rand(1, 3, *teacher.image_size)
    assert torch.equal(loaded.encode_images(images), teacher.encode_images(images))


@pytest.mark.parametrize("left_out", ["text_encoder_3", "tokenizer_3"])
def test_t5_whose_folder_was_left_out(left_out: str, sd3_parts: dict[str, Any], tmp_path: Path) -> None:
    """The index still names it."""
    diffusers.StableDiffusion3Pipeline(**sd3_parts).save_pretrained(tmp_path)
    whole = DiffusionTeacher.from_pretrained(tmp_path).encode_text(CAPTIONS)
    shutil.rmtree(tmp_path / left_out)
    teacher = DiffusionTeacher.from_pretrained(tmp_path)
    assert teacher.text_encoder_3 is None and teacher.tokenizer_3 is None
    text = teacher.encode_text(CAPTIONS)
    length = models.CONTEXT_LENGTH
    torch.testing.assert_close(text.embeddings[:, :length], whole.embeddings[:, :length])
    assert text.embeddings[:, length:].abs().max() == 0
    assert whole.embeddings[:, length:].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(teacher: DiffusionTeacher, folder: Path, dtype: torch.dtype) -> None:
    loaded = DiffusionTeacher.from_pretrained(folder, dtype=dtype)
    assert loaded.dtype == dtype
    sdxl_in_half = teacher.unet is not None and dtype == torch.float16
    assert next(loaded.vae.parameters()).dtype == (torch.float32 if sdxl_in_half else dtype)
    text = loaded.encode_text(CAPTIONS)
    assert text.embeddings.dtype == text.pooled.dtype == dtype
    noised, t = torch.randn(3, *teacher.latent_shape), torch.tensor([3, 700, 999])
    prediction = loaded.predict(noised, t, text)
    assert prediction.dtype == dtype
    expected = teacher.predict(noised, t, teacher.encode_text(CAPTIONS))
    assert (prediction.float() - expected).norm() < 0.05 * expected.norm()
    latents = loaded.encode_images(torch.rand(1, 3, 32, 32))
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()


def test_images_are_encoded_shifted_and_scaled(teacher: DiffusionTeacher, family_parts: dict[str, Any]) -> None:
    images = torch.rand(2, 3, *teacher.image_size)
    assert teacher.image_size == (32, 32)
    vae = family_parts["vae"]
    with torch.no_grad():
        moments = vae.encoder(2 * images - 1)
        mean = (moments if vae.quant_conv is None else vae.quant_conv(moments)).chunk(2, dim=1)[0]
    expected = (mean - 0.0609) * 1.5305 if teacher.unet is None else mean * 0.13025
    torch.testing.assert_close(teacher.encode_images(images), expected, rtol=1e-5, atol=1e-6)


def test_schedule_noises_as_the_scheduler_does(teacher: DiffusionTeacher, family_parts: dict[str, Any]) -> None:
    scheduler, schedule = family_parts["scheduler"], teacher.schedule
    sample, noise = torch.randn(2, 5, 4)
    t = torch.tensor([0, 10, 500, 800, 999])
    noised = schedule.alpha[t, None] * sample + schedule.sigma[t, None] * noise
    if teacher.unet is None:
        expected = scheduler.scale_noise(sample, schedule.model_timesteps[t], noise)
    else:
        expected = scheduler.add_noise(sample, noise, t.float())
        scales = scheduler.sigmas.flip(0)[1:][t, None]  # add_noise of Euler's is of unit signal
        expected = expected / (scales**2 + 1).sqrt()
    torch.testing.assert_close(noised, expected, rtol=1e-4, atol=1e-5)


def _by_hand(teacher: DiffusionTeacher, latents: Tensor, draws: int, guidance_scale: float) -> Tensor:
    """The loss with plain autograd behind it: one call of the bare denoiser per draw, from the scheduler's tables."""
    draw = sample_timesteps(teacher.schedule, len(latents), draws, SEED)
    eps = philox.normal(SEED, (len(latents), draws, *latents.shape[1:])).double()
    flow = teacher.unet is None
    if flow:
        shifted = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        sigmas = shifted.sigmas.flip(0).double()
        alphas, told = 1 - sigmas, shifted.timesteps.flip(0)
    else:
        alpha_bar = diffusers.EulerDiscreteScheduler(
            **{name: models.SCHEDULER_CONFIG[name] for name in ("beta_start", "beta_end", "beta_schedule")}
        ).alphas_cumprod.double()
        alphas, sigmas, told = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), torch.arange(1000)

    def predict(noised: Tensor, timestep: Tensor, text: TextConditioning) -> Tensor:
        if flow:
            return teacher.transformer(noised, text.embeddings, text.pooled, timestep[None]).sample
        sizes = torch.tensor([[32, 32, 0, 0, 32, 32]]).double()
        conditions = {"text_embeds": text.pooled, "time_ids": sizes}
        return teacher.unet(noised, timestep, text.embeddings, added_cond_kwargs=conditions).sample

    losses = []
    for i, caption in enumerate(CAPTIONS[: len(latents)]):
        for d in range(draws):
            t = draw.t[i, d]
            noised = alphas[t] * latents[i : i + 1] + sigmas[t] * eps[i, d][None]
            output = predict(noised, told[t], teacher.encode_text([caption]))
            if guidance_scale != 1:
                without = predict(noised, told[t], teacher.encode_no_text())
                output = without + guidance_scale * (output - without)
            # A flow's velocity is eps - z, so that z = z_t - sigma_t v and eps = z_t + alpha_t v.
            eps_hat = noised + alphas[t] * output if flow else output
            losses.append((eps_hat - eps[i, d]).square().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_loss_is_plain_backpropagation(teacher: DiffusionTeacher, guidance_scale: float) -> None:
    teacher.double()
    latents = torch.randn(3, *teacher.latent_shape, dtype=torch.float64, requires_grad=True)
    expected = _by_hand(teacher, latents, 2, guidance_scale)
    (expected_gradient,) = torch.autograd.grad(expected, latents)
    loss = SDSLoss(teacher, draws=2, guidance_scale=guidance_scale)(latents, CAPTIONS, seed=SEED)
    (gradient,) = torch.autograd.grad(loss, latents)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert (gradient - expected_gradient).norm() < 1e-4 * expected_gradient.norm()


@pytest.mark.parametrize("jacobian", ["full", "skip"])
@pytest.mark.parametrize("teacher_batch", [1, 2])
def test_pieces_equal_the_whole(teacher: DiffusionTeacher, jacobian: Any, teacher_batch: int) -> None:
    teacher.double()
    latents = torch.randn(3, *teacher.latent_shape, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"draws": 2, "guidance_scale": 2.0, "jacobian": jacobian, "strategy": "stratified"}
    whole = SDSLoss(teacher, **options)(latents, CAPTIONS, seed=SEED)
    pieces = SDSLoss(teacher, teacher_batch=teacher_batch, **options)(latents, teacher.encode_text(CAPTIONS), seed=SEED)
    (expected,), (gradient,) = (torch.autograd.grad(loss, latents) for loss in (whole, pieces))
    assert abs(pieces - whole) <= 1e-10 * whole
    assert (gradient - expected).norm() <= 1e-10 * expected.norm()
    assert expected.norm() > 0


def test_loss_of_a_perfect_flow_is_zero(sd3_parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose output is what diffusers trains it on, noise - latents."""
    teacher = DiffusionTeacher(**sd3_parts)
    latents = torch.randn(2, *teacher.latent_shape)
    velocity = philox.normal(SEED, (2, 1, *latents.shape[1:]))[:, 0] - latents
    monkeypatch.setattr(teacher, "predict", lambda noised, t, text: velocity)
    loss = SDSLoss(teacher)
    assert loss(latents, CAPTIONS[:2], seed=SEED) < 1e-9
    monkeypatch.setattr(teacher, "predict", lambda noised, t, text: -velocity)
    assert loss(latents, CAPTIONS[:2], seed=SEED) > 0.1


def test_processes_draw_one_global_batch(teacher: DiffusionTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher.double()
    latents = torch.randn(2, *teacher.latent_shape, dtype=torch.float64)
    loss = SDSLoss(teacher, guidance_scale=2.0)
    whole = loss(latents, CAPTIONS[:2], seed=SEED)
    monkeypatch.setattr(loss_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(loss_module.dist, "get_world_size", lambda: 2)
    losses = []
    for rank in range(2):
        monkeypatch.setattr(loss_module.dist, "get_rank", lambda rank=rank: rank)
        losses.append(loss(latents[rank : rank + 1], [CAPTIONS[rank]], seed=SEED))
    torch.testing.assert_close(torch.stack(losses).mean(), whole, rtol=1e-10, atol=0)


def test_embeddings_alone_are_refused(teacher: DiffusionTeacher) -> None:
    embeddings = teacher.encode_text(CAPTIONS).embeddings
    message = "text: expected with a pooled embedding, as encode_text gives it, got embeddings alone"
    with pytest.raises(ValueError, match=re.escape(message)):
        SDSLoss(teacher)(torch.randn(3, *teacher.latent_shape), embeddings)


@pytest.mark.parametrize("name", ["tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"])
def test_missing_text_parts(family_parts: dict[str, Any], name: str) -> None:
    teacher = DiffusionTeacher(**{**family_parts, name: None})
    with pytest.raises(ValueError, match=f"{name}: this teacher was built without one, and this call needs it"):
        teacher.encode_text(CAPTIONS)


def test_refiner_is_refused(sdxl_parts: dict[str, Any]) -> None:
    """It takes five sizes: an aesthetic score in place of the target's height and width."""
    config = {**sdxl_parts["unet"].config, "projection_class_embeddings_input_dim": 5 * 8 + 24}
    unet = diffusers.UNet2DConditionModel.from_config(config)
    message = (
        "unet: beside 6 sizes it takes a pooled embedding of width 16, and text_encoder_2 gives 24 (a refiner takes "
    )
    with pytest.raises(UnsupportedTeacherError, match=re.escape(message)):
        DiffusionTeacher(**{**sdxl_parts, "unet": unet})


def test_other_transformers_are_refused(sd3_parts: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedTeacherError, match="transformer: got a DiTTransformer2DModel; supported are"):
        DiffusionTeacher(
            **{
                **sd3_parts,
                "transformer": diffusers.DiTTransformer2DModel(
                    num_attention_heads=2, attention_head_dim=4, sample_size=4, num_layers=1, norm_num_groups=2
                ),
            }
        )


def test_vae_of_other_channels_is_refused(sd3_parts: dict[str, Any], sdxl_parts: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedTeacherError, match="vae: expected 8 latent channels, as the denoiser takes, got 4"):
        DiffusionTeacher(**{**sd3_parts, "vae": sdxl_parts["vae"]})


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    denoiser = "transformer" if "transformer" in index else "unet"
    weights = folder / denoiser / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors"):
        DiffusionTeacher.from_pretrained(folder)
