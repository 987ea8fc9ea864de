"""Where a CLIP model comes from, and loading it with its own preprocessing and tokenizer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastsds.clip.errors import ClipSourceError, one_line_errors
from fastsds.clip.identity import activation_of
from fastsds.clip.locate import TOYWORLD, Location, architecture_of, folder_of, locate, read_open_clip_config

Activation = Literal["auto", "gelu", "quickgelu"]
IDENTITY_KEY = "clip_identity"
"""In the metadata of safetensors files: the `ClipIdentity` of the model that the tensors belong to, as JSON."""
_ACTIVATIONS = {False: "GELU", True: "QuickGELU"}


class LoadedCLIP(NamedTuple):
    """What open_clip's factories give."""

    model: nn.Module
    """open_clip's `CLIP` or `CustomTextCLIP`, in evaluation mode."""
    preprocess: Callable[[Any], Tensor]
    """From a PIL image to float32 `[3, height, width]`."""
    tokenizer: Callable[..., Tensor]
    """From a list of texts to int64 `[texts, context_length]`."""


@dataclass(frozen=True)
class ClipSource:
    """A CLIP model by name, folder or hub id, with its own preprocessing and tokenizer."""

    name: str
    """An open_clip architecture such as ViT-B-32, an open_clip or transformers folder, a hub id (org/model), or
    toyworld, the small one that is shipped."""
    pretrained: str | None = None
    """Weights of an architecture: one of open_clip's tags, or a checkpoint file. Safetensors, or tensors alone."""
    activation: Activation = "auto"
    """In the transformer blocks; auto takes what is recorded for the weights, else what the architecture has."""
    cache_dir: Path | None = None
    """Where downloads go; the libraries' own folder by default."""
    trust_remote_code: bool = False
    """Lets a hub tokenizer run code of its own."""

    def __post_init__(self) -> None:
        if self.activation not in get_args(Activation):
            raise ClipSourceError(f"activation: expected one of {get_args(Activation)}, got {self.activation!r}")

    def load(self, device: str | torch.device = "cpu") -> LoadedCLIP:
        """The model in float32, in evaluation mode, its preprocessing and its tokenizer.

        Raises:
            ClipSourceError: no such name, tag, folder or file, weights that do not fit or cannot be read safely, an
                activation other than the recorded one, or a kind of model that is neither `CLIP` nor `CustomTextCLIP`.
        """
        import open_clip

        location = locate(self.name, self.pretrained, self.cache_dir)
        with one_line_errors(self._weights(location)):
            loaded = self._load_transformers(location) if location.kind == "transformers" else self._load(location)
        if not isinstance(loaded.model, open_clip.CLIP | open_clip.CustomTextCLIP):
            raise ClipSourceError(
                f"name: expected a model of open_clip's classes CLIP or CustomTextCLIP, "
                f"got {type(loaded.model).__name__} in {location.place}"
            )
        return loaded._replace(model=loaded.model.to(device).float().eval())

    def model_config(self) -> dict[str, Any]:
        """open_clip's `model_cfg` of the model that `load` gives, the activation included.

        Raises:
            ClipSourceError: as of `load`, as far as the configuration tells.
        """
        location = locate(self.name, self.pretrained, self.cache_dir)
        with one_line_errors(self._weights(location)):
            if location.kind == "transformers":
                from fastsds.clip.transformers_folder import read_config

                return read_config(location.place, cache_dir=self.cache_dir)
            config = self._own_config(location)
            return config | {"quick_gelu": self._quick_gelu(location, config)}

    def to_json(self) -> dict[str, Any]:
        """As JSON; folders and files by their absolute paths, so that it can be read from elsewhere."""
        document: dict[str, Any] = asdict(self)
        if architecture_of(self.name):
            if self.pretrained and Path(self.pretrained).is_file():
                document["pretrained"] = str(Path(self.pretrained).absolute())
        elif self.name not in ("", TOYWORLD) and (folder := folder_of(self.name)):
            document["name"] = str(folder.absolute())
        if self.cache_dir is not None:
            document["cache_dir"] = str(self.cache_dir.absolute())
        return document

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ClipSource:
        """
        Raises:
            ClipSourceError: a field that there is not, or no name.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(document.keys() - known):
            raise ClipSourceError(f"{unknown[0]}: expected one of {', '.join(sorted(known))}")
        if not isinstance(document.get("name"), str):
            raise ClipSourceError(f"name: expected the name of a CLIP model, got {document.get('name')!r}")
        cache_dir = document.get("cache_dir")
        return cls(**{**document, "cache_dir": None if cache_dir is None else Path(cache_dir)})

    def _weights(self, location: Location) -> str:
        return f"pretrained: {self.pretrained}" if self.pretrained else f"name: {location.place}"

    def _load_transformers(self, location: Location) -> LoadedCLIP:
        from fastsds.clip.transformers_folder import load_transformers

        loaded = LoadedCLIP(
            *load_transformers(location.place, cache_dir=self.cache_dir, trust_remote_code=self.trust_remote_code)
        )
        self._choose(activation_of(loaded.model) == "QuickGELU", location.place)
        return loaded

    def _load(self, location: Location) -> LoadedCLIP:
        """An architecture with weights, or an open_clip folder or hub id."""
        import open_clip

        config = self._own_config(location)
        if "multimodal_cfg" in config:  # known before gigabytes are fetched
            raise ClipSourceError(f"name: expected a model of two towers, got CoCa in {location.place}")
        quick_gelu = self._quick_gelu(location, config)
        if location.kind == "architecture" and quick_gelu != bool(config.get("quick_gelu")):
            why = "as asked" if self.activation != "auto" else f"with which its weights {self.pretrained} were trained"
            built, named = _ACTIVATIONS[quick_gelu], _ACTIVATIONS[not quick_gelu]
            warnings.warn(f"{location.place} is built with {built} in place of {named}, {why}", stacklevel=3)
        cache_dir = None if self.cache_dir is None else str(self.cache_dir)
        options: dict[str, Any] = {}
        if config.get("text_cfg", {}).get("hf_tokenizer_name"):
            # Also said where it is False: a folder's own configuration could ask for it.
            options["trust_remote_code"] = self.trust_remote_code
        with warnings.catch_warnings():
            # Said above, and settled by the argument.
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            model, preprocess = open_clip.create_model_from_pretrained(
                location.place, self.pretrained, cache_dir=cache_dir, quick_gelu=quick_gelu, weights_only=True
            )
        return LoadedCLIP(model, preprocess, open_clip.get_tokenizer(location.place, cache_dir=cache_dir, **options))

    def _own_config(self, location: Location) -> dict[str, Any]:
        import open_clip

        if location.kind == "architecture":
            return dict(open_clip.get_model_config(location.place))
        return read_open_clip_config(location.place, self.cache_dir)

    def _quick_gelu(self, location: Location, config: dict[str, Any]) -> bool:
        """What is recorded for the weights: with a tag, in a file of ours or in the configuration, in this order."""
        import open_clip

        recorded: bool | None = None
        if location.kind == "architecture":
            assert self.pretrained is not None
            tag = open_clip.get_pretrained_cfg(location.place, self.pretrained)
            recorded = bool(tag.get("quick_gelu")) if tag else _recorded_quick_gelu(Path(self.pretrained))
        return self._choose(config.get("quick_gelu") if recorded is None else recorded, self.pretrained or self.name)

    def _choose(self, recorded: bool | None, weights: str) -> bool:
        """
        Raises:
            ClipSourceError: another activation is asked for than is recorded.
        """
        asked = {"auto": None, "gelu": False, "quickgelu": True}[self.activation]
        if asked is not None and recorded is not None and asked != recorded:
            raise ClipSourceError(
                f"activation: {weights} was trained with {_ACTIVATIONS[recorded]}, got {self.activation}; GELU and "
                f"QuickGELU have the same weights but other features: use auto"
            )
        return bool(recorded if asked is None else asked)


def _recorded_quick_gelu(file: Path) -> bool | None:
    """What a checkpoint file that fastsds wrote says of its activation; None for others."""
    if file.suffix != ".safetensors":
        return None
    with safe_open(file, framework="pt") as checkpoint:
        identity = (checkpoint.metadata() or {}).get(IDENTITY_KEY)
    return None if identity is None else "QuickGELU" in json.loads(identity)["activation"]
