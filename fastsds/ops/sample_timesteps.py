"""`sample_timesteps`: timesteps for every noise draw of a batch, with their coefficients and weights gathered."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastsds.ops import _checks, _dispatch, _extension, philox

Strategy = Literal["uniform", "stratified", "antithetic", "importance"]
STRATEGIES = get_args(Strategy)


class TimestepDraw(NamedTuple):
    """Timesteps and what belongs to them, each `[batch, draws]`."""

    t: Int[Tensor, "batch draws"]
    """Index into the schedule, 0 the least noisy; int64."""
    alpha_t: Float[Tensor, "batch draws"]
    """Signal scale."""
    sigma_t: Float[Tensor, "batch draws"]
    """Noise scale."""
    weight: Float[Tensor, "batch draws"]
    """w(t), times the correction that keeps importance sampling unbiased."""


class Schedule(Protocol):
    """What the sampler reads of a noise schedule."""

    @property
    def alpha(self) -> Tensor: ...  # [timesteps]
    @property
    def sigma(self) -> Tensor: ...  # [timesteps]
    def weights(self, weighting: str | Tensor) -> Tensor: ...  # [timesteps]


def sample_timesteps(
    schedule: Schedule,
    batch: int,
    draws: int,
    seed: Int[Tensor, ""],
    *,
    strategy: Strategy = "uniform",
    t_range: tuple[int, int] | None = None,
    weighting: str | Float[Tensor, "timesteps"] = "uniform",
    cdf: Float[Tensor, "timesteps"] | None = None,
) -> TimestepDraw:
    """Draws `[batch, draws]` timesteps from `seed` and gathers `alpha_t`, `sigma_t` and `w(t)`.

    Every strategy has the mean of its weighted loss equal to that of `uniform`:

    - `uniform`: independent, uniform over the range (the paper's, *secondary*).
    - `stratified`: the range is cut into `batch * draws` strata, one draw in each; the draws of one image lie in
      different `draws`-ths of the range, and each draw alone is still uniform.
    - `antithetic`: draws 2k and 2k+1 (in row-major order) mirror each other in the range.
    - `importance`: stratified quantiles of `cdf`, with `1 / (timesteps p(t))` multiplied into the weight.

    Args:
        schedule: a `NoiseSchedule`, on the device of `seed`.
        seed: one int64 on the device. The noise of `add_noise` under the same seed is independent of the timesteps.
        t_range: first timestep and the one after the last, as in `range`; the whole schedule by default.
        weighting: a name that the schedule knows, or w(t) for every timestep.
        cdf: for `importance`: non-decreasing over all timesteps, with positive mass in the range. It need not be
            normalised.

    Raises:
        RuntimeError: a size, range, dtype, device or name is not as above; the message names the argument.
        TypeError: `t_range` is not in whole timesteps.
    """
    t_min, t_max = (0, len(schedule.alpha)) if t_range is None else t_range
    if not (isinstance(t_min, int) and isinstance(t_max, int)):
        raise TypeError(
            f"t_range: expected two timesteps (int, int), got {t_range!r}; a share of a schedule of "
            f"{len(schedule.alpha)} timesteps must be multiplied out"
        )
    return TimestepDraw(
        *torch.ops.fastsds.sample_timesteps(
            schedule.alpha, schedule.sigma, schedule.weights(weighting), batch, draws, seed, strategy, t_min, t_max, cdf
        )
    )


def _check(
    alpha: Tensor,
    sigma: Tensor,
    weights: Tensor,
    batch: int,
    draws: int,
    seed: Tensor,
    strategy: str,
    t_min: int,
    t_max: int,
    cdf: Tensor | None = None,
) -> None:
    timesteps = len(alpha)
    for name, table in (("alpha", alpha), ("sigma", sigma), ("weights", weights), ("cdf", cdf)):
        if table is not None:
            _checks.check_floating(name, table, _checks.COEFFICIENT_DTYPES)
            _checks.expect(
                table.shape == (timesteps,),
                lambda: f"{name}: expected [timesteps={timesteps}], got {list(table.shape)}",
            )
    _checks.check_seed(seed)
    _checks.check_same_device(alpha=alpha, sigma=sigma, weights=weights, seed=seed, cdf=cdf)
    _checks.expect(batch >= 0, lambda: f"batch: expected at least 0, got {batch}")
    _checks.expect(draws >= 1, lambda: f"draws: expected at least 1, got {draws}")
    _checks.expect(strategy in STRATEGIES, lambda: f"strategy: expected one of {STRATEGIES}, got {strategy!r}")
    _checks.expect(
        0 <= t_min < t_max <= timesteps,
        lambda: f"t_range: expected 0 <= first < end <= {timesteps} timesteps, got ({t_min}, {t_max})",
    )
    _checks.expect(
        (strategy == "importance") == (cdf is not None),
        lambda: (
            f"cdf: expected {'a tensor' if strategy == 'importance' else 'None'} for strategy={strategy!r}, "
            f"got {'None' if cdf is None else 'a tensor'}"
        ),
    )


def _empty(
    alpha: Tensor, sigma: Tensor, weights: Tensor, batch: int, draws: int, *_: object, **__: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (batch, draws)
    return (
        torch.empty(shape, dtype=torch.int64, device=alpha.device),
        alpha.new_empty(shape),
        sigma.new_empty(shape),
        weights.new_empty(shape),
    )


def reference(
    alpha: Tensor,
    sigma: Tensor,
    weights: Tensor,
    batch: int,
    draws: int,
    seed: Tensor,
    strategy: str,
    t_min: int,
    t_max: int,
    cdf: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition, in plain PyTorch; integer arithmetic, so that every backend draws the same timesteps."""
    span, count = t_max - t_min, batch * draws
    jitter = philox.words(seed, count, philox.JITTER_STREAM)
    correction = None
    if strategy == "uniform":
        t = t_min + (jitter * span >> 32)
    elif strategy == "antithetic":
        index = torch.arange(count, device=seed.device)
        offset = jitter[index // 2] * span >> 32
        t = t_min + torch.where(index % 2 == 0, offset, span - 1 - offset)
    elif strategy == "stratified":
        t = t_min + (_strata(seed, batch, draws) * span + (jitter * span >> 32)) // max(count, 1)
    else:
        assert cdf is not None
        quantile = (_strata(seed, batch, draws) + jitter.double() * 2.0**-32) / max(count, 1)
        cumulative = torch.cat([cdf.new_zeros(1), cdf]).double()  # [timesteps + 1], the mass before each timestep
        below, above = cumulative[t_min], cumulative[t_max]
        target = below + quantile * (above - below)
        t = torch.searchsorted(cumulative[1:].contiguous(), target, right=True).clamp(t_min, t_max - 1)
        correction = (above - below) / (span * (cumulative[t + 1] - cumulative[t]))
    weight = weights[t] if correction is None else (weights[t] * correction).to(weights.dtype)
    return tuple(value.reshape(batch, draws) for value in (t, alpha[t], sigma[t], weight))  # type: ignore[return-value]


def _strata(seed: Tensor, batch: int, draws: int) -> Tensor:
    """A stratum in [0, batch * draws) for every draw, none twice, int64 `[batch * draws]`.

    Draw `d` of image `b` falls in part `(d + rotation_b) % draws` of the range, and within that part in the place
    that the image has when the batch is sorted by random words.
    """
    order = philox.words(seed, draws * batch, philox.ORDER_STREAM).reshape(draws, batch)
    place = order.argsort(dim=1, stable=True).argsort(dim=1, stable=True)  # [draws, batch]
    rotation = philox.words(seed, batch, philox.ROTATION_STREAM) * draws >> 32  # [batch]
    image = torch.arange(batch, device=seed.device).unsqueeze(1)
    part = (torch.arange(draws, device=seed.device) + rotation.unsqueeze(1)) % draws  # [batch, draws]
    return (part * batch + place[part, image]).flatten()


_dispatch.define(
    "sample_timesteps",
    "(Tensor alpha, Tensor sigma, Tensor weights, SymInt batch, SymInt draws, Tensor seed, str strategy, "
    "int t_min, int t_max, Tensor? cdf=None) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    fake=_empty,
    reference=reference,
)
_extension.register("sample_timesteps", cuda=True)
