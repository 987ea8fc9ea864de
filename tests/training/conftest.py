"""A least-squares module that the loop can train in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastsds.clip import ModelMismatchError
from fastsds.training import TrainConfig

ROWS = 12


class ToyOutput(NamedTuple):
    loss: Tensor
    half: Tensor


class Toy(nn.Module):
    """What the loop asks of a module, and a record of what it was given."""

    def __init__(
        self,
        *,
        kind: str = "toy",
        dropout: float = 0.0,
        bad: tuple[int, str] | None = None,
        on_forward: Callable[[int], None] = lambda call: None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[0.3, -0.2, 0.1]]))
            self.linear.bias.zero_()
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.kind = kind
        self.dropout = nn.Dropout(dropout)
        self.bad = bad
        self.on_forward = on_forward
        self.seen: list[list[int]] = []
        self.modes: list[bool] = []
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: Tensor, y: Tensor, index: Tensor) -> ToyOutput:
        self.seen.append(index.tolist())
        self.modes.append(self.training)
        self.on_forward(len(self.seen))
        prediction = self.linear(self.dropout(x))[:, 0]
        self.dtypes.append(prediction.dtype)
        loss = (prediction - y).square().mean()
        half = loss / 2
        if self.bad is not None and len(self.seen) == self.bad[0]:
            part = self.bad[1]
            if part == "gradient":
                loss = loss + 0 * (self.linear.weight.sum() * 0).sqrt()  # 0, and 0 / 0 its gradient
            else:
                loss, half = (
                    value * (torch.nan if name == part else 1) for name, value in (("loss", loss), ("half", half))
                )
        return ToyOutput(loss, half)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def require_identity(self, recorded: dict[str, Any]) -> None:
        if recorded != self.identity():
            raise ModelMismatchError(f"checkpoint: kind was {recorded['kind']}")

    def random_streams(self) -> dict[str, Any]:
        return {}


class _Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(rows, 3, generator=generator)
        self.y = self.x.sum(dim=1) * 5

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index], "index": torch.tensor(index)}


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its options for the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def loader() -> Callable[..., DataLoader]:
    """Six batches of two rows, in random order, by default."""

    def make(rows: int = ROWS, batch_size: int = 2, **options: Any) -> DataLoader:
        return DataLoader(_Rows(rows), batch_size=batch_size, **{"shuffle": True, **options})

    return make


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Quiet options of a run in `tmp_path / "run"`."""

    def make(**options: Any) -> TrainConfig:
        return TrainConfig(**{"out": tmp_path / "run", "lr": 0.05, "tensorboard": False, "progress": False, **options})

    return make
