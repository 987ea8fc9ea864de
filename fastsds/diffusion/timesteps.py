"""Where the randomness of a loss comes from: seeds from a generator, timesteps from what the losses were."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor


class SeedStream:
    """Fresh seeds for the ops, drawn on a device from a `torch.Generator`.

    The state is part of a checkpoint: a resumed run draws the seeds that the killed one would have drawn. Devices of
    one kind draw the same seeds, so that processes on a GPU each share them, and go on from the state of any.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._resumed: dict[str, Tensor] = {}

    def next(self, device: torch.device) -> Int[Tensor, ""]:
        """One int64 on `device`, not yet drawn before."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
            if device.type in self._resumed:
                self._generators[device].set_state(self._resumed[device.type])
        return torch.randint(2**63 - 1, (), generator=self._generators[device], device=device)

    def state_dict(self) -> dict[str, Tensor]:
        """The generators' states by kind of device, each as bytes; those not used yet follow from the seed."""
        states = self._resumed | {device.type: generator.get_state() for device, generator in self._generators.items()}
        return {"seed": torch.tensor(list(self._seed.to_bytes(8, "little", signed=True)), dtype=torch.uint8), **states}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on where `state_dict` was taken."""
        states = dict(state)
        self._seed = int.from_bytes(bytes(states.pop("seed").tolist()), "little", signed=True)
        self._generators = {}
        self._resumed = {kind: generator_state.cpu() for kind, generator_state in states.items()}


class TimestepSampler:
    """The adaptive half of `strategy="importance"`: timesteps are drawn as often as their losses are large.

    Keeps the second moment of the weighted loss in each of `bins` equal parts of the range, and gives the op a CDF in
    which a timestep's mass is proportional to the moment's root: the density of least variance for independent draws
    (Nichol & Dhariwal, ICML 2021, section 3.3). `1 / (timesteps p(t))` in the op keeps every estimate unbiased,
    whatever was learned. All on the losses' device, without waiting for it; in place, so that a captured CUDA graph
    goes on learning.

    Args:
        timesteps: of the schedule.
        t_range: first timestep and the one after the last; the whole schedule by default.
        bins: parts of the range, no more than it has timesteps.
        uniform_share: mass that every timestep shares equally; no loss is weighted by more than its inverse.
        memory: losses of a bin over which its moment is a mean; older ones fade.
        warmup: losses to see in every bin before the draws leave the uniform density.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(
        self,
        timesteps: int,
        *,
        t_range: tuple[int, int] | None = None,
        bins: int = 50,
        uniform_share: float = 0.1,
        memory: int = 1024,
        warmup: int = 16,
    ) -> None:
        t_min, t_max = (0, timesteps) if t_range is None else t_range
        if not 0 <= t_min < t_max <= timesteps:
            raise ValueError(f"t_range: expected 0 <= first < end <= {timesteps} timesteps, got ({t_min}, {t_max})")
        for name, value in (("bins", bins), ("memory", memory), ("warmup", warmup)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0 < uniform_share <= 1:
            raise ValueError(f"uniform_share: expected a share in (0, 1], got {uniform_share}")
        self.timesteps = timesteps
        self.t_range = (t_min, t_max)
        self.bins = min(bins, t_max - t_min)
        self.uniform_share = uniform_share
        self.memory = memory
        self.warmup = warmup
        starts = -(torch.arange(self.bins + 1) * (t_min - t_max) // self.bins)
        self._bin_sizes = starts.diff().double()
        self._second_moment = torch.zeros_like(self._bin_sizes)
        self._seen = torch.zeros_like(self._bin_sizes)

    def cdf(self, device: torch.device) -> Float[Tensor, "timesteps"]:
        """The mass up to and with each timestep, float64; uniform over the range until every bin is warmed up."""
        t_min, t_max = self.t_range
        t = torch.arange(self.timesteps, device=device)
        in_range = (t >= t_min) & (t < t_max)
        density = self._density(device)[self._bin(t).clamp(0, self.bins - 1)]
        return (density * in_range).cumsum(0)

    def update(self, t: Int[Tensor, "batch draws"], losses: Float[Tensor, "batch draws"]) -> None:
        """Learns from the losses of draws that the present `cdf` gave, the importance correction still in them.

        Losses that are not finite are passed over. Processes pool what each has seen, so that they keep one density.
        """
        device, (t_min, t_max) = losses.device, self.t_range
        observed = losses.detach().double().flatten()
        finite = observed.isfinite()
        squares = torch.where(finite, observed, 0.0).square()
        # A product, because scattered additions take another order, and other last bits, at every run on a GPU.
        in_bin = (self._bin(t.flatten()) == torch.arange(self.bins, device=device).unsqueeze(1)).double()
        sums = in_bin @ torch.stack([squares, finite.double()], dim=1)  # [bins, 2]
        if dist.is_initialized():
            dist.all_reduce(sums)
        # Within a bin the correction is one number, 1 / (timesteps p).
        total, count = sums.unbind(1)
        uncorrected = total * (self._density(device) * (t_max - t_min)).square()
        self._seen += count
        rate = count / self._seen.clamp(1, self.memory).maximum(count)
        self._second_moment += rate * (uncorrected / count.clamp(min=1) - self._second_moment)

    def state_dict(self) -> dict[str, Tensor]:
        """The range and what was learned in it, each as bytes."""
        t_range = torch.tensor(self.t_range)
        state = {"t_range": t_range, "second_moment": self._second_moment, "seen": self._seen}
        return {name: tensor.cpu().clone().view(torch.uint8) for name, tensor in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: it was taken over another range or with another number of bins.
        """
        t_range = tuple(state["t_range"].view(torch.int64).tolist())
        second_moment, seen = (state[name].view(torch.float64) for name in ("second_moment", "seen"))
        if (t_range, len(seen)) != (self.t_range, self.bins):
            raise ValueError(
                f"state: expected {self.bins} bins over the timesteps {self.t_range}, got {len(seen)} over {t_range}"
            )
        self._second_moment.copy_(second_moment)
        self._seen.copy_(seen)

    def _bin(self, t: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        t_min, t_max = self.t_range
        return (t - t_min) * self.bins // (t_max - t_min)

    def _density(self, device: torch.device) -> Float[Tensor, "bins"]:
        """The probability of one timestep in each bin."""
        if self._seen.device != device:
            for name in ("_bin_sizes", "_second_moment", "_seen"):
                setattr(self, name, getattr(self, name).to(device))
        root = self._second_moment.sqrt()
        total = (root * self._bin_sizes).sum().clamp(min=torch.finfo(torch.float64).tiny)
        uniform = 1 / self._bin_sizes.sum()
        learned = (1 - self.uniform_share) * root / total + self.uniform_share * uniform
        return torch.where((self._seen >= self.warmup).all(), learned, uniform)
