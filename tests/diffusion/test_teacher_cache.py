"""What a teacher keeps on disk: found by another process, never mistaken for another teacher's."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsds.diffusion import DiffusionTeacher, TeacherSource, TensorCache, TextConditioning
from fastsds.diffusion.cache import content_key
from fastsds.diffusion.fingerprint import fingerprint

CAPTIONS = ["a red circle", "a blue square", "a red circle", ""]


@pytest.fixture(params=["sd", "sdxl", "sd3"])
def parts(request: pytest.FixtureRequest) -> dict[str, Any]:
    found = request.getfixturevalue("teacher_parts" if request.param == "sd" else f"{request.param}_parts")
    return {name: copy.deepcopy(part) for name, part in found.items()}


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    return TensorCache(tmp_path / "cache", 10**8)


def _count(module: torch.nn.Module) -> list[int]:
    """The sizes of the batches that a module is given from now on."""
    sizes: list[int] = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    return sizes


def _equal(one: TextConditioning, other: TextConditioning) -> bool:
    first, second = one.tensors(), other.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_text_is_encoded_once_for_all_teachers_of_the_same_weights(parts: dict[str, Any], cache: TensorCache) -> None:
    first = DiffusionTeacher(**parts, cache=cache)
    text = first.encode_text(CAPTIONS)
    assert _equal(text, DiffusionTeacher(**copy.deepcopy(parts)).encode_text(CAPTIONS))
    second = DiffusionTeacher(**copy.deepcopy(parts), cache=TensorCache(cache.folder, 10**8))
    calls = [_count(getattr(second, name)) for name in second.family.text if name.startswith("text_encoder")]
    assert _equal(second.encode_text(CAPTIONS), text)
    assert not any(calls)
    second.encode_text(["a green triangle", *CAPTIONS])
    assert calls == [[1]] * len(calls)


def test_memory_stands_before_the_disk(parts: dict[str, Any], cache: TensorCache, monkeypatch: Any) -> None:
    teacher = DiffusionTeacher(**parts, cache=cache, text_cache_size=2)
    teacher.encode_text(["a", "b"])
    asked: list[str] = []
    get = cache.get
    monkeypatch.setattr(cache, "get", lambda key: asked.append(key) or get(key))
    teacher.encode_text(["b", "a", "b"])
    assert asked == []
    teacher.encode_text(["c"])  # drops "b" from memory
    teacher.encode_text(["a", "b"])
    assert [key[-1] for key in asked] == ["c", "b"]


def _change(module: torch.nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1


def _other_tokenizer(parts: dict[str, Any]) -> None:
    for name in {"tokenizer", "tokenizer_2"} & parts.keys():
        parts[name].model_max_length = 10


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: _change(parts["text_encoder"]),
        lambda parts: _change(parts.get("text_encoder_3", parts.get("text_encoder_2", parts["text_encoder"]))),
        lambda parts: setattr(parts["text_encoder"].config, "hidden_act", "gelu"),
        _other_tokenizer,
        lambda parts: [part.bfloat16() for part in parts.values() if isinstance(part, torch.nn.Module)],
    ],
    ids=["weight", "last encoder's weight", "activation", "tokenizer", "dtype"],
)
def test_text_of_another_teacher_is_not_taken(parts: dict[str, Any], cache: TensorCache, change: Callable) -> None:
    DiffusionTeacher(**copy.deepcopy(parts), cache=cache).encode_text(CAPTIONS)
    change(parts)
    other = DiffusionTeacher(**parts, cache=cache)
    calls = _count(other.text_encoder)
    other.encode_text(CAPTIONS)
    assert calls == [3]


def test_fingerprint_is_of_what_is_computed(parts: dict[str, Any]) -> None:
    """Using or copying the parts changes nothing; each of them, and their order, matters."""
    teacher = DiffusionTeacher(**parts)
    components = [getattr(teacher, name) for name in (*teacher.family.text, "vae")]
    before = fingerprint(components)
    copied = [copy.deepcopy(component) for component in components]
    teacher.encode_text(["a long caption of many words " * 5])
    assert fingerprint(components) == fingerprint(copied) == before
    assert fingerprint(components[::-1]) != before
    for without in range(len(components)):
        assert fingerprint([None if i == without else part for i, part in enumerate(components)]) != before


def test_fingerprint_outlives_the_process(pipeline_folder: Path) -> None:
    script = (
        "import sys; from fastsds.diffusion import DiffusionTeacher; from fastsds.diffusion.fingerprint import *;"
        "teacher = DiffusionTeacher.from_pretrained(sys.argv[1]);"
        "print(fingerprint([teacher.tokenizer, teacher.text_encoder, teacher.vae]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(pipeline_folder)], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    teacher = DiffusionTeacher.from_pretrained(pipeline_folder)
    assert run.stdout.strip() == fingerprint([teacher.tokenizer, teacher.text_encoder, teacher.vae])


def test_corrupt_text_is_encoded_again(parts: dict[str, Any], cache: TensorCache) -> None:
    text = DiffusionTeacher(**copy.deepcopy(parts), cache=cache).encode_text(CAPTIONS)
    files = list(cache.folder.rglob("*.safetensors"))
    assert len(files) == 3
    files[0].write_bytes(files[0].read_bytes()[:-1])
    for expected in ([1], []):
        teacher = DiffusionTeacher(**copy.deepcopy(parts), cache=cache)
        calls = _count(teacher.text_encoder)
        torch.testing.assert_close(teacher.encode_text(CAPTIONS).embeddings, text.embeddings)
        assert calls == expected


def _images(count: int = 3) -> tuple[list[str], Tensor]:
    images = torch.rand(count, 3, 32, 32)
    return [content_key(image) for image in images], images


def test_images_are_encoded_once(parts: dict[str, Any], cache: TensorCache) -> None:
    keys, images = _images()
    teacher = DiffusionTeacher(**parts, cache=cache)
    expected = DiffusionTeacher(**copy.deepcopy(parts)).encode_images(images)
    torch.testing.assert_close(teacher.encode_images_cached(keys[:2], images[:2]), expected[:2])
    calls = _count(teacher.vae.encoder)
    found = teacher.encode_images_cached([*keys[::-1], keys[0]], torch.cat([images.flip(0), images[:1]]))
    torch.testing.assert_close(found, torch.cat([expected.flip(0), expected[:1]]), rtol=1e-5, atol=1e-6)
    assert calls == [1]
    assert found.dtype == torch.float32
    # Latents are found without a look at the images.
    torch.testing.assert_close(teacher.encode_images_cached(keys, torch.zeros_like(images)), expected)
    assert calls == [1]


def test_latents_of_another_vae_are_not_taken(parts: dict[str, Any], cache: TensorCache) -> None:
    keys, images = _images()
    DiffusionTeacher(**copy.deepcopy(parts), cache=cache).encode_images_cached(keys, images)
    _change(parts["vae"])
    teacher = DiffusionTeacher(**parts, cache=cache)
    expected = teacher.encode_images(images)
    torch.testing.assert_close(teacher.encode_images_cached(keys, images), expected)


def test_images_without_a_cache(parts: dict[str, Any]) -> None:
    keys, images = _images()
    teacher = DiffusionTeacher(**parts)
    assert torch.equal(teacher.encode_images_cached(keys, images), teacher.encode_images(images))
    with pytest.raises(ValueError, match="keys: expected one for each of 3 images, got 2"):
        teacher.encode_images_cached(keys[:2], images)


def test_source_makes_the_cache_and_the_teacher(pipeline_folder: Path, tmp_path: Path) -> None:
    source = TeacherSource(str(pipeline_folder), dtype="bfloat16", cache=tmp_path / "kept", cache_size_gb=0.002)
    teacher = source.load()
    assert teacher.dtype == torch.bfloat16
    assert (teacher.cache.folder, teacher.cache.max_bytes) == (tmp_path / "kept", 2_000_000)
    text = teacher.encode_text(CAPTIONS)
    again = source.load("cpu")
    calls = _count(again.text_encoder)
    assert _equal(again.encode_text(CAPTIONS), text)
    assert calls == []
    assert TeacherSource(str(pipeline_folder)).load().cache is None


def test_source_says_where_attention_is_served(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.warns(UserWarning, match=r"attention: xformers cannot serve torch\.float32 on cpu"):
        TeacherSource(str(pipeline_folder), attention="xformers").load()
