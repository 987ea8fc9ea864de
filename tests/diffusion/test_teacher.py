"""The teacher against the pipeline it was taken from, its caches, and what it refuses."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fastsds.diffusion import DiffusionTeacher, NoiseSchedule, UnsupportedTeacherError
from fastsds.toyworld import models

SUPPORTED = (
    "supported are Stable Diffusion 1.x and 2.x (StableDiffusionPipeline), SDXL (StableDiffusionXLPipeline) and "
    "Stable Diffusion 3.x (StableDiffusion3Pipeline) text-to-image pipelines"
)
CAPTIONS = ["a red circle", "a blue square above a green triangle", ""]


@pytest.fixture
def encoder_calls(teacher: DiffusionTeacher) -> Iterator[list[int]]:
    """How many captions each call of the text encoder got."""
    calls: list[int] = []
    handle = teacher.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    yield calls
    handle.remove()


@pytest.fixture
def pipeline(teacher_parts: dict[str, Any]) -> Any:
    return diffusers.StableDiffusionPipeline(
        **teacher_parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _embeddings(teacher: DiffusionTeacher, captions: list[str]) -> Tensor:
    encoded = teacher.encode_text(captions)
    assert encoded.pooled is None
    return encoded.embeddings


def _inputs(teacher: DiffusionTeacher, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    text = _embeddings(teacher, CAPTIONS[:batch])
    return torch.randn(batch, *teacher.latent_shape), torch.tensor([3, 700])[:batch], text


@pytest.mark.parametrize("as_string", [False, True])
def test_from_pretrained_is_the_teacher_of_its_parts(
    teacher: DiffusionTeacher, pipeline_folder: Path, as_string: bool
) -> None:
    loaded = DiffusionTeacher.from_pretrained(str(pipeline_folder) if as_string else pipeline_folder)
    state, expected = loaded.state_dict(), teacher.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert loaded.schedule.prediction_type == teacher.schedule.prediction_type == "v_prediction"
    assert torch.equal(loaded.schedule.alpha, teacher.schedule.alpha)
    inputs = _inputs(teacher)
    assert torch.equal(_embeddings(loaded, CAPTIONS), _embeddings(teacher, CAPTIONS))
    assert torch.equal(loaded.predict(*inputs), teacher.predict(*inputs))
    images = torch.rand(1, 3, *teacher.image_size)
    assert torch.equal(loaded.encode_images(images), teacher.encode_images(images))


def test_half_precision_loading(teacher: DiffusionTeacher, pipeline_folder: Path) -> None:
    loaded = DiffusionTeacher.from_pretrained(pipeline_folder, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    noised, t, text = _inputs(teacher)
    assert _embeddings(loaded, CAPTIONS).dtype == torch.bfloat16
    prediction = loaded.predict(noised, t, text)
    assert prediction.dtype == torch.bfloat16
    torch.testing.assert_close(prediction.float(), teacher.predict(noised, t, text), rtol=0.1, atol=0.1)
    assert loaded.encode_images(torch.rand(1, 3, 32, 32)).dtype == torch.float32
    assert loaded.schedule.alpha.dtype == torch.float32


def test_sizes(teacher: DiffusionTeacher) -> None:
    assert teacher.latent_shape == (4, 8, 8)
    assert teacher.image_size == (32, 32)
    assert tuple(teacher.encode_images(torch.rand(1, 3, 32, 32)).shape[1:]) == teacher.latent_shape


def test_predict_is_the_unet(teacher: DiffusionTeacher, teacher_parts: dict[str, Any]) -> None:
    noised, t, text = _inputs(teacher)
    expected = teacher_parts["unet"](noised, t, encoder_hidden_states=text, return_dict=False)[0]
    torch.testing.assert_close(teacher.predict(noised, t, text), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(teacher.predict(noised, t.flip(0), text), expected, atol=1e-4)
    assert not torch.allclose(teacher.predict(noised, t, text.flip(0)), expected, atol=1e-4)


def test_predict_tells_the_network_the_schedules_timesteps(teacher_parts: dict[str, Any]) -> None:
    """Flow matching's index is not what the network is told."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    teacher = DiffusionTeacher(**{**teacher_parts, "scheduler": scheduler})
    noised, t, text = _inputs(teacher)
    told = scheduler.timesteps.flip(0)[t]
    assert not torch.allclose(told, t.float())
    expected = teacher_parts["unet"](noised, told, encoder_hidden_states=text).sample
    torch.testing.assert_close(teacher.predict(noised, t, text), expected, rtol=1e-5, atol=1e-6)


def test_predict_is_differentiable_in_the_latents_only(teacher: DiffusionTeacher) -> None:
    noised, t, text = _inputs(teacher)
    teacher.predict(noised.requires_grad_(), t, text).square().sum().backward()
    assert noised.grad is not None
    assert noised.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_takes_a_noise_schedule_and_missing_parts(teacher_parts: dict[str, Any]) -> None:
    schedule = NoiseSchedule(torch.full((5,), 0.8), torch.full((5,), 0.6), torch.arange(5), "epsilon")
    teacher = DiffusionTeacher(teacher_parts["unet"], None, None, None, schedule)
    assert teacher.schedule is schedule
    text = torch.randn(1, models.CONTEXT_LENGTH, 64)
    assert teacher.predict(torch.randn(1, 4, 8, 8), torch.tensor([1]), text).shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="vae: this teacher was built without one"):
        teacher.encode_images(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="tokenizer: this teacher was built without one"):
        teacher.encode_text(["a red circle"])


def test_text_is_encoded_as_the_pipeline_does(teacher: DiffusionTeacher, pipeline: Any) -> None:
    long = "a red circle and " * 20  # is truncated
    captions = [*CAPTIONS, long]
    expected = pipeline.encode_prompt(captions, "cpu", 1, False)[0]
    encoded = _embeddings(teacher, captions)
    assert encoded.shape == (4, models.CONTEXT_LENGTH, 64)
    torch.testing.assert_close(encoded, expected, rtol=1e-5, atol=1e-5)
    unconditional = pipeline.encode_prompt("a red circle", "cpu", 1, True)[1]
    torch.testing.assert_close(_embeddings(teacher, [""]), unconditional, rtol=1e-5, atol=1e-5)
    assert not encoded.requires_grad


def test_text_is_encoded_once_per_caption(teacher: DiffusionTeacher, encoder_calls: list[int]) -> None:
    first = _embeddings(teacher, ["a", "b", "a", "b", "a"])
    assert encoder_calls == [2]
    again = _embeddings(teacher, ["b", "c", "a"])
    assert encoder_calls == [2, 1]
    assert torch.equal(again[0], first[1])
    assert torch.equal(again[2], first[0])
    for row, source in zip(first, (0, 1, 0, 1, 0), strict=True):
        assert torch.equal(row, first[source])
    assert not torch.allclose(first[0], first[1], atol=1e-3)


def test_result_can_be_written_to_without_changing_the_cache(teacher: DiffusionTeacher) -> None:
    first = _embeddings(teacher, ["a"])
    expected = first.clone()
    first.zero_()
    assert torch.equal(_embeddings(teacher, ["a"]), expected)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_cache_is_bounded(teacher: DiffusionTeacher, encoder_calls: list[int], size: int) -> None:
    teacher._text_cache.size = size
    captions = ["a", "b", "c", "d"]
    encoded = _embeddings(teacher, captions)
    assert encoded.shape[0] == 4
    assert len(teacher._text_cache.rows) == size
    bytes_kept = sum(row.embeddings.untyped_storage().nbytes() for row in teacher._text_cache.rows.values())
    assert bytes_kept == size * models.CONTEXT_LENGTH * 64 * 4
    torch.testing.assert_close(_embeddings(teacher, captions), encoded)
    assert encoder_calls == [4, 4 - size]


def test_least_recently_used_caption_is_dropped(teacher: DiffusionTeacher, encoder_calls: list[int]) -> None:
    teacher._text_cache.size = 2
    for captions in (["a"], ["b"], ["a"], ["c"], ["a"]):  # "b" is the oldest when "c" comes
        _embeddings(teacher, captions)
    assert encoder_calls == [1, 1, 1]
    _embeddings(teacher, ["b"])
    assert encoder_calls == [1, 1, 1, 1]


def test_cache_follows_the_teachers_dtype(teacher: DiffusionTeacher) -> None:
    _embeddings(teacher, ["a"])
    teacher.double()
    encoded = _embeddings(teacher, ["a", "b"])
    assert encoded.dtype == torch.float64
    torch.testing.assert_close(encoded, _embeddings(teacher, ["b", "a"]).flip(0), rtol=1e-12, atol=1e-12)


def test_what_is_kept_does_not_depend_on_autocast(teacher: DiffusionTeacher) -> None:
    """Text and latents go to caches that other runs read."""
    images, other = torch.rand(2, 3, *teacher.image_size), copy.deepcopy(teacher)
    with torch.autocast("cpu", torch.bfloat16):
        text, latents = _embeddings(teacher, CAPTIONS), teacher.encode_images(images)
    assert torch.equal(text, _embeddings(other, CAPTIONS))
    assert torch.equal(latents, other.encode_images(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prediction_is_in_the_teachers_dtype_under_autocast(teacher: DiffusionTeacher, dtype: torch.dtype) -> None:
    """A teacher that is in low precision already computes as it does without."""
    inputs = _inputs(teacher.to(dtype))
    expected = teacher.predict(*inputs)
    with torch.autocast("cpu", torch.float16):
        predicted = teacher.predict(*inputs)
    assert predicted.dtype == dtype
    assert torch.equal(predicted, expected) == (dtype == torch.bfloat16)
    torch.testing.assert_close(predicted, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("captions", ["a red circle", [1, 2], ["a", None]])
def test_text_that_is_no_list_of_strings(teacher: DiffusionTeacher, captions: Any) -> None:
    message = f"captions: expected a sequence of strings, got {captions!r}"
    with pytest.raises(TypeError, match=re.escape(message)):
        teacher.encode_text(captions)


def test_images_are_encoded_and_scaled(teacher: DiffusionTeacher, teacher_parts: dict[str, Any]) -> None:
    vae = teacher_parts["vae"]
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        mean = vae.quant_conv(vae.encoder(2 * images - 1))[:, :4]
    latents = teacher.encode_images(images)
    torch.testing.assert_close(latents, mean * 0.18215, rtol=1e-5, atol=1e-6)
    assert latents.dtype == torch.float32
    assert not latents.requires_grad


@pytest.mark.parametrize("size", [(64, 64), (48, 20), (8, 8)])
def test_images_of_other_sizes_are_resized(teacher: DiffusionTeacher, size: tuple[int, int]) -> None:
    images = torch.rand(1, 3, *size)
    resized = torch.nn.functional.interpolate(images, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(teacher.encode_images(images), teacher.encode_images(resized))
    low = images.bfloat16()
    torch.testing.assert_close(teacher.encode_images(low), teacher.encode_images(low.float()))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 1, 32, 32), "got torch.float32 [1, 1, 32, 32]"),
        (torch.rand(3, 32, 32), "got torch.float32 [3, 32, 32]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "got torch.uint8 [1, 3, 32, 32]"),
    ],
)
def test_refused_images(teacher: DiffusionTeacher, images: Tensor, message: str) -> None:
    expected = "images: expected floating point [images, 3, height, width] in [0, 1], " + message
    with pytest.raises(ValueError, match=re.escape(expected)):
        teacher.encode_images(images)


def test_stays_frozen_and_in_evaluation_mode(teacher: DiffusionTeacher, teacher_parts: dict[str, Any]) -> None:
    surrounding = torch.nn.ModuleDict({"teacher": teacher, "other": torch.nn.Dropout()}).train()
    assert surrounding["other"].training
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    # Parts in training mode are put into evaluation mode when the teacher is built.
    unet = diffusers.UNet2DConditionModel(**models.UNET_CONFIG).train()
    DiffusionTeacher(unet, None, None, None, teacher_parts["scheduler"])
    assert not unet.training
    assert not any(parameter.requires_grad for parameter in unet.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionControlNetPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionUpscalePipeline",
        "FluxPipeline",
        ["pipeline", "MyPipeline"],
    ],
)
def test_other_pipelines_are_refused_by_name(pipeline_folder: Path, tmp_path: Path, name: Any) -> None:
    """From the index alone, before any weights are read, and whatever code lies in the folder."""
    (tmp_path / "pipeline.py").write_text("raise SystemExit('ran code of the folder')")
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    with pytest.raises(UnsupportedTeacherError, match=re.escape(f"source: {tmp_path} is a {name}; {SUPPORTED}")):
        DiffusionTeacher.from_pretrained(tmp_path)


def test_scheduler_of_the_folders_own_is_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    (folder / "scheduler" / "own.py").write_text("raise SystemExit('ran code of the folder')")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["own", "OwnScheduler"]}))
    message = f"source: the scheduler of {folder} is a OwnScheduler, which diffusers does not have"
    with pytest.raises(UnsupportedTeacherError, match=re.escape(message)):
        DiffusionTeacher.from_pretrained(folder)


def test_image_to_image_pipeline_is_the_same_network(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionImg2ImgPipeline"}))
    assert DiffusionTeacher.from_pretrained(folder).latent_shape == (4, 8, 8)


def test_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"source: expected a diffusers pipeline folder with a model_index\.json"
    ):
        DiffusionTeacher.from_pretrained(tmp_path)


def _unet(**changes: Any) -> Any:
    return diffusers.UNet2DConditionModel(**{**models.UNET_CONFIG, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, "unet: it takes 9 channels and predicts 4 (an inpainting, "),
        ({"out_channels": 8}, "unet: it takes 4 channels and predicts 8 ("),
        ({"addition_embed_type": "text"}, "unet: it wants conditions that a caption does not give (addition_embed"),
        ({"num_class_embeds": 3}, "unet: it wants conditions that a caption does not give (num_class_embeds=3)"),
        ({"time_cond_proj_dim": 8}, "unet: it wants conditions that a caption does not give (time_cond_proj_dim=8)"),
    ],
)  # fmt: skip
def test_other_unets_are_refused(teacher_parts: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedTeacherError, match=re.escape(message)) as refused:
        DiffusionTeacher(**{**teacher_parts, "unet": _unet(**changes)})
    assert str(refused.value).endswith("; " + SUPPORTED)


def test_unets_of_other_classes_are_refused(teacher_parts: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedTeacherError, match="unet: got a Linear; supported are"):
        DiffusionTeacher(**{**teacher_parts, "unet": torch.nn.Linear(2, 2)})


def test_vae_of_other_channels_is_refused(teacher_parts: dict[str, Any]) -> None:
    vae = diffusers.AutoencoderKL(**{**models.VAE_CONFIG, "latent_channels": 16})
    with pytest.raises(UnsupportedTeacherError, match="vae: expected 4 latent channels, as the denoiser takes, got 16"):
        DiffusionTeacher(**{**teacher_parts, "vae": vae})
