"""Where the randomness of a loss comes from: seeds from a generator, timesteps from a strategy."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


class SeedStream:
    """Fresh seeds for the ops, drawn on a device from a `torch.Generator`.

    The state is part of a checkpoint: a resumed run draws the seeds that the killed one would have drawn.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def next(self, device: torch.device) -> Int[Tensor, ""]:
        """One int64 on `device`, not yet drawn before."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return torch.randint(2**63 - 1, (), generator=self._generators[device], device=device)

    def state_dict(self) -> dict[str, Tensor]:
        """The generators' states by device name, each as bytes; those not used yet follow from the seed."""
        states = {str(device): generator.get_state() for device, generator in self._generators.items()}
        return {"seed": torch.tensor(list(self._seed.to_bytes(8, "little", signed=True)), dtype=torch.uint8), **states}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on where `state_dict` was taken."""
        states = dict(state)
        self._seed = int.from_bytes(bytes(states.pop("seed").tolist()), "little", signed=True)
        self._generators = {torch.device(name): torch.Generator(name) for name in states}
        for device, generator in self._generators.items():
            generator.set_state(state[str(device)].cpu())
