"""What a CLIP model is, in the few facts that decide whether tensors tuned on one fit another."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn


class ModelMismatchError(ValueError):
    """Tensors tuned on one model are loaded into another; the message names the difference."""


@dataclass(frozen=True)
class ClipIdentity:
    """Recorded in every checkpoint and compared on load."""

    architecture: str
    """Class of the model."""
    parameters: str
    """SHA-256 over the names and shapes of all parameters."""
    activation: str
    """Activation in the transformer's blocks. GELU and QuickGELU share every shape and give other features."""
    context_length: int
    image_size: int
    image_mean: tuple[float, ...]
    """Empty, as `image_std`, where the model was built without open_clip's factory, which notes them on it."""
    image_std: tuple[float, ...]

    @classmethod
    def of(cls, clip: nn.Module) -> ClipIdentity:
        """Reads an open_clip `CLIP` or `CustomTextCLIP`."""
        visual: Any = clip.visual
        size = visual.image_size
        return cls(
            architecture=type(clip).__name__,
            parameters=fingerprint(clip),
            activation=activation_of(clip),
            context_length=int(clip.context_length),  # type: ignore[arg-type]
            image_size=int(size[0] if isinstance(size, tuple | list) else size),
            image_mean=tuple(getattr(visual, "image_mean", ())),
            image_std=tuple(getattr(visual, "image_std", ())),
        )

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def require_match(self, recorded: dict[str, Any]) -> None:
        """Compares with an identity read from a checkpoint.

        Raises:
            ModelMismatchError: a fact differs; the message names it, both values and what to do.
        """
        for name, value in self.to_json().items():
            if recorded.get(name) == value:
                continue
            advice = (
                "GELU and QuickGELU have the same weights but other features: create the model with the recorded one"
                if name == "activation"
                else "load it into the model that it was trained on"
            )
            raise ModelMismatchError(
                f"checkpoint: {name} was {recorded.get(name)!r} when it was written and is {value!r} in this model; "
                f"{advice}"
            )


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the names and shapes of all parameters."""
    text = "\n".join(f"{name} {list(tensor.shape)}" for name, tensor in module.named_parameters())
    return hashlib.sha256(text.encode()).hexdigest()


def activation_of(clip: nn.Module) -> str:
    """The kinds of activation in the towers' blocks: `GELU`, `QuickGELU`, … joined by `+` where there are several."""
    kinds = {
        type(module).__name__ + ("-tanh" if getattr(module, "approximate", "none") == "tanh" else "")
        for module in clip.modules()
        if type(module).__name__ in ("GELU", "QuickGELU", "SiLU")
    }
    return "+".join(sorted(kinds)) or "none"
