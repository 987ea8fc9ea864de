"""`sample_timesteps`: ranges, distributions, the promises of each strategy, and the gathered tables."""

from __future__ import annotations

import functools
import importlib
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fastsds.ops import TimestepDraw, philox, sample_timesteps

STRATEGIES = ["uniform", "stratified", "antithetic", "importance"]
# The same examples in every run, on a machine of any speed; `backend` is one for all of them.
PROPERTY = settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


@dataclass
class Tables:
    """The part of a noise schedule that the sampler reads, with entries that no two timesteps share."""

    alpha: Tensor
    sigma: Tensor

    def weights(self, weighting: str | Tensor) -> Tensor:
        if isinstance(weighting, Tensor):
            return weighting
        return {"uniform": torch.ones_like(self.alpha), "rising": 1 + torch.arange(len(self.alpha)).float()}[weighting]


def _tables(timesteps: int = 1000) -> Tables:
    alpha = torch.linspace(0.99, 0.01, timesteps)
    return Tables(alpha, (1 - alpha**2).sqrt())


def _cdf(timesteps: int = 1000) -> Tensor:
    """Uneven, and not normalised."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(4)
    mass = 0.2 + torch.rand(timesteps, generator=generator) + torch.linspace(0, 3, timesteps)
    return mass.double().cumsum(0)


def _sample(batch: int, draws: int, seed: int, *, timesteps: int = 1000, **options: Any) -> TimestepDraw:
    if options.get("strategy") == "importance":
        options.setdefault("cdf", _cdf(timesteps))
    return sample_timesteps(_tables(timesteps), batch, draws, torch.tensor(seed), **options)


@PROPERTY
@given(
    strategy=st.sampled_from(STRATEGIES),
    batch=st.integers(0, 9),
    draws=st.integers(1, 7),
    seed=st.integers(-(2**63), 2**63 - 1),
    bounds=st.tuples(st.integers(0, 50), st.integers(0, 50)).filter(lambda pair: pair[0] != pair[1]),
)
def test_shapes_ranges_and_gathered_tables(
    strategy: str, batch: int, draws: int, seed: int, bounds: tuple[int, int]
) -> None:
    t_range = min(bounds), max(bounds)
    draw = _sample(batch, draws, seed, timesteps=50, strategy=strategy, t_range=t_range, weighting="rising")
    assert draw.t.dtype == torch.int64
    assert {value.shape for value in draw} == {(batch, draws)}
    assert ((draw.t >= t_range[0]) & (draw.t < t_range[1])).all()
    tables = _tables(50)
    assert torch.equal(draw.alpha_t, tables.alpha[draw.t])
    assert torch.equal(draw.sigma_t, tables.sigma[draw.t])
    if strategy == "importance":
        mass = _cdf(50).diff(prepend=torch.zeros(1).double())
        share = mass[draw.t] / mass[t_range[0] : t_range[1]].sum()
        expected = (1 + draw.t) / ((t_range[1] - t_range[0]) * share)
        torch.testing.assert_close(draw.weight.double(), expected, rtol=1e-5, atol=0)
    else:
        assert torch.equal(draw.weight, 1.0 + draw.t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dtypes_of_the_tables(strategy: str, dtype: torch.dtype) -> None:
    tables = Tables(torch.ones(10, dtype=dtype), torch.ones(10, dtype=dtype))
    cdf = _cdf(10).to(dtype) if strategy == "importance" else None
    draw = sample_timesteps(tables, 2, 3, torch.tensor(0), strategy=strategy, cdf=cdf)  # type: ignore[arg-type]
    assert [value.dtype for value in draw] == [torch.int64, dtype, dtype, dtype]


@PROPERTY
@given(
    strategy=st.sampled_from(STRATEGIES),
    batch=st.one_of(st.integers(0, 40), st.just(1300)),
    draws=st.integers(1, 7),
    seed=st.integers(-(2**63), 2**63 - 1),
    bounds=st.tuples(st.integers(0, 50), st.integers(0, 50)).filter(lambda pair: pair[0] != pair[1]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equal_to_the_definition_bit_for_bit(
    backend: str, strategy: str, batch: int, draws: int, seed: int, bounds: tuple[int, int], dtype: torch.dtype
) -> None:
    """As the CPU computes it: eager PyTorch on CUDA divides by multiplying with a reciprocal."""
    if backend == "reference-cpu":
        pytest.skip("the definition itself")
    tables = [(table + torch.rand_like(table)).to(dtype) for table in (torch.zeros(50), torch.ones(50), torch.ones(50))]
    cdf = _cdf(50).to(dtype) if strategy == "importance" else None
    arguments = (*tables, batch, draws, torch.tensor(seed), strategy, min(bounds), max(bounds), cdf)
    drawn = torch.ops.fastsds.sample_timesteps(*arguments)
    definition = importlib.import_module("fastsds.ops.sample_timesteps").reference
    on_cpu = [value.cpu() if isinstance(value, Tensor) else value for value in arguments]
    for value, expected in zip(drawn, definition(*on_cpu), strict=True):
        assert value.dtype == expected.dtype
        assert torch.equal(value.cpu(), expected)


SEEDS = range(1000, 1500)
RANGE = (5, 35)


@functools.cache
def _many(strategy: str, backend: str) -> TimestepDraw:
    """The backend's draws under many seeds, `[seeds, 2, 2]`; 30 timesteps do not divide into 4 strata."""
    weighting = 1.5 + torch.cos(torch.arange(40) / 8)
    draws = [_sample(2, 2, seed, timesteps=40, strategy=strategy, t_range=RANGE, weighting=weighting) for seed in SEEDS]
    return TimestepDraw(*(torch.stack(values) for values in zip(*draws, strict=True)))


def _probabilities(strategy: str) -> Tensor:
    """Of the timesteps in the range."""
    mass = _cdf(40).diff(prepend=torch.zeros(1).double()) if strategy == "importance" else torch.ones(40).double()
    mass = mass[slice(*RANGE)]
    return mass / mass.sum()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("position", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_each_draw_alone_has_the_wanted_distribution(strategy: str, position: tuple[int, int], backend: str) -> None:
    t = _many(strategy, backend).t[:, position[0], position[1]] - RANGE[0]
    counts = torch.bincount(t, minlength=30).reshape(15, 2).sum(dim=1)
    expected = len(SEEDS) * _probabilities(strategy).reshape(15, 2).sum(dim=1)
    assert stats.chisquare(counts.cpu().numpy(), expected.cpu().numpy()).pvalue > 0.005


def test_timesteps_without_mass_are_not_drawn() -> None:
    cdf = torch.tensor([0.0, 1.0, 1.0, 4.0, 6.0, 6.0])
    seen = {
        t
        for seed in range(100)
        for t in _sample(2, 2, seed, timesteps=6, strategy="importance", cdf=cdf).t.flatten().tolist()
    }
    assert seen == {1, 3, 4}


def test_uniform_draws_are_independent(backend: str) -> None:
    t = _many("uniform", backend).t.flatten(1).double()
    assert (torch.corrcoef(t.T) - torch.eye(4)).abs().max() < 4 / len(SEEDS) ** 0.5


@pytest.mark.parametrize(("batch", "draws"), [(1, 1), (4, 3), (3, 8), (8, 1), (1, 8), (5, 5)])
@pytest.mark.parametrize("span", [240, 1000, 7])
def test_stratified_puts_one_draw_in_each_stratum(batch: int, draws: int, span: int) -> None:
    count = batch * draws
    for seed in range(20):
        t = _sample(batch, draws, seed, timesteps=1000, strategy="stratified", t_range=(0, span)).t
        for stratum, value in enumerate(sorted(t.flatten().tolist())):
            # A stratum [s, s + 1) / count of the range, which need not begin at a whole timestep.
            assert stratum * span // count <= value <= ((stratum + 1) * span - 1) // count
        parts = t * draws // span
        if span % count == 0:
            assert all(len(set(row)) == draws for row in parts.tolist())


def test_stratified_order_is_random() -> None:
    """The strata wander over the images and draws; fixed ones would tie an image to a part of the range."""
    orders = {tuple(_sample(3, 2, seed, strategy="stratified").t.flatten().argsort().tolist()) for seed in range(200)}
    assert len(orders) > 30


def test_stratified_has_less_variance_than_uniform(backend: str) -> None:
    """One draw in each stratum: four strata of a linear function leave a sixteenth of its variance."""
    means = {strategy: _many(strategy, backend).t.double().mean(dim=(1, 2)) for strategy in ("stratified", "uniform")}
    assert means["stratified"].var() < 0.1 * means["uniform"].var()


@pytest.mark.parametrize(("batch", "draws"), [(3, 2), (2, 4), (4, 1), (3, 3)])
def test_antithetic_draws_mirror_each_other(batch: int, draws: int) -> None:
    """In row-major order; an odd one is left alone at the end."""
    firsts = set()
    for seed in range(50):
        t = _sample(batch, draws, seed, strategy="antithetic", t_range=(100, 900)).t.flatten()
        pairs = t[: len(t) // 2 * 2].reshape(-1, 2)
        assert (pairs.sum(dim=1) == 100 + 899).all()
        firsts.update(pairs[:, 0].tolist())
    assert len(firsts) > 40


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mean_of_the_weighted_loss_is_that_of_uniform(strategy: str, backend: str) -> None:
    """Unbiased: the mean over many calls of `weight * f(t)` is the mean of `w * f` over the range."""
    timesteps = torch.arange(40).double()
    f = torch.sin(timesteps / 4) + (timesteps / 8) ** 2 + 1
    draw = _many(strategy, backend)
    means = (draw.weight * f[draw.t]).mean(dim=(1, 2))
    expected = ((1.5 + torch.cos(timesteps / 8)) * f)[slice(*RANGE)].mean()
    error = means.std() / len(SEEDS) ** 0.5
    assert abs(means.mean() - expected) < 3 * error
    assert error < 0.02 * expected
    if strategy == "importance":
        uncorrected = (_probabilities(strategy) * ((1.5 + torch.cos(timesteps / 8)) * f)[slice(*RANGE)]).sum()
        assert abs(uncorrected - expected) > 6 * error  # the assertion above can tell


def test_importance_stays_in_a_range_with_little_mass() -> None:
    cdf = torch.cat([torch.full((500,), 2.0), torch.full((500,), 2e-5)]).double().cumsum(0)
    for seed in range(50):
        draw = _sample(8, 4, seed, strategy="importance", cdf=cdf, t_range=(600, 700))
        assert ((draw.t >= 600) & (draw.t < 700)).all()
        torch.testing.assert_close(draw.weight, torch.ones(8, 4), rtol=1e-4, atol=0)


def test_importance_of_a_flat_cdf_has_no_correction() -> None:
    draw = _sample(8, 4, 0, strategy="importance", cdf=torch.arange(1, 1001).double())
    torch.testing.assert_close(draw.weight, torch.ones(8, 4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_range_of_one_timestep(strategy: str) -> None:
    draw = _sample(3, 2, 5, strategy=strategy, t_range=(42, 43))
    assert (draw.t == 42).all()
    torch.testing.assert_close(draw.weight, torch.ones(3, 2), rtol=1e-6, atol=0)


@pytest.mark.smoke
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_replays_by_seed(strategy: str) -> None:
    first, again, other = (_sample(5, 3, seed, strategy=strategy) for seed in (-8, -8, -7))
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.t, other.t)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_independent_of_the_noise_under_the_same_seed(strategy: str, backend: str) -> None:
    """One seed serves both ops: over many seeds, timesteps and the first noise elements are uncorrelated."""
    t = _many(strategy, backend).t.flatten(1).double().cpu()
    for values in (_noise(), _noise().abs()):
        correlation = torch.corrcoef(torch.cat([t, values], dim=1).T)[:4, 4:]
        assert correlation.abs().max() < 4 / len(SEEDS) ** 0.5


@functools.cache
def _noise() -> Tensor:
    """The first eight elements of the noise under each seed."""
    return torch.stack([philox.normal(torch.tensor(seed, device="cpu"), (8,)) for seed in SEEDS]).double()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_opcheck(strategy: str) -> None:
    tables = _tables(20)
    arguments = (tables.alpha, tables.sigma, tables.weights("rising"), 3, 2, torch.tensor(1), strategy, 2, 18)
    cdf = _cdf(20) if strategy == "importance" else None
    torch.library.opcheck(torch.ops.fastsds.sample_timesteps.default, (*arguments, cdf))


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    tables, weights = _tables(20), torch.rand(20)

    def function(seed: Tensor) -> Tensor:
        draw = sample_timesteps(tables, 4, 2, seed, strategy="stratified", weighting=weights)
        return draw.t * draw.weight + draw.alpha_t - draw.sigma_t

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for seed in (0, -5):
        torch.testing.assert_close(compiled(torch.tensor(seed)), function(torch.tensor(seed)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": -1}, "batch: expected at least 0, got -1"),
        ({"draws": 0}, "draws: expected at least 1, got 0"),
        ({"strategy": "sobol"}, "strategy: expected one of ('uniform', 'stratified', 'antithetic', 'importance')"),
        ({"t_range": (5, 5)}, "t_range: expected 0 <= first < end <= 10 timesteps, got (5, 5)"),
        ({"t_range": (-1, 5)}, "t_range: expected 0 <= first < end <= 10 timesteps, got (-1, 5)"),
        ({"t_range": (0, 11)}, "t_range: expected 0 <= first < end <= 10 timesteps, got (0, 11)"),
        ({"strategy": "importance"}, "cdf: expected a tensor for strategy='importance', got None"),
        ({"cdf": torch.ones(10)}, "cdf: expected None for strategy='uniform', got a tensor"),
        ({"cdf": torch.ones(9), "strategy": "importance"}, "cdf: expected [timesteps=10], got [9]"),
        ({"cdf": torch.ones(10).half(), "strategy": "importance"}, "cdf: expected one of [torch.float32, torch."),
        ({"weighting": torch.ones(9)}, "weights: expected [timesteps=10], got [9]"),
        ({"weighting": torch.ones(10).long()}, "weights: expected one of [torch.float32, torch.float64], got torch"),
        ({"weighting": torch.ones(10, device="meta")}, "weights: expected on the device of alpha (cpu), got meta"),
        ({"seed": torch.tensor(0.5)}, "seed: expected one int64 in a tensor, got shape [] of torch.float32"),
        ({"seed": torch.zeros(3).long()}, "seed: expected one int64 in a tensor, got shape [3] of torch.int64"),
    ],
)  # fmt: skip
def test_messages(changes: dict[str, Any], message: str) -> None:
    tables = _tables(10)
    device = tables.alpha.device
    arguments: dict[str, Any] = {"batch": 2, "draws": 2, "seed": torch.tensor(0), **changes}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and not value.is_meta:
            arguments[name] = value.to(device)
    with pytest.raises(RuntimeError, match=re.escape(message.replace("(cpu)", f"({device})"))):
        sample_timesteps(tables, **arguments)


@pytest.mark.parametrize("t_range", [(0.02, 0.98), (0, 1.0), (torch.tensor(0), 5)])
def test_range_in_fractions_is_refused(t_range: Any) -> None:
    message = f"t_range: expected two timesteps (int, int), got {t_range!r}; a share of a schedule of 10 timesteps"
    with pytest.raises(TypeError, match=re.escape(message)):
        _sample(2, 2, 0, timesteps=10, t_range=t_range)
