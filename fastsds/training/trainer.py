"""The training loop: any module whose output has a `loss`, on accelerate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from fastsds.training import checkpoint
from fastsds.training.metrics import MetricsLog

Evaluate = Callable[[nn.Module], Mapping[str, float]]


class NonFiniteLossError(RuntimeError):
    """Training met a NaN or infinite loss or gradient and stopped; the message names step and last good checkpoint."""


class Trainable(Protocol):
    """What the loop asks of a module beside `forward(**batch)`, whose output has scalar fields and a `loss`."""

    def trained_parameters(self) -> dict[str, nn.Parameter]: ...
    def identity(self) -> dict[str, Any]: ...
    def require_identity(self, recorded: dict[str, Any]) -> None: ...
    def random_streams(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class TrainConfig:
    """Options of a run."""

    out: Path = Path("runs/fastsds")
    """Folder of the run: checkpoints, metrics.jsonl, tensorboard. It must not exist, unless the run is resumed."""
    lr: float = 5e-5
    """Peak learning rate."""
    epochs: int = 5
    steps: int | None = None
    """Optimizer steps in all, in place of `epochs`."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    decay_share: float = 1.0
    """Share of the run, at its end, over which a cosine takes the learning rate to zero; the peak is held before."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    """Of AdamW; these are the ones that CLIP's own training uses."""
    max_grad_norm: float | None = 1.0
    """Norm that gradients are clipped to; None leaves them."""
    accumulation: int = 1
    """Batches per optimizer step. The contrastive loss sees one batch at a time."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    save_every: int | None = None
    """Steps between checkpoints; at the end of every epoch by default, and always at the end."""
    keep_checkpoints: int = 3
    evaluate_every: int | None = None
    """Steps between evaluations; only at the end by default."""
    log_every: int = 10
    """Steps between writes of the metrics, which is when the device is waited for."""
    tensorboard: bool = True
    progress: bool = True
    seed: int = 0
    """Of the order of the data; the loss's noise has its own."""

    def __post_init__(self) -> None:
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"decay_share: expected a share in (0, 1], got {self.decay_share!r}")
        positive = ("lr", "epochs", "accumulation", "keep_checkpoints", "log_every")
        optional = ("steps", "save_every", "evaluate_every", "max_grad_norm")
        for name in (*positive, *(name for name in optional if getattr(self, name) is not None)):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    checkpoint: Path
    """The last one."""
    evaluation: dict[str, float]
    """The last evaluation; empty without one."""


class Trainer:
    """Trains the parameters that a module says are trained.

    Args:
        module: `forward(**batch)` gives an output (a NamedTuple) whose scalars are logged and whose `loss` is
            differentiated.
        loader: batches are mappings of `forward`'s argument names. A random sampler is reseeded by epoch, so that a
            resumed run sees the same order.
        config: of the run.
        evaluate: called with the module in evaluation mode; its figures are logged.
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
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.accumulation,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
            step_scheduler_with_optimizer=False,
        )
        if not isinstance(loader, DataLoader):
            raise TypeError(f"loader: expected a torch.utils.data.DataLoader, got {type(loader).__name__}")
        trained = self._trainable.trained_parameters()
        if not trained:
            raise ValueError("module: expected parameters to train, got none")
        optimizer = torch.optim.AdamW(
            trained.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self._model, self._optimizer, self._loader = self.accelerator.prepare(module, optimizer, loader)
        batches = len(self._loader)
        if batches == 0:
            raise ValueError("loader: expected at least one batch, got none (is the data smaller than one batch?)")
        self.steps_per_epoch = math.ceil(batches / config.accumulation)
        self.total_steps = config.steps or config.epochs * self.steps_per_epoch
        self._schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        self._step = 0
        self._pending: list[tuple[int, dict[str, Tensor], float]] = []
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
            resume: go on from the run's last checkpoint, to the same numbers as if it had not stopped. Without a
                checkpoint the run starts anew.

        Raises:
            FileExistsError: the run's folder exists and `resume` is not set.
            NonFiniteLossError: a loss or gradient was NaN or infinite; nothing is written after the step before it.
            CheckpointError: a checkpoint could not be written or does not fit.
        """
        last = checkpoint.latest_checkpoint(self.checkpoints) if resume else None
        if (
            not resume
            and self.accelerator.is_main_process
            and self.config.out.exists()
            and any(self.config.out.iterdir())
        ):
            raise FileExistsError(
                f"out: {self.config.out} exists and is not empty; resume the run in it, or name another folder"
            )
        self.accelerator.wait_for_everyone()
        self.config.out.mkdir(parents=True, exist_ok=True)
        if last is not None:
            self._restore(last)
        evaluation: dict[str, float] = {}
        with (
            MetricsLog(self._process_folder(), self._step, tensorboard=self.config.tensorboard) as log,
            tqdm(
                total=self.total_steps, initial=self._step, unit="step", desc=self.config.out.name,
                disable=not (self.config.progress and self.accelerator.is_main_process),
            ) as bar,
        ):  # fmt: skip
            while self._step < self.total_steps:
                before = self._step
                for _ in self._epoch(log, bar):
                    due = self.config.evaluate_every
                    if self.evaluate is not None and (
                        (due and self._step % due == 0) or self._step == self.total_steps
                    ):
                        self._flush(log, bar)
                        evaluation = self._evaluate()
                        log.write(self._step, "evaluation", evaluation)
                    if self._save_due():
                        self._flush(log, bar)
                        self._save()
                    if self._step >= self.total_steps:
                        break
                if self._step == before:
                    raise ValueError("loader: expected to give its batches anew every epoch, got none this time")
            self._flush(log, bar)
        final = checkpoint.latest_checkpoint(self.checkpoints)
        assert final is not None
        return TrainResult(self._step, final, evaluation)

    def _epoch(self, log: MetricsLog, bar: Any) -> Iterable[int]:
        """Runs the rest of the epoch that the current step lies in, yielding after every optimizer step."""
        epoch, done = divmod(self._step, self.steps_per_epoch)
        if hasattr(self._loader, "set_epoch"):
            self._loader.set_epoch(epoch)
        loader = skip_first_batches(self._loader, done * self.config.accumulation) if done else self._loader
        self._model.train()
        parts: list[dict[str, Tensor]] = []
        for batch in loader:
            if self._resumed_random is not None:
                # Not earlier: the loader's iterator draws from the generators, and drew before the checkpoint.
                checkpoint.set_random_state(self._resumed_random)
                self._resumed_random = None
            with self.accelerator.accumulate(self._model):
                output = self._model(**batch)
                self.accelerator.backward(output.loss)
                grad_norm: Any = 0.0
                if self.accelerator.sync_gradients:
                    limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
                    grad_norm = self.accelerator.clip_grad_norm_(
                        list(self._trainable.trained_parameters().values()), limit
                    )
                self._optimizer.step()
                self._optimizer.zero_grad()
            parts.append({name: value.detach() for name, value in output._asdict().items()})
            if not self.accelerator.sync_gradients:
                continue
            lr = float(self._optimizer.param_groups[0]["lr"])
            self._schedule.step()
            self._step += 1
            values = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
            values["grad_norm"] = torch.as_tensor(grad_norm)
            self._pending.append((self._step, values, lr))
            parts = []
            if self._step % self.config.log_every == 0:
                self._flush(log, bar)
            bar.update()
            yield self._step
            self._model.train()

    def _flush(self, log: MetricsLog, bar: Any) -> None:
        """Waits for the device and writes the pending steps down; stops the run at the first that is not finite."""
        pending, self._pending = self._pending, []
        for step, values, lr in pending:
            numbers = {name: float(value) for name, value in values.items()}
            # A gradient scaler skips the steps whose gradients overflow; without one they ruin the parameters.
            scaled = self.accelerator.scaler is not None
            bad = [name for name in numbers if not math.isfinite(numbers[name])]
            losses = [name for name in bad if name != "grad_norm"]
            if losses or (bad and not scaled):
                good = checkpoint.latest_checkpoint(self.checkpoints)
                raise NonFiniteLossError(
                    f"the loss is {numbers['loss']} at step {step} (not finite: {', '.join(losses or bad)}); training "
                    f"stopped. The last good checkpoint is {good or 'none'}; resume from it with a lower learning "
                    f"rate, or in bf16 or float32 in place of fp16"
                )
            log.write(step, "train", {**numbers, "lr": lr})
        if pending:
            bar.set_postfix(loss=f"{float(pending[-1][1]['loss']):.4f}")
        log.flush()

    def _lr_factor(self, step: int) -> float:
        warmup = self.config.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        start = max(warmup, round(self.total_steps * (1 - self.config.decay_share)))
        progress = (step - start) / max(self.total_steps - start, 1)
        return 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))

    def _evaluate(self) -> dict[str, float]:
        assert self.evaluate is not None
        self.module.eval()
        with torch.no_grad():
            return dict(self.evaluate(self.module))

    def _save_due(self) -> bool:
        every = self.config.save_every or self.steps_per_epoch
        return self._step % every == 0 or self._step == self.total_steps

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        streams = {name: _to_json(stream.state_dict()) for name, stream in self._trainable.random_streams().items()}
        state = {
            "step": self._step,
            "total_steps": self.total_steps,
            "model": self._trainable.identity(),
            "config": {name: _plain(value) for name, value in dataclasses.asdict(self.config).items()},
            "random": checkpoint.random_state(),
            "random_streams": streams,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
        }
        folder = checkpoint.checkpoint_folder(self.checkpoints, self._step)
        checkpoint.save_checkpoint(folder, dict(self._trainable.trained_parameters()), self._optimizer.optimizer, state)
        checkpoint.drop_old(self.checkpoints, self.config.keep_checkpoints)

    def _restore(self, folder: Path) -> None:
        state = checkpoint.load_state(folder)
        self._trainable.require_identity(state["model"])
        if state["total_steps"] != self.total_steps:
            raise checkpoint.CheckpointError(
                f"{folder}: it belongs to a run of {state['total_steps']} steps and this one has {self.total_steps}; "
                f"the learning rate would not continue. Resume with the data and options of that run"
            )
        checkpoint.load_tensors(folder, dict(self._trainable.trained_parameters()))
        checkpoint.load_optimizer(folder, self._optimizer.optimizer, state)
        self._step = state["step"]
        self._schedule.last_epoch = self._step
        # Of this run's configuration, which may ask for a lower rate than the checkpoint's.
        for group, rate in zip(self._optimizer.param_groups, self._schedule.base_lrs, strict=True):
            group["lr"] = rate * self._lr_factor(self._step)
        if self._step % self.steps_per_epoch:
            self._resumed_random = state["random"]
        else:
            checkpoint.set_random_state(state["random"])
        for name, stream in self._trainable.random_streams().items():
            stream.load_state_dict(_from_json(state["random_streams"][name]))
        if state["scaler"] and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _process_folder(self) -> Path:
        """Only the main process writes into the run's folder itself."""
        if self.accelerator.is_main_process:
            return self.config.out
        folder = self.config.out / f"process-{self.accelerator.process_index}"
        folder.mkdir(exist_ok=True)
        return folder


def _to_json(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: tensor.tolist() for name, tensor in state.items()}


def _from_json(state: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.tensor(values, dtype=torch.uint8) for name, values in state.items()}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
