from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from fastsds.data import CaptionDataset, caption_loader
from fastsds.training import TrainConfig, Trainer

IMAGES = 13


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def dataset(tmp_path: Path, load: Any, pictures: Any) -> Callable[[], CaptionDataset]:
    """Thirteen COCO images of three captions each; the fifth is truncated."""
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(IMAGES)]
    for number in range(IMAGES):
        pictures.save(tmp_path / "coco" / f"{number}.png", number)
    pictures.truncate(tmp_path / "coco" / "5.png")
    annotations = [{"image_id": row % IMAGES, "caption": f"{row % IMAGES} {row}"} for row in range(3 * IMAGES)]
    path = tmp_path / "coco" / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8")
    return lambda: load(path, max_bad_share=0.1)


class _Output(NamedTuple):
    loss: Tensor


class _Model(nn.Module):
    """Fits a line to the colours and writes down what it was given; raises in the forward of step `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.1, 0.2, -0.3]))
        self.dropout = nn.Dropout(0.5)
        self.stop = stop
        self.seen: list[list[str]] = []

    def forward(self, images: Tensor, tokens: Tensor, captions: list[str]) -> _Output:
        self.seen.append(captions)
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        scores = self.dropout(images / 255) @ self.weight
        return _Output((scores - tokens[:, 0] / 5).square().mean())

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight}

    def identity(self) -> dict[str, Any]:
        return {}

    def require_identity(self, recorded: dict[str, Any]) -> None:
        assert recorded == {}

    def random_streams(self) -> dict[str, Any]:
        return {}


def _train(dataset: CaptionDataset, out: Path, workers: int, stop: int | None = None, **options: Any) -> _Model:
    torch.manual_seed(0)
    model = _Model(stop)
    config = TrainConfig(out=out, lr=0.05, epochs=3, save_every=3, tensorboard=False, progress=False, seed=4)
    trainer = Trainer(model, caption_loader(dataset, 3, workers), config)
    try:
        trainer.fit(**options)
    except KeyboardInterrupt:
        assert stop is not None
    for worker in multiprocessing.active_children():  # the garbage collector would wait five seconds for each
        worker.terminate()
    return model


def test_a_run_stopped_in_mid_epoch_goes_on_to_the_same_numbers_with_workers(
    dataset: Callable[[], CaptionDataset], tmp_path: Path
) -> None:
    whole = _train(dataset(), tmp_path / "whole", workers=0)
    stopped = _train(dataset(), tmp_path / "stopped", workers=2, stop=7)
    resumed = _train(dataset(), tmp_path / "stopped", workers=2, resume=True)
    assert len(whole.seen) == 12 and len(stopped.seen) == 7
    assert stopped.seen == whole.seen[:7]
    assert resumed.seen == whole.seen[-len(resumed.seen) :] and 6 <= len(resumed.seen) <= 9  # not from an epoch's start
    assert torch.equal(resumed.weight, whole.weight)
    epochs = [[caption for batch in whole.seen[start : start + 4] for caption in batch] for start in (0, 4, 8)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # images in another order, and other captions of the same images
    texts = [{caption.split()[0]: caption for caption in epoch} for epoch in epochs]
    assert all("5" not in epoch for epoch in texts)
    shared = texts[0].keys() & texts[1].keys()
    assert len(shared) >= 9 and any(texts[0][image] != texts[1][image] for image in shared)


def test_workers_that_live_on_follow_the_epoch(dataset: Callable[[], CaptionDataset]) -> None:
    data = dataset()
    loader = caption_loader(data, IMAGES, workers=2, shuffle=False)
    epochs = []
    for epoch in range(3):
        data.set_epoch(epoch)
        (batch,) = loader
        assert batch["captions"] == [data[row]["captions"] for row in range(IMAGES)]
        epochs.append(tuple(batch["captions"]))
    assert len(set(epochs)) == 3


def test_the_order_is_the_seeds(dataset: Callable[[], CaptionDataset]) -> None:
    def order(seed: int, workers: int) -> list[list[str]]:
        loader = caption_loader(dataset(), 4, workers, seed=seed)
        return [batch["captions"] for _ in range(2) for batch in loader]

    first = order(1, 0)
    assert [len(batch) for batch in first] == [4] * 6  # the last one of an epoch has a row
    assert order(1, 2) == first and order(2, 0) != first and first[:3] != first[3:]


def test_workers_outlive_ctrl_c_and_end_when_told_to(dataset: Callable[[], CaptionDataset]) -> None:
    previous = signal.signal(signal.SIGTERM, lambda *_: None)  # as a run that takes it for a request
    try:
        batches = iter(caption_loader(dataset(), 1, workers=2, prefetch=1))
        workers = batches._workers  # type: ignore[attr-defined]
        for _ in workers:  # a batch of each: it has started
            next(batches)
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)
        assert len(list(batches)) == IMAGES - len(workers)
        for worker in workers:
            worker.terminate()
            worker.join(timeout=60)
        assert [worker.exitcode for worker in workers] == [0, 0]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_the_options_reach_the_loader(dataset: Callable[[], CaptionDataset]) -> None:
    loader = caption_loader(dataset(), 4, workers=2, prefetch=5, drop_last=False)
    assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (2, 5, True)
    assert loader.pin_memory == torch.cuda.is_available() and len(loader) == 4
    alone = caption_loader(dataset(), 4)
    assert (alone.num_workers, alone.persistent_workers, len(alone)) == (0, False, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 1, "workers": -1}, "workers: expected at least 0, got -1"),
        ({"batch_size": 1, "prefetch": 0}, "prefetch: expected at least 1, got 0"),
    ],
)
def test_numbers_outside_their_range_are_refused(
    dataset: Callable[[], CaptionDataset], options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        caption_loader(dataset(), **options)
