"""Seeds that go on after a checkpoint where they stopped, and timesteps drawn as the losses ask."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsds.diffusion import DiffusionTeacher, NoiseSchedule, SDSLoss, SeedStream, TimestepSampler
from fastsds.ops import TimestepDraw, sample_timesteps

CPU = torch.device("cpu")


def _seeds(stream: SeedStream, count: int) -> list[int]:
    return [int(stream.next(CPU)) for _ in range(count)]


def test_seeds_are_fresh_int64_scalars() -> None:
    stream = SeedStream(3)
    seed = stream.next(CPU)
    assert seed.dtype == torch.int64
    assert seed.shape == ()
    assert len({int(seed), *_seeds(stream, 100)}) == 101


def test_streams_of_one_seed_agree_and_of_another_do_not() -> None:
    assert _seeds(SeedStream(3), 10) == _seeds(SeedStream(3), 10)
    assert not set(_seeds(SeedStream(3), 10)) & set(_seeds(SeedStream(4), 10))


def test_seeds_use_more_than_32_bits() -> None:
    seeds = _seeds(SeedStream(), 50)
    assert max(seeds) > 2**62
    assert len({seed % 2**32 for seed in seeds}) == 50


def test_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    SeedStream().next(CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_state_round_trip(tmp_path: Path) -> None:
    """Through a file, into a stream that was built with another seed and has already drawn."""
    stream = SeedStream(3)
    _seeds(stream, 5)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    expected = _seeds(stream, 5)
    resumed = SeedStream(8)
    _seeds(resumed, 2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert _seeds(resumed, 5) == expected


def test_saved_state_does_not_move_with_the_stream() -> None:
    stream = SeedStream(3)
    _seeds(stream, 1)
    state = stream.state_dict()
    expected = _seeds(stream, 3)
    _seeds(stream, 10)
    stream.load_state_dict(state)
    assert _seeds(stream, 3) == expected


def test_a_state_taken_before_the_first_draw_carries_the_seed() -> None:
    state = SeedStream(41).state_dict()
    other = SeedStream(-7)
    other.load_state_dict(state)
    device = torch.device("cpu")
    assert other.next(device) == SeedStream(41).next(device)
    assert other.next(device) != SeedStream(-7).next(device)


def test_a_state_goes_on_from_on_every_device_of_its_kind() -> None:
    """What a process on another GPU does with the state that the main process saved."""
    first, other = torch.device("cpu", 0), torch.device("cpu", 1)
    stream = SeedStream(3)
    for _ in range(4):
        stream.next(first)
    resumed = SeedStream(8)
    resumed.load_state_dict(stream.state_dict())
    again = SeedStream(9)
    again.load_state_dict(resumed.state_dict())  # saved before it drew
    assert int(resumed.next(other)) == int(again.next(CPU)) == int(stream.next(first))


TIMESTEPS, T_RANGE = 200, (20, 180)
SCHEDULE = NoiseSchedule(torch.ones(TIMESTEPS), torch.ones(TIMESTEPS), torch.arange(TIMESTEPS))


def _uneven_loss(t: Tensor, noise: Tensor) -> Tensor:
    """Falls by three orders of magnitude over the range and scatters by half around its mean."""
    return torch.exp(-(t.double() - T_RANGE[0]) / 24) * (1 + 0.5 * noise.sign())


def _draw(sampler: TimestepSampler, seed: int, batch: int = 16, draws: int = 2) -> tuple[TimestepDraw, Tensor]:
    """Timesteps by the sampler's present density, and their losses with the correction in them."""
    draw = sample_timesteps(
        SCHEDULE, batch, draws, torch.tensor(seed), strategy="importance", t_range=T_RANGE, cdf=sampler.cdf(CPU)
    )
    return draw, draw.weight * _uneven_loss(draw.t, torch.randn(batch, draws))


def _warmed_up(steps: int = 200, **options: Any) -> TimestepSampler:
    sampler = TimestepSampler(TIMESTEPS, t_range=T_RANGE, **{"bins": 20, **options})
    for step in range(steps):
        draw, losses = _draw(sampler, step)
        sampler.update(draw.t, losses)
    return sampler


def _mass(sampler: TimestepSampler) -> Tensor:
    cdf = sampler.cdf(CPU)
    return torch.diff(cdf, prepend=cdf.new_zeros(1)) / cdf[-1]


def test_uniform_until_every_bin_has_been_seen_enough() -> None:
    sampler = TimestepSampler(TIMESTEPS, t_range=T_RANGE, bins=20, warmup=3)
    uniform = torch.zeros(TIMESTEPS, dtype=torch.float64)
    uniform[slice(*T_RANGE)] = 1 / 160
    t = torch.arange(20, 180, 8)  # one in each bin
    losses = torch.linspace(1, 5, 20)
    for first in (0, 0, 1, 0):  # the first bin is left out once
        torch.testing.assert_close(_mass(sampler), uniform)
        sampler.update(t[first:], losses[first:])
    assert (_mass(sampler)[:100].sum() < 0.4) and (_mass(sampler)[slice(*T_RANGE)] > 0).all()


@pytest.mark.parametrize("bins", [1, 7, 20, 1000])
def test_density_is_the_root_of_the_second_moment_mixed_with_the_uniform(bins: int) -> None:
    """Every timestep seen equally often, twice: NumPy's moments of the same losses."""
    sampler = TimestepSampler(TIMESTEPS, t_range=T_RANGE, bins=bins, uniform_share=0.2, warmup=1)
    t = torch.arange(*T_RANGE).repeat(2)
    losses = torch.rand(320, dtype=torch.float64) * t
    sampler.update(t.view(32, 10), losses.view(32, 10))
    parts = np.array([(value - 20) * min(bins, 160) // 160 for value in t.tolist()])
    roots = np.array([np.sqrt(np.mean(losses.numpy()[parts == part] ** 2)) for part in parts[:160]])
    expected = np.zeros(TIMESTEPS)
    expected[slice(*T_RANGE)] = 0.8 * roots / roots.sum() + 0.2 / 160
    np.testing.assert_allclose(_mass(sampler).numpy(), expected, rtol=1e-10, atol=1e-15)


def test_learned_moments_are_those_of_the_losses_without_the_correction() -> None:
    """However unevenly the draws fall: the loss's exact moments, 5/4 of the squared mean."""
    sampler = _warmed_up(400)
    assert sampler._seen.max() > 20 * sampler._seen.min()
    mean_square = 1.25 * _uneven_loss(torch.arange(*T_RANGE), torch.zeros(160)).square().view(20, 8).mean(dim=1)
    error = (sampler._second_moment / mean_square - 1).abs()
    # A squared loss scatters by about its own mean.
    assert (error < 4 / sampler._seen.clamp(max=sampler.memory).sqrt()).all()


def test_estimates_are_unbiased_and_vary_less() -> None:
    sampler = _warmed_up()
    exact = _uneven_loss(torch.arange(*T_RANGE), torch.zeros(160)).mean()
    learned, uniform = (
        torch.stack([_draw(density, 10_000 + seed)[1].mean() for seed in range(2000)])
        for density in (sampler, TimestepSampler(TIMESTEPS, t_range=T_RANGE))
    )
    for estimates in (learned, uniform):
        assert (estimates.mean() - exact).abs() < 4 * estimates.std() / 2000**0.5
    assert learned.var() < 0.5 * uniform.var()


def test_learning_keeps_the_estimates_unbiased() -> None:
    """Through the warm-up and on: the mean over many short runs, each of its own."""
    exact = _uneven_loss(torch.arange(*T_RANGE), torch.zeros(160)).mean()
    means = []
    for run in range(200):
        sampler = TimestepSampler(TIMESTEPS, t_range=T_RANGE, bins=4, warmup=4, memory=32)
        for step in range(10):
            draw, losses = _draw(sampler, 100 * run + step, batch=8)
            sampler.update(draw.t, losses)
            means.append(losses.mean())
    estimates = torch.stack(means)
    assert (estimates.mean() - exact).abs() < 4 * estimates.std() / len(means) ** 0.5


def test_old_losses_fade() -> None:
    sampler = TimestepSampler(TIMESTEPS, bins=2, memory=100, warmup=1)
    t = torch.arange(TIMESTEPS).view(-1, 2)
    for level in (100.0, 1.0):
        for _ in range(10):
            sampler.update(t, torch.where(t < 100, level, 1.0) / (TIMESTEPS * _mass(sampler)[t]))
    torch.testing.assert_close(_mass(sampler), torch.full((TIMESTEPS,), 1 / TIMESTEPS, dtype=torch.float64))


def test_losses_of_zero_leave_every_timestep_its_share() -> None:
    sampler = TimestepSampler(TIMESTEPS, bins=4, warmup=1)
    t = torch.arange(TIMESTEPS).view(-1, 2)
    sampler.update(t, torch.zeros(t.shape))
    torch.testing.assert_close(_mass(sampler), torch.full((TIMESTEPS,), 1 / TIMESTEPS, dtype=torch.float64))
    sampler.update(t, (t < 50).double())
    assert _mass(sampler).min() >= 0.1 / TIMESTEPS * (1 - 1e-9)


def test_losses_that_are_not_finite_are_passed_over() -> None:
    clean, spoilt = (TimestepSampler(TIMESTEPS, bins=4, warmup=1) for _ in range(2))
    t = torch.arange(TIMESTEPS).view(-1, 2)
    losses = torch.rand(t.shape)
    clean.update(t, losses)
    extra = torch.tensor([[3, 150]])
    spoilt.update(torch.cat([t, extra]), torch.cat([losses, torch.tensor([[torch.nan, torch.inf]])]))
    torch.testing.assert_close(_mass(spoilt), _mass(clean))


def test_nothing_waits_for_the_device() -> None:
    """A fake tensor has no value to wait for."""
    with FakeTensorMode():
        sampler = TimestepSampler(TIMESTEPS, bins=4)
        t = torch.zeros(8, 2, dtype=torch.int64)
        sampler.update(t, torch.ones(8, 2))
        assert sampler.cdf(CPU).shape == (TIMESTEPS,)


def test_sampler_state_round_trip() -> None:
    """Through a list of bytes, as a checkpoint's JSON holds it."""
    sampler = _warmed_up(60)
    stored = {name: tensor.tolist() for name, tensor in sampler.state_dict().items()}
    resumed = TimestepSampler(TIMESTEPS, t_range=T_RANGE, bins=20)
    resumed.load_state_dict({name: torch.tensor(values, dtype=torch.uint8) for name, values in stored.items()})
    for step in range(60, 70):
        noise = torch.get_rng_state()
        draw, losses = _draw(sampler, step)
        torch.set_rng_state(noise)
        again, losses_again = _draw(resumed, step)
        assert torch.equal(draw.t, again.t) and torch.equal(losses, losses_again)
        sampler.update(draw.t, losses)
        resumed.update(again.t, losses_again)
    assert not torch.equal(_mass(sampler), _mass(TimestepSampler(TIMESTEPS, t_range=T_RANGE)))


def test_saved_sampler_state_does_not_move_with_the_sampler() -> None:
    sampler = _warmed_up(60)
    state, before = sampler.state_dict(), _mass(sampler)
    draw, losses = _draw(sampler, 1)
    sampler.update(draw.t, 10 * losses)
    assert not torch.equal(_mass(sampler), before)
    sampler.load_state_dict(state)
    assert torch.equal(_mass(sampler), before)


@pytest.mark.parametrize("options", [{"bins": 20}, {"bins": 10, "t_range": T_RANGE}])
def test_state_of_another_sampler_is_refused(options: dict[str, Any]) -> None:
    state = TimestepSampler(TIMESTEPS, t_range=T_RANGE, bins=20).state_dict()
    with pytest.raises(
        ValueError, match=r"state: expected \d+ bins over the timesteps \(\d+, \d+\), got 20 over \(20, 18"
    ):
        TimestepSampler(TIMESTEPS, **options).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_range": (0, 201)}, "t_range: expected 0 <= first < end <= 200 timesteps, got (0, 201)"),
        ({"t_range": (50, 50)}, "t_range: expected 0 <= first < end <= 200 timesteps, got (50, 50)"),
        ({"bins": 0}, "bins: expected at least 1, got 0"),
        ({"memory": 0}, "memory: expected at least 1, got 0"),
        ({"warmup": 0}, "warmup: expected at least 1, got 0"),
        ({"uniform_share": 0.0}, "uniform_share: expected a share in (0, 1], got 0.0"),
    ],
)
def test_sampler_options_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TimestepSampler(TIMESTEPS, **options)


def _update_in_process(rank: int, folder: str, t: Tensor, losses: Tensor) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    sampler = TimestepSampler(TIMESTEPS, bins=4, warmup=1)
    rows = slice(4 * rank, 4 * rank + 4)
    for _ in range(2):
        sampler.update(t[rows], losses[rows])
    torch.save(sampler.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_keep_the_density_of_their_global_batch(tmp_path: Path) -> None:
    t = torch.randint(TIMESTEPS, (8, 6))
    losses = torch.rand(8, 6)
    mp.spawn(_update_in_process, (str(tmp_path), t, losses), nprocs=2)
    whole = TimestepSampler(TIMESTEPS, bins=4, warmup=1)
    for _ in range(2):
        whole.update(t, losses)
    expected = whole.state_dict()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name].view(torch.float64), value.view(torch.float64))


def _calls(loss: SDSLoss, latents: Tensor, count: int) -> Tensor:
    return torch.stack([loss(latents, ["a red circle", "a blue square"]) for _ in range(count)])


def test_loss_learns_in_training_mode_alone(teacher: DiffusionTeacher) -> None:
    latents = torch.randn(2, *teacher.latent_shape)
    loss = SDSLoss(teacher, draws=4, strategy="importance")
    loss.sampler = TimestepSampler(1000, bins=4, warmup=2)
    before = _mass(loss.sampler)
    _calls(loss.eval(), latents, 5)
    assert torch.equal(_mass(loss.sampler), before)
    _calls(loss.train(), latents, 5)
    assert not torch.allclose(_mass(loss.sampler), before)
    assert SDSLoss(teacher, strategy="stratified").sampler is None


@torch.no_grad()
def test_importance_sampled_loss_is_the_uniform_one_on_average(teacher: DiffusionTeacher) -> None:
    latents = torch.randn(2, *teacher.latent_shape)
    values = []
    for seed, strategy in enumerate(("uniform", "importance")):
        loss = SDSLoss(teacher, 8, strategy, torch.linspace(0, 3, 1000).square(), seed=seed)
        if loss.sampler is not None:
            loss.sampler = TimestepSampler(1000, bins=8, warmup=2)
        values.append(_calls(loss, latents, 60))
    uniform, importance = values
    assert abs(uniform.mean() - importance.mean()) < 4 * ((uniform.var() + importance.var()) / 60) ** 0.5
    assert importance.var() < 0.5 * uniform.var()
