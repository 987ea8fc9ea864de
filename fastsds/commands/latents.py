"""What a distillation wants of the teacher's VAE before it starts: the projector's fit, latents for ranking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from fastsds.data.captions import CaptionDataset
from fastsds.data.workers import read_batches, worker_options
from fastsds.diffusion.teacher import DiffusionTeacher
from fastsds.sdsclip.distiller import SDSDistiller

_BATCH = 32  # images that the VAE encodes at once


def fit_projector(
    distiller: SDSDistiller, dataset: CaptionDataset, images: int, ridge: float, *, workers: int, progress: bool = True
) -> float:
    """Starts the projector as the ridge regression on the first `images` images of `dataset`.

    Every process computes the same.

    Returns:
        The share of the latents' variance explained.
    """
    teacher, clip = distiller.teacher, distiller.clip
    assert teacher is not None
    device = next(clip.parameters()).device
    clip.eval()
    batches = _views_and_latents(teacher, dataset, images, workers, "projector" if progress else None)
    return distiller.fit_projector(((views.to(device), latents) for views, latents in batches), ridge)


def with_latents(
    teacher: DiffusionTeacher, dataset: CaptionDataset, *, workers: int, progress: bool = True
) -> CaptionDataset:
    """The same data, where images that have candidates come with their VAE latents."""
    batches = _views_and_latents(teacher, dataset, len(dataset), workers, "latents" if progress else None)
    latents: Float[Tensor, "images channels height width"] = torch.cat([latents.cpu() for _, latents in batches])
    return CaptionDataset(
        dataset.images, dataset.captions, dataset.preprocess, dataset.tokenizer,
        candidates=dataset.candidates, extra={"latents": latents}, bad_images=dataset.bad_images,
    )  # fmt: skip


def _views_and_latents(
    teacher: DiffusionTeacher, dataset: CaptionDataset, images: int, workers: int, bar: str | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images preprocessed for CLIP and the VAE latents of the same, in the order of the data.

    Args:
        bar: title of the progress bar on a terminal, or None for none.
    """
    views = _Views(dataset, teacher.image_size)
    subset = Subset(views, range(min(images, len(dataset))))
    loader = DataLoader(subset, _BATCH, **worker_options(workers))
    shown = tqdm(read_batches(loader), bar, len(loader), unit="batch", disable=None if bar else True)
    for preprocessed, pictures, keys in shown:
        yield preprocessed, teacher.encode_images_cached(keys, pictures)


class _Views(Dataset[tuple[Tensor, Tensor, str]]):
    """An image as CLIP sees it, the same in [0, 1] cut to the teacher's size, and the key of its content."""

    def __init__(self, dataset: CaptionDataset, image_size: tuple[int, int]) -> None:
        self.keys = dataset
        self.pairs = CaptionDataset(
            dataset.images, dataset.captions, _Both(dataset.preprocess, image_size), dataset.tokenizer,
            bad_images=dataset.bad_images,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        preprocessed, picture = self.pairs[index]["images"]
        return preprocessed, picture, self.keys.content_key(index)


class _Both:
    def __init__(self, preprocess: Callable[[Any], Tensor], image_size: tuple[int, int]) -> None:
        self.preprocess = preprocess
        self.size = image_size[::-1]

    def __call__(self, image: Image.Image) -> Any:
        cut = ImageOps.fit(image, self.size, Image.Resampling.BICUBIC)
        # As torchvision's to_tensor, whose import alone takes over a second.
        return self.preprocess(image), torch.from_numpy(np.array(cut)).permute(2, 0, 1) / 255
