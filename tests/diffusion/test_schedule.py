"""`NoiseSchedule` against what the diffusers schedulers themselves do to a sample."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fastsds.diffusion import NoiseSchedule

DISCRETE = ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler"]
BETAS: list[dict[str, Any]] = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.01, 0.02, 0.05, 0.1, 0.3, 0.5]},
]


def _discrete(name: str, **options: Any) -> Any:
    return getattr(diffusers, name)(**options)


def _every_timestep(schedule: NoiseSchedule) -> tuple[Tensor, Tensor, Tensor]:
    """Sample, noise and timestep for every timestep."""
    generator = torch.Generator().manual_seed(0)
    sample, noise = torch.randn(2, len(schedule), 3, generator=generator)
    return sample, noise, torch.arange(len(schedule))


def _noised(schedule: NoiseSchedule, sample: Tensor, noise: Tensor) -> Tensor:
    return schedule.alpha[:, None] * sample + schedule.sigma[:, None] * noise


def _velocity(schedule: NoiseSchedule, sample: Tensor, noise: Tensor) -> Tensor:
    return schedule.alpha[:, None] * noise - schedule.sigma[:, None] * sample


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("betas", BETAS, ids=lambda betas: betas.get("beta_schedule", "trained_betas"))
def test_noises_as_the_scheduler_does(name: str, betas: dict[str, Any]) -> None:
    if "trained_betas" in betas:
        betas = {**betas, "num_train_timesteps": 6}
    scheduler = _discrete(name, **betas)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    assert len(schedule) == scheduler.config.num_train_timesteps
    assert schedule.prediction_type == "epsilon"
    assert torch.equal(schedule.model_timesteps, torch.arange(len(schedule)))
    sample, noise, t = _every_timestep(schedule)
    torch.testing.assert_close(
        _noised(schedule, sample, noise), scheduler.add_noise(sample, noise, t), rtol=1e-4, atol=1e-5
    )
    assert (schedule.sigma.diff() > 0).all()


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_velocity_is_the_schedulers(name: str, zero_snr: bool) -> None:
    scheduler = _discrete(name, prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    assert schedule.prediction_type == "v_prediction"
    sample, noise, t = _every_timestep(schedule)
    torch.testing.assert_close(
        _velocity(schedule, sample, noise), scheduler.get_velocity(sample, noise, t), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        _noised(schedule, sample, noise), scheduler.add_noise(sample, noise, t), rtol=1e-4, atol=1e-5
    )
    assert (schedule.alpha[-1] == 0) == zero_snr
    assert all(torch.isfinite(schedule.weights(name)).all() for name in ("uniform", "sds", "min_snr", "fantasia3d"))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_variance_is_preserved(prediction_type: str) -> None:
    schedule = NoiseSchedule.from_scheduler(_discrete("DDIMScheduler", prediction_type=prediction_type))
    assert schedule.prediction_type == prediction_type
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(1000), rtol=1e-6, atol=0)


def test_small_sigmas_keep_their_precision() -> None:
    """1 - alpha_bar in float32 loses digits where alpha_bar is almost one; the square root is taken in float64."""
    schedule = NoiseSchedule.from_scheduler(_discrete("DDPMScheduler", beta_start=1e-4, beta_end=2e-2))
    assert abs(schedule.sigma[0].item() - 1e-2) < 1e-5


@pytest.mark.parametrize("options", [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}])
@pytest.mark.parametrize("steps", [None, 13])
def test_euler_as_the_network_sees_it(options: dict[str, Any], steps: int | None) -> None:
    """Euler's sample has the variance 1 + sigma²; `scale_model_input` is what the network's input goes through."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    untouched = diffusers.EulerDiscreteScheduler(**betas)
    scheduler = diffusers.EulerDiscreteScheduler(**betas, **options)
    if steps is not None:
        scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    assert len(schedule) == 1000
    for t in (0, 1, 250, 999):
        sample, noise = torch.randn(2, 1, 3)
        fresh = diffusers.EulerDiscreteScheduler.from_config(untouched.config)
        fresh.set_timesteps(1000)
        timestep = fresh.timesteps[999 - t]
        assert timestep == schedule.model_timesteps[t]
        noised = fresh.scale_model_input(fresh.add_noise(sample, noise, timestep[None]), timestep)
        actual = schedule.alpha[t] * sample + schedule.sigma[t] * noise
        torch.testing.assert_close(actual, noised, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*DISCRETE, "EulerDiscreteScheduler"])
def test_inference_steps_change_nothing_and_are_not_changed(name: str) -> None:
    scheduler = _discrete(name)
    before = NoiseSchedule.from_scheduler(scheduler)
    scheduler.set_timesteps(7)
    timesteps = scheduler.timesteps.clone()
    after = NoiseSchedule.from_scheduler(scheduler)
    for table in ("alpha", "sigma", "model_timesteps"):
        assert torch.equal(getattr(before, table), getattr(after, table))
    assert torch.equal(scheduler.timesteps, timesteps)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [None, 7])
def test_flow_matching(shift: float, steps: int | None) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    fresh = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    if steps is not None:
        scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    assert schedule.prediction_type == "flow"
    assert len(schedule) == 1000
    torch.testing.assert_close(schedule.alpha + schedule.sigma, torch.ones(1000), rtol=1e-6, atol=0)
    assert (schedule.sigma.diff() > 0).all()
    fraction = torch.arange(1, 1001).double() / 1000
    sigma = shift * fraction / (1 + (shift - 1) * fraction)
    torch.testing.assert_close(schedule.sigma.double(), sigma, rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule.model_timesteps.double(), 1000 * sigma, rtol=1e-5, atol=0)
    sample, noise, _ = _every_timestep(schedule)
    expected = fresh.scale_noise(sample, fresh.timesteps.flip(0), noise)
    torch.testing.assert_close(_noised(schedule, sample, noise), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
def test_weights_by_name(prediction_type: str) -> None:
    if prediction_type == "flow":
        schedule = NoiseSchedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    else:
        schedule = NoiseSchedule.from_scheduler(_discrete("DDPMScheduler"))
    signal, noise = schedule.alpha.double() ** 2, schedule.sigma.double() ** 2
    alpha_bar = signal / (signal + noise)
    snr = signal / noise
    expected = {
        "uniform": torch.ones(1000).double(),
        "sds": 1 - alpha_bar,
        "min_snr": torch.minimum(snr, torch.tensor(5.0)) / snr,
        "fantasia3d": alpha_bar.sqrt() * (1 - alpha_bar),
    }
    if prediction_type == "flow":
        assert snr[-1] == 0
        expected["min_snr"][-1] = 1  # the limit
    for name, weights in expected.items():
        actual = schedule.weights(name)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), weights, rtol=1e-4, atol=1e-6)
        assert torch.equal(schedule.weights(name), actual)


def test_weights_given_as_a_tensor() -> None:
    schedule = NoiseSchedule.from_scheduler(_discrete("DDPMScheduler"))
    weights = torch.rand(1000, dtype=torch.float64)
    assert torch.equal(schedule.weights(weights), weights.float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_to_moves_every_table() -> None:
    schedule = NoiseSchedule.from_scheduler(_discrete("DDPMScheduler", prediction_type="v_prediction"))
    schedule.weights("sds")
    moved = schedule.to("cuda")
    tables = (moved.alpha, moved.sigma, moved.model_timesteps, moved.weights("sds"))
    assert {table.device.type for table in tables} == {"cuda"}
    assert moved.prediction_type == "v_prediction"
    assert schedule.alpha.device.type == schedule.weights("sds").device.type == "cpu"


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_other_schedulers_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"scheduler: expected one with alphas_cumprod .* got {name}"):
        NoiseSchedule.from_scheduler(getattr(diffusers, name)())


def _table(*values: float) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((_table(1, 2), _table(1), _table(1, 2)), "alpha, sigma, model_timesteps: expected one shape [timesteps], got"),
        ((_table(1)[None], _table(1)[None], _table(1)[None]), "expected one shape [timesteps], got"),
        ((_table(1), _table(0), _table(0)), "alpha, sigma: expected alpha >= 0 and sigma > 0 at every timestep"),
        ((_table(-1), _table(1), _table(0)), "alpha, sigma: expected alpha >= 0 and sigma > 0 at every timestep"),
        ((_table(1), _table(float("nan")), _table(0)), "expected alpha >= 0 and sigma > 0 at every timestep"),
        ((_table(1), _table(1), _table(0), "velocity"), "prediction_type: expected one of ('epsilon', 'v_predict"),
    ],
)  # fmt: skip
def test_refused_tables(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        NoiseSchedule(*arguments)


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        ("dreamfusion", "weighting: expected one of ('uniform', 'sds', 'min_snr', 'fantasia3d') or a tensor, got"),
        (torch.ones(3), "weighting: expected [timesteps] = [2], got [3]"),
    ],
)  # fmt: skip
def test_refused_weighting(weighting: Any, message: str) -> None:
    schedule = NoiseSchedule(torch.ones(2), torch.ones(2), torch.arange(2))
    with pytest.raises(ValueError, match=re.escape(message)):
        schedule.weights(weighting)
