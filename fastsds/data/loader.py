"""Batches of image-caption data, prepared by workers."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler

from fastsds.data.captions import CaptionDataset, collate_captions
from fastsds.data.workers import worker_options


def caption_loader(
    dataset: CaptionDataset,
    batch_size: int,
    workers: int = 0,
    *,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = True,
    prefetch: int = 2,
) -> DataLoader[dict[str, Any]]:
    """Batches that `SDSDistiller.forward` takes.

    A `Trainer` shuffles by its own seed and epoch, whatever the number of workers, and goes on in the middle of an
    epoch; memory is pinned where there is a GPU.

    Args:
        batch_size: of a step; a `Trainer` splits it over its processes.
        workers: processes that read, decode and tokenize; 0 does it in this one. They live as long as the loader.
        seed: of the order, where no `Trainer` decides it.
        drop_last: leave out the last batch of an epoch where it is smaller: the contrastive loss depends on the size.
        prefetch: batches that each worker prepares ahead.

    Raises:
        ValueError: a number outside its range.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("prefetch", prefetch, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    # Of its own, for how often a loader draws from its generator depends on the workers.
    order = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed)) if shuffle else None
    return DataLoader(
        dataset,
        batch_size,
        sampler=order,
        drop_last=drop_last,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate_captions,
        generator=torch.Generator().manual_seed(seed),
        **worker_options(workers),
    )
