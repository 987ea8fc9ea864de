"""Prompt tuning on the common loop: which images, which tensors, and that a run resumes to the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from fastsds.data import DataError, FewShotDataset, LabelledImage
from fastsds.intcoop import CoCoOp, CoOp, IntCoOp
from fastsds.training import IntCoOpConfig, IntCoOpTrainer
from fastsds.training.metrics import read_metrics

CLASSNAMES = ("circle", "ring", "cross")
WORDS = ("red", "small blue")


def _preprocess(image: Image.Image) -> Tensor:
    torch_bytes = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return torch_bytes.view(32, 32, 3).permute(2, 0, 1) / 255


@pytest.fixture
def items() -> list[LabelledImage]:
    """Five images of each class, each class bright in a channel of its own; the second word for every other image."""
    noise = torch.randint(0, 256, (15, 32, 32, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    for row in range(15):
        noise[row, ..., row % 3] = 255
    return [
        LabelledImage(Image.fromarray(pixels.numpy()), row % 3, CLASSNAMES[row % 3], str(row), attribute=WORDS[row % 2])
        for row, pixels in enumerate(noise)
    ]


def _config(out: Path, **options: Any) -> IntCoOpConfig:
    return IntCoOpConfig(
        **{"out": out, "shots": 4, "epochs": 3, "tensorboard": False, "progress": False, "log_every": 1, **options}
    )


def _loader(items: list[LabelledImage], **options: Any) -> DataLoader[Any]:
    return DataLoader(FewShotDataset(items, _preprocess), **{"batch_size": 4, **options})


def _build(method: Any, clip: Any, tokenizer: Any) -> Any:
    torch.manual_seed(5)
    return method(clip, CLASSNAMES, tokenizer=tokenizer)


@pytest.mark.parametrize("method", [CoOp, CoCoOp, IntCoOp])
def test_training_lowers_the_loss_and_leaves_clip_alone(
    method: Any, clip: Any, clip_tokenizer: Any, items: list[LabelledImage], tmp_path: Path
) -> None:
    model = _build(method, clip, clip_tokenizer)
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    result = IntCoOpTrainer(model, _loader(items), _config(tmp_path / "run", epochs=20, lr=0.02)).fit()
    assert result.step == 20 * 3
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl", "train")]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())
    stored = load_file(result.checkpoint / "trained.safetensors")
    assert set(stored) == set(model.trained_parameters())
    assert not any(name.startswith("clip.") for name in stored)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_stopped_run_resumes_to_the_same_numbers(
    clip: Any, clip_tokenizer: Any, items: list[LabelledImage], tmp_path: Path, stop: int
) -> None:
    whole = _build(IntCoOp, clip, clip_tokenizer)
    IntCoOpTrainer(whole, _loader(items), _config(tmp_path / "whole", save_every=1)).fit()

    class StoppedError(RuntimeError):
        pass

    halves = _build(IntCoOp, clip, clip_tokenizer)
    trainer = IntCoOpTrainer(halves, _loader(items), _config(tmp_path / "halves", save_every=1))
    losses, calls = halves.losses, []

    def stopping(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) > stop:
            raise StoppedError
        return losses(*arguments)

    halves.losses = stopping
    with pytest.raises(StoppedError):
        trainer.fit()
    resumed = _build(IntCoOp, clip, clip_tokenizer)
    with torch.no_grad():
        resumed.conditioned.context.zero_()  # only the checkpoint knows it
    IntCoOpTrainer(resumed, _loader(items), _config(tmp_path / "halves", save_every=1)).fit(resume=True)
    for name, parameter in whole.trained_parameters().items():
        assert torch.equal(parameter, resumed.trained_parameters()[name]), name
    records = [read_metrics(tmp_path / run / "metrics.jsonl", "train") for run in ("whole", "halves")]
    assert records[0] == records[1]


def test_frozen_features_are_computed_once_and_change_nothing(
    clip: Any, clip_tokenizer: Any, items: list[LabelledImage], tmp_path: Path
) -> None:
    trained = {}
    for cached in (True, False):
        model = _build(IntCoOp, clip, clip_tokenizer)
        encode, encoded = model.encode_images, []
        model.encode_images = lambda images, encode=encode, encoded=encoded: (
            encoded.append(len(images)) or encode(images)
        )
        IntCoOpTrainer(model, _loader(items), _config(tmp_path / str(cached), cache_features=cached)).fit()
        assert sum(encoded) == 12 * (1 if cached else 3)
        trained[cached] = model.trained_parameters()
    for name, parameter in trained[True].items():
        torch.testing.assert_close(parameter, trained[False][name], rtol=1e-4, atol=1e-5)


def test_the_fields_shots_of_every_class_are_trained_on(
    clip: Any, clip_tokenizer: Any, items: list[LabelledImage], tmp_path: Path
) -> None:
    import random

    random.seed(7)
    expected = []
    for label in range(3):
        expected += random.sample([item.key for item in items if item.label == label], 2)
    seen: list[Tensor] = []
    model = _build(CoOp, clip, clip_tokenizer)
    encode = model.encode_images
    model.encode_images = lambda images: seen.extend(images) or encode(images)
    trainer = IntCoOpTrainer(model, _loader(items), _config(tmp_path / "run", shots=2, seed=7))
    assert trainer.total_steps == 3 * 2
    drawn = [next(item.key for item in items if torch.equal(_preprocess(item.image), one)) for one in seen]
    assert drawn == expected
    every = IntCoOpTrainer(model, _loader(items), _config(tmp_path / "all", shots=None))
    assert every.steps_per_epoch == 4


def test_the_model_learns_the_words_it_explains_with(
    clip: Any, clip_tokenizer: Any, items: list[LabelledImage], tmp_path: Path
) -> None:
    model = _build(IntCoOp, clip, clip_tokenizer)
    IntCoOpTrainer(model, _loader(items), _config(tmp_path / "one"))
    assert model.attributes == WORDS
    model.attributes = ("blue",)
    IntCoOpTrainer(model, _loader(items), _config(tmp_path / "two"))
    assert model.attributes == ("blue",)


def test_evaluation_sees_the_model(clip: Any, clip_tokenizer: Any, items: list[LabelledImage], tmp_path: Path) -> None:
    model = _build(CoOp, clip, clip_tokenizer)
    seen: list[tuple[Any, bool]] = []

    def evaluate(given: Any) -> dict[str, float]:
        seen.append((given, given.training))
        return {"accuracy": 0.5}

    result = IntCoOpTrainer(model, _loader(items), _config(tmp_path / "run"), evaluate).fit()
    assert seen == [(model, False)]
    assert result.evaluation == {"accuracy": 0.5}


def test_a_run_of_other_classes_is_not_resumed(
    clip: Any, clip_tokenizer: Any, items: list[LabelledImage], tmp_path: Path
) -> None:
    IntCoOpTrainer(_build(CoOp, clip, clip_tokenizer), _loader(items), _config(tmp_path / "run")).fit()
    other = CoCoOp(clip, CLASSNAMES, tokenizer=clip_tokenizer)
    with pytest.raises(ValueError, match="checkpoint: method was 'CoOp' when it was written and is 'CoCoOp'"):
        IntCoOpTrainer(other, _loader(items), _config(tmp_path / "run")).fit(resume=True)


def test_data_that_does_not_fit_is_refused(
    clip: Any, clip_tokenizer: Any, items: list[LabelledImage], tmp_path: Path
) -> None:
    model, config = _build(IntCoOp, clip, clip_tokenizer), _config(tmp_path / "run")
    with pytest.raises(DataError, match=r"shots: expected 9 training images of every class, 3 of 3 classes have fewer"):
        IntCoOpTrainer(model, _loader(items), _config(tmp_path / "run", shots=9))
    bare = [LabelledImage(item.image, item.label, item.classname, item.key) for item in items]
    with pytest.raises(DataError, match="attributes: expected one for each of 12 training images, 12 have none"):
        IntCoOpTrainer(model, _loader(bare), config)
    swapped = [LabelledImage(item.image, 2 - item.label, item.classname, item.key) for item in items]
    with pytest.raises(DataError, match="labels: label 2 is 'circle' in the data and 'cross' in the model"):
        IntCoOpTrainer(model, _loader(swapped), config)
    beyond = [LabelledImage(item.image, item.label + 3, item.classname, item.key) for item in items]
    with pytest.raises(DataError, match=r"labels: expected positions below 3, the model's classes, got 3 \('circle'\)"):
        IntCoOpTrainer(model, _loader(beyond), config)
    with pytest.raises(TypeError, match="loader: expected one over a FewShotDataset, got one over list"):
        IntCoOpTrainer(model, DataLoader([1, 2]), config)
    with pytest.raises(ValueError, match="shots: expected at least 1 or None, got 0"):
        IntCoOpConfig(shots=0)
