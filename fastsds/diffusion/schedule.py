"""The noise schedule of a diffusion model, as tables that the ops gather from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from fastsds.ops.sds_loss import PredictionType

Weighting = Literal["uniform", "sds", "min_snr", "fantasia3d"]
MIN_SNR_GAMMA = 5.0  # Hang et al., ICCV 2023


@dataclass(frozen=True)
class NoiseSchedule:
    """`z_t = alpha_t z + sigma_t eps` for every training timestep, as the network's input sees it.

    Index 0 is the least noisy timestep. For variance-preserving schedules `alpha_t**2 + sigma_t**2 = 1`; for flow
    matching `alpha_t + sigma_t = 1`.
    """

    alpha: Float[Tensor, "timesteps"]
    """Signal scale."""
    sigma: Float[Tensor, "timesteps"]
    """Noise scale; positive."""
    model_timesteps: Shaped[Tensor, "timesteps"]
    """What the network is told at each timestep: the index itself, or `1000 sigma` for flow matching."""
    prediction_type: PredictionType = "epsilon"
    """What the network predicts."""
    _weights: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        shapes = {name: list(getattr(self, name).shape) for name in ("alpha", "sigma", "model_timesteps")}
        if len(shapes["alpha"]) != 1 or len({tuple(shape) for shape in shapes.values()}) != 1:
            raise ValueError(f"alpha, sigma, model_timesteps: expected one shape [timesteps], got {shapes}")
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"prediction_type: expected one of {get_args(PredictionType)}, got {self.prediction_type!r}"
            )
        if not (bool((self.sigma > 0).all()) and bool((self.alpha >= 0).all())):
            raise ValueError("alpha, sigma: expected alpha >= 0 and sigma > 0 at every timestep")

    def __len__(self) -> int:
        return len(self.alpha)

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """The training schedule of a diffusers scheduler.

        Read from `alphas_cumprod` (DDPM, DDIM, PNDM, Euler and the others trained on it; zero terminal SNR included)
        or from the shifted sigmas of flow matching. Inference settings (`set_timesteps`, Karras sigmas) change
        nothing. Euler's noisy sample is scaled as `scale_model_input` does, because that is the network's input.

        Raises:
            ValueError: a scheduler with neither, or a prediction type that is not supported.
        """
        name = type(scheduler).__name__
        if "FlowMatch" in name:
            fresh = type(scheduler).from_config(scheduler.config)
            sigma = fresh.sigmas[: fresh.config.num_train_timesteps].double().flip(0)
            times = fresh.timesteps[: fresh.config.num_train_timesteps].float().flip(0)
            return cls((1 - sigma).float(), sigma.float(), times, "flow")
        alpha_bar = getattr(scheduler, "alphas_cumprod", None)
        if alpha_bar is None:
            raise ValueError(
                f"scheduler: expected one with alphas_cumprod (DDPM, DDIM, PNDM, Euler, …) or a flow-matching one, "
                f"got {name}"
            )
        alpha_bar = torch.as_tensor(alpha_bar).double()
        prediction_type = scheduler.config.get("prediction_type", "epsilon")
        return cls(
            alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float(), torch.arange(len(alpha_bar)), prediction_type
        )

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its tables on `device`."""
        tables = {name: getattr(self, name).to(device) for name in ("alpha", "sigma", "model_timesteps")}
        return dataclasses.replace(self, **tables, _weights={})

    def weights(self, weighting: Weighting | Float[Tensor, "timesteps"] | str) -> Float[Tensor, "timesteps"]:
        """w(t) for every timestep, float32, on the schedule's device.

        With `alpha_bar = alpha² / (alpha² + sigma²)`:

        - `uniform`: 1 (the paper's, *stated*: there is none in its formula).
        - `sds`: `1 - alpha_bar`, DreamFusion's `sigma_t²`.
        - `min_snr`: `min(snr, 5) / snr`, Min-SNR in eps-space.
        - `fantasia3d`: `sqrt(alpha_bar) (1 - alpha_bar)`.

        Raises:
            ValueError: another name, or a tensor that is not `[timesteps]`.
        """
        if isinstance(weighting, Tensor):
            if weighting.shape != self.alpha.shape:
                raise ValueError(
                    f"weighting: expected [timesteps] = {list(self.alpha.shape)}, got {list(weighting.shape)}"
                )
            return weighting.to(self.alpha)
        if weighting not in self._weights:
            self._weights[weighting] = self._named_weights(weighting)
        return self._weights[weighting]

    def _named_weights(self, weighting: str) -> Tensor:
        snr = (self.alpha / self.sigma).square()
        alpha_bar = snr / (1 + snr)
        if weighting == "uniform":
            return torch.ones_like(snr)
        if weighting == "sds":
            return 1 - alpha_bar
        if weighting == "min_snr":
            return (MIN_SNR_GAMMA / snr).clamp(max=1)
        if weighting == "fantasia3d":
            return alpha_bar.sqrt() * (1 - alpha_bar)
        raise ValueError(f"weighting: expected one of {get_args(Weighting)} or a tensor, got {weighting!r}")
