"""One run in several processes: as `accelerate launch` or `torchrun` start them, with the numbers of one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, IterableDataset, Sampler

from fastsds.data.workers import leave_signals, worker_context

Result = TypeVar("Result")


def start_accelerator(mixed_precision: str = "no", accumulation: int = 1) -> Accelerator:
    """The accelerator of this process; the first one joins it to the others of its launch.

    Without a GPU the processes join over gloo, which accelerate does only when it is told to use the CPU.

    Raises:
        RuntimeError: the launcher started several processes and something else kept this one from joining them.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=accumulation,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        step_scheduler_with_optimizer=False,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"processes: the launcher started {launched} and this one joined {accelerator.num_processes}; make no "
            f"Accelerator or PartialState before the trainer, or make it with cpu=True where there is no GPU"
        )
    return accelerator


def share_loader(loader: DataLoader[Any], accelerator: Accelerator, seed: int) -> Any:
    """The loader of this process's part of every batch, on its device; a batch has as many rows as `loader` says.

    A random sampler is reseeded by epoch from `seed`. Batches are pinned for a GPU and move to it without waiting.

    Raises:
        TypeError: a loader that is none, or one whose batches cannot be split.
        ValueError: no batches, or one that does not split evenly over the processes.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"loader: expected a torch.utils.data.DataLoader, got {type(loader).__name__}")
    if len(loader) == 0:
        raise ValueError("loader: expected at least one batch, got none (is the data smaller than one batch?)")
    processes = accelerator.num_processes
    batches: Any = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    if loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset):
        batches = {"batch_sampler": ProcessShare(loader.batch_sampler, accelerator.process_index, processes)}
        _check_split(loader, processes)
    elif processes > 1:
        raise TypeError("loader: expected rows by position and a batch size under several processes, got a stream")
    method = loader.multiprocessing_context and loader.multiprocessing_context.get_start_method()
    shared = DataLoader(
        loader.dataset,
        **batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory or accelerator.device.type == "cuda",
        timeout=loader.timeout,
        worker_init_fn=partial(_start_worker, then=loader.worker_init_fn),
        multiprocessing_context=worker_context(method) if loader.num_workers else None,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
    # For one process, because the batches are split already, and more evenly than accelerate would.
    return prepare_data_loader(
        shared, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False,
        use_seedable_sampler=True, data_seed=seed, non_blocking=True,
    )  # fmt: skip


def on_main_process(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Runs `action` in the main process alone; all wait for it and have its result, or raise what it raised."""
    if accelerator.num_processes == 1:
        return action()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    result, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


def leave_launch() -> None:
    """Ends this process's part in a launch that went well: left to Python's exit, gloo's threads may abort it there."""
    if dist.is_initialized():
        dist.destroy_process_group()


class ProcessShare(Sampler[list[int]]):
    """One process's part of every batch: equal parts, consecutive, in the order of the processes."""

    def __init__(self, batches: Any, process: int, processes: int) -> None:
        self.batches, self.process, self.processes = batches, process, processes
        self.batch_size, self.drop_last = getattr(batches, "batch_size", None), getattr(batches, "drop_last", False)

    @property
    def sampler(self) -> Any:
        """Of rows: accelerate reads it here, and puts one here that it can reseed."""
        return self.batches.sampler

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        self.batches.sampler = sampler

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            part = len(batch) // self.processes
            yield batch[self.process * part : (self.process + 1) * part]

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)


def _check_split(loader: DataLoader[Any], processes: int) -> None:
    size = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size
    if processes == 1:
        return
    if size is None or size % processes:
        raise ValueError(f"batch_size: expected a multiple of {processes}, the number of processes, got {size}")
    left = len(loader.sampler) % size  # type: ignore[arg-type]
    if left % processes and not getattr(loader.batch_sampler, "drop_last", False):
        raise ValueError(
            f"loader: the last batch of an epoch has {left} rows, which do not split over {processes} processes; "
            f"make the loader with drop_last=True, or take another batch size"
        )


def _start_worker(index: int, then: Callable[[int], None] | None) -> None:
    leave_signals(index)
    if then is not None:
        then(index)
