"""The training loop: any module whose output has a `loss`, on accelerate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import skip_first_batches
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastsds.training import checkpoint
from fastsds.training.config import TrainConfig, TrainResult
from fastsds.training.interrupt import StopRequest, TrainingInterrupted
from fastsds.training.metrics import MetricsLog, PendingMetrics
from fastsds.training.processes import on_main_process, share_loader, start_accelerator
from fastsds.training.progress import Progress

Evaluate = Callable[[nn.Module], Mapping[str, float]]


class NonFiniteLossError(RuntimeError):
    """Training met a NaN or infinite loss or gradient and stopped; the message names step and last good checkpoint."""


class Trainable(Protocol):
    """What the loop asks of a module beside `forward(**batch)`, whose output has scalar fields and a `loss`."""

    def trained_parameters(self) -> dict[str, nn.Parameter]: ...
    def identity(self) -> dict[str, Any]: ...
    def require_identity(self, recorded: dict[str, Any]) -> None: ...
    def random_streams(self) -> dict[str, Any]: ...


class Trainer:
    """Trains the parameters that a module says are trained.

    Started in several processes (`accelerate launch --multi_gpu`, `torchrun`), it gives the numbers of one: a batch of
    the loader is split over them, losses and gradients are means over all. The main process alone writes; all read the
    run's folder, so that nodes need one disk for it.

    Args:
        module: `forward(**batch)` gives an output (a NamedTuple) whose scalars are logged and whose `loss` is
            differentiated; each a mean over the rows of the batch.
        loader: batches are mappings of `forward`'s argument names. A random sampler is reseeded by epoch, so that a
            resumed run sees the same order. With several processes every batch has a multiple of their number of rows.
        config: of the run.
        evaluate: called with the module in evaluation mode, in every process; its figures are logged.
    """

    def __init__(
        self,
        module: nn.Module,
        loader: DataLoader[Any],
        config: TrainConfig,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.module = module
        self.config = config
        self.evaluate = evaluate
        self.accelerator = start_accelerator(config.mixed_precision, config.accumulation)
        self._loader = share_loader(loader, self.accelerator, config.seed)
        self._trained = self._trainable.trained_parameters()
        if not self._trained:
            raise ValueError("module: expected parameters to train, got none")
        optimizer = torch.optim.AdamW(
            self._trained.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self._model, self._optimizer = self.accelerator.prepare(module, optimizer)
        self.steps_per_epoch = math.ceil(len(self._loader) / config.accumulation)
        self.total_steps = config.steps or config.epochs * self.steps_per_epoch
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: config.lr_factor(step, self.total_steps)
        )
        self._step = 0
        self._saved: Path | None = None
        self._pending = PendingMetrics()
        self._resumed_random: dict[str, Any] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.config.out / "checkpoints"

    @property
    def _trainable(self) -> Trainable:
        return self.module  # type: ignore[return-value]

    def fit(self, *, resume: bool = False) -> TrainResult:
        """Trains to the end and returns where the run stands.

        Args:
            resume: go on from the run's last checkpoint, to the same numbers as if it had not stopped (random
                augmentation in the middle of an epoch aside, which draws anew). Without a checkpoint the run starts
                anew.

        Raises:
            FileExistsError: the run's folder exists and `resume` is not set.
            NonFiniteLossError: a loss or gradient was NaN or infinite; nothing is written after the step before it.
            CheckpointError: a checkpoint could not be written or does not fit.
            TrainingInterrupted: SIGINT or SIGTERM came; the run was saved after the step and can be resumed.
        """
        evaluation: dict[str, float] = {}
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest())  # first: TensorBoard's import alone takes seconds
            self._forget_unfinished_step()
            self._saved = on_main_process(self.accelerator, lambda: self._enter_folder(resume))
            if self._saved is not None:
                self._restore(self._saved)
            log = stack.enter_context(self._open_log()) if self.accelerator.is_main_process else None
            progress = stack.enter_context(self._open_progress())
            while self._step < self.total_steps:
                before = self._step
                for _ in self._epoch(log, progress):
                    last = self._step == self.total_steps
                    due = self.config.evaluate_every
                    if self.evaluate is not None and (last or (due and self._step % due == 0)):
                        self._flush(log, progress)
                        evaluation = self._evaluate()
                        if log is not None:
                            log.write(self._step, "evaluation", evaluation)
                    stopped = not last and stop.agreed()
                    if stopped or self._save_due():
                        self._flush(log, progress)
                        saved = self._saved = self._save()
                    if stopped:
                        raise TrainingInterrupted(self._step, self.total_steps, saved)
                    if last:
                        break
                if self._step == before:
                    raise ValueError("loader: expected to give its batches anew every epoch, got none this time")
            self._flush(log, progress)
        assert self._saved is not None
        return TrainResult(self._step, self._saved, evaluation)

    def _epoch(self, log: MetricsLog | None, progress: Progress) -> Iterable[int]:
        """Runs the rest of the epoch that the current step lies in, yielding after every optimizer step."""
        epoch, done = divmod(self._step, self.steps_per_epoch)
        self._loader.set_epoch(epoch)
        if hasattr(self._loader.dataset, "set_epoch"):  # accelerate tells the data of it in a single process only
            self._loader.dataset.set_epoch(epoch)
        loader = skip_first_batches(self._loader, done * self.config.accumulation) if done else self._loader
        parameters = list(self._trained.values())
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        self._model.train()
        outputs: list[Any] = []
        for batch in loader:
            if self._resumed_random is not None:
                # Not earlier: the loader's iterator draws from the generators, and drew before the checkpoint.
                checkpoint.set_random_state(self._resumed_random)
                self._resumed_random = None
            with self.accelerator.accumulate(self._model):
                output = self._model(**batch)
                self.accelerator.backward(output.loss)
                if self.accelerator.sync_gradients:
                    grad_norm = torch.as_tensor(self.accelerator.clip_grad_norm_(parameters, limit))
                self._optimizer.step()
                self._optimizer.zero_grad()
            outputs.append(type(output)(*(value.detach() for value in output)))
            if not self.accelerator.sync_gradients:
                continue
            lr = float(self._optimizer.param_groups[0]["lr"])
            self._schedule.step()
            self._step += 1
            self._pending.add(self._step, outputs, grad_norm, lr)
            outputs = []
            if self._step % self.config.log_every == 0:
                self._flush(log, progress)
            progress.advance()
            yield self._step

    def _flush(self, log: MetricsLog | None, progress: Progress) -> None:
        """Waits for the device and writes the pending steps down; stops the run at the first that is not finite."""
        taken = self._pending.take(self.accelerator)
        for step, values in taken:
            # A gradient scaler skips the steps whose gradients overflow; without one they ruin the parameters.
            scaled = self.accelerator.scaler is not None
            bad = [name for name in values if not math.isfinite(values[name])]
            losses = [name for name in bad if name != "grad_norm"]
            if losses or (bad and not scaled):
                raise NonFiniteLossError(
                    f"the loss is {values['loss']} at step {step} (not finite: {', '.join(losses or bad)}); training "
                    f"stopped. The last good checkpoint is {self._saved or 'none'}; resume from it with a lower "
                    f"learning rate, or in bf16 or float32 in place of fp16"
                )
            if log is not None:
                log.write(step, "train", values)
        if taken:
            progress.tell(taken[-1][0], taken[-1][1]["loss"])
        if log is not None:
            log.flush()

    def _evaluate(self) -> dict[str, float]:
        assert self.evaluate is not None
        self.module.eval()
        with torch.no_grad():
            figures = dict(self.evaluate(self.module))
        self._model.train()
        return figures

    def _forget_unfinished_step(self) -> None:
        """What an earlier `fit` of this trainer, that an error ended, left behind."""
        self._pending = PendingMetrics()
        self._optimizer.optimizer.zero_grad()
        self.accelerator.step = 0

    def _enter_folder(self, resume: bool) -> Path | None:
        """Makes the run's folder and gives the checkpoint to start from."""
        out = self.config.out
        if not resume and out.exists() and any(out.iterdir()):
            raise FileExistsError(f"out: {out} exists and is not empty; resume the run in it, or name another folder")
        out.mkdir(parents=True, exist_ok=True)
        return checkpoint.latest_checkpoint(self.checkpoints) if resume else None

    def _open_log(self) -> MetricsLog:
        return MetricsLog(self.config.out, self._step, tensorboard=self.config.tensorboard)

    def _open_progress(self) -> Progress:
        shown = self.config.progress and self.accelerator.is_main_process
        return Progress(self.config.out.name, self._step, self.total_steps, shown=shown)

    def _save_due(self) -> bool:
        every = self.config.save_every or self.steps_per_epoch
        return self._step % every == 0 or self._step == self.total_steps

    def _save(self) -> Path:
        state = {
            "step": self._step,
            "total_steps": self.total_steps,
            "model": self._trainable.identity(),
            "config": {name: _plain(value) for name, value in dataclasses.asdict(self.config).items()},
            "random": gather_object([checkpoint.random_state()]),
            "random_streams": {
                name: _to_json(stream.state_dict()) for name, stream in self._trainable.random_streams().items()
            },
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
        }

        def write() -> Path:
            folder = checkpoint.checkpoint_folder(self.checkpoints, self._step)
            checkpoint.save_checkpoint(folder, dict(self._trained), self._optimizer.optimizer, state)
            checkpoint.drop_old(self.checkpoints, self.config.keep_checkpoints)
            return folder

        return on_main_process(self.accelerator, write)

    def _restore(self, folder: Path) -> None:
        state = checkpoint.load_state(folder)
        self._trainable.require_identity(state["model"])
        if state["total_steps"] != self.total_steps:
            raise checkpoint.CheckpointError(
                f"{folder}: it belongs to a run of {state['total_steps']} steps and this one has {self.total_steps}; "
                f"the learning rate would not continue. Resume with the data and options of that run"
            )
        streams = self._trainable.random_streams()
        if streams.keys() != state["random_streams"].keys():
            had = ", ".join(state["random_streams"]) or "none"
            raise checkpoint.CheckpointError(
                f"{folder}: expected random streams {', '.join(streams) or 'none'}, got {had}; resume with the options "
                f"of that run"
            )
        checkpoint.load_tensors(folder, dict(self._trained))
        checkpoint.load_optimizer(folder, self._optimizer.optimizer, state)
        self._step = state["step"]
        self._schedule.last_epoch = self._step
        # Of this run's configuration, which may ask for a lower rate than the checkpoint's.
        for group, rate in zip(self._optimizer.param_groups, self._schedule.base_lrs, strict=True):
            group["lr"] = rate * self.config.lr_factor(self._step, self.total_steps)
        # A process that the saved run did not have starts its own.
        for random in state["random"][self.accelerator.process_index :][:1]:
            if self._step % self.steps_per_epoch:
                self._resumed_random = random
            else:
                checkpoint.set_random_state(random)
        for name, stream in streams.items():
            stream.load_state_dict(_from_json(state["random_streams"][name]))
        if state["scaler"] and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def _to_json(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: tensor.tolist() for name, tensor in state.items()}


def _from_json(state: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.tensor(values, dtype=torch.uint8) for name, values in state.items()}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
