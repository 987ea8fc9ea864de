"""`sample_timesteps`: a draw of every strategy, with what is gathered at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from benchmarks import baselines
from benchmarks.cases import TIMESTEPS, check_timesteps, make_schedule
from fastsds import ops
from fastsds.ops.sample_timesteps import Strategy

BATCH, DRAWS = 256, 4


@pytest.mark.bar
@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_sample_timesteps(strategy: Strategy, device: torch.device, compare: Callable[..., dict[str, Any]]) -> None:
    """1024 draws. The chain that a bar names is the strategy's own."""
    schedule, seed = make_schedule(device), torch.tensor(5, device=device)
    alphas_cumprod = schedule.alpha.square()
    probabilities = torch.softmax(torch.linspace(2, -2, TIMESTEPS, device=device), 0)
    cdf = probabilities.double().cumsum(0) if strategy == "importance" else None

    def ours() -> ops.TimestepDraw:
        return ops.sample_timesteps(schedule, BATCH, DRAWS, seed, strategy=strategy, weighting="sds", cdf=cdf)

    check_timesteps(
        ours(),
        (schedule.alpha, schedule.sigma, schedule.weights("sds"), BATCH, DRAWS, seed, strategy, 0, TIMESTEPS, cdf),
    )
    compiled = torch.compile(baselines.draw_timesteps)
    arguments = (alphas_cumprod, BATCH, DRAWS, strategy, probabilities)
    compare(
        {
            "eager": lambda: baselines.draw_timesteps(*arguments),
            "torch.compile": lambda: compiled(*arguments),
            "fastsds": ours,
        },
        suite=f"sample_timesteps, {strategy}",
        case=f"{BATCH}x{DRAWS}",
        dtype="float32",
        bars={"eager": 5.0} if device.type == "cpu" else {},
    )
