"""The variance of the loss that a call returns, by strategy, at equal U-Net calls, with the toy world's teacher."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch

from fastsds import SDSLoss, toyworld
from fastsds.ops.sample_timesteps import Strategy
from fastsds.toyworld.tasks import training_scenes

WEIGHTING = "uniform"  # the paper's
NEEDED = {"stratified": 0.5}
"""The most of the uniform draws' variance that a strategy may have."""
WARM_UP_CALLS = 60  # after which importance sampling has seen every bin


@pytest.mark.bar
@pytest.mark.parametrize(("batch", "draws"), [(32, 1), (8, 4)])
@torch.no_grad()
def test_variance(batch: int, draws: int, request: pytest.FixtureRequest, benchmark: Any) -> None:
    """Repeated calls for fixed latents and captions, over the whole schedule; all strategies estimate one number."""
    tiny = request.config.getoption("--extent") == "tiny"
    batch = 2 if tiny else batch
    repetitions = 4 if tiny else 200
    scenes = training_scenes(batch)
    teacher = toyworld.load_teacher()
    latents = teacher.encode_images(scenes.images)

    def calls(strategy: Strategy) -> np.ndarray:
        loss = SDSLoss(teacher, draws, strategy, WEIGHTING)
        if loss.sampler is not None:
            for _ in range(1 if tiny else WARM_UP_CALLS):
                loss(latents, scenes.captions)
        return np.array([loss(latents, scenes.captions).item() for _ in range(repetitions)])

    losses = benchmark.pedantic(lambda: {strategy: calls(strategy) for strategy in get_args(Strategy)}, rounds=1)
    uniform = losses["uniform"]
    for strategy, values in losses.items():
        error = np.sqrt((values.var(ddof=1) + uniform.var(ddof=1)) / repetitions)
        assert abs(values.mean() - uniform.mean()) <= 5 * error, f"{strategy} is biased"
    benchmark.extra_info["variance"] = {
        "batch": batch,
        "draws": draws,
        "weighting": WEIGHTING,
        "repetitions": repetitions,
        "strategies": {strategy: _against(values, uniform, strategy) for strategy, values in losses.items()},
    }


def _against(values: np.ndarray, uniform: np.ndarray, strategy: str) -> dict[str, Any]:
    """Mean, variance and its ratio to that of `uniform`, with a 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    resampled = [rng.choice(each, (2000, len(each))).var(axis=1, ddof=1) for each in (values, uniform)]
    ratios = resampled[0] / np.maximum(resampled[1], np.finfo(float).tiny)
    ratio = values.var(ddof=1) / uniform.var(ddof=1)
    bar = {"needed": NEEDED[strategy], "met": bool(ratio <= NEEDED[strategy])} if strategy in NEEDED else {}
    low, high = np.quantile(ratios, (0.025, 0.975)).tolist()
    return {"mean": values.mean(), "variance": values.var(ddof=1), "ratio": ratio, "low": low, "high": high, **bar}
