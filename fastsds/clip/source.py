"""Where a CLIP model comes from, and loading it with its own preprocessing and tokenizer."""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastsds.clip.errors import ClipSourceError, first_line, one_line_errors
from fastsds.clip.identity import activation_of

Activation = Literal["auto", "gelu", "quickgelu"]
_Kind = Literal["architecture", "open_clip", "transformers"]
TOYWORLD = "toyworld"
_SHIPPED = Path(__file__).parents[1] / "toyworld" / "weights" / "clip"
IDENTITY_KEY = "clip_identity"
"""In the metadata of safetensors files: the `ClipIdentity` of the model that the tensors belong to, as JSON."""


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

        kind, place = self._locate()
        with one_line_errors(self._weights(place)):
            if kind == "transformers":
                from fastsds.clip.transformers_folder import load_transformers

                loaded = load_transformers(place, cache_dir=self.cache_dir, trust_remote_code=self.trust_remote_code)
                self._quick_gelu(activation_of(loaded.model) == "QuickGELU", f"{place} was trained")
            else:
                loaded = self._load_open_clip(kind, place)
        if not isinstance(loaded.model, open_clip.CLIP | open_clip.CustomTextCLIP):
            raise ClipSourceError(
                f"name: expected a model of open_clip's classes CLIP or CustomTextCLIP, "
                f"got {type(loaded.model).__name__} in {place}"
            )
        return LoadedCLIP(loaded.model.to(device).float().eval(), loaded.preprocess, loaded.tokenizer)

    def model_config(self) -> dict[str, Any]:
        """open_clip's `model_cfg` of the model that `load` gives, the activation included."""
        kind, place = self._locate()
        with one_line_errors(self._weights(place)):
            if kind == "transformers":
                from fastsds.clip.transformers_folder import read_config

                return read_config(place, cache_dir=self.cache_dir)
            config = self._open_clip_config(kind, place)
        return config | {"quick_gelu": self._open_clip_activation(kind, place, config)}

    def to_json(self) -> dict[str, Any]:
        """As JSON; folders and files by their absolute paths, so that it can be read from elsewhere."""
        document: dict[str, Any] = asdict(self)
        for name, value in document.items():
            place = name in ("name", "pretrained") and value not in (None, TOYWORLD) and Path(value).exists()
            if isinstance(value, Path) or place:
                document[name] = str(Path(value).absolute())
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

    def _weights(self, place: str) -> str:
        return f"pretrained: {self.pretrained}" if self.pretrained else f"name: {place}"

    def _locate(self) -> tuple[_Kind, str]:
        """What kind of source it is, and the architecture, folder (`local-dir:…`) or hub id (`hf-hub:…`)."""
        import open_clip

        name = f"local-dir:{_SHIPPED}" if self.name == TOYWORLD else self.name
        schema, identifier = re.match(r"(local-dir:|hf-hub:)?(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
        architecture = self.name.replace("/", "-")
        if schema is None and architecture in open_clip.list_models():
            if self.pretrained is None:
                raise ClipSourceError(
                    f"pretrained: expected a tag or a checkpoint file, got None; {_tags(architecture)}"
                )
            return "architecture", architecture
        if self.pretrained is not None and (schema or Path(identifier).is_dir()):
            raise ClipSourceError(
                f"pretrained: {self.name} brings its own weights; expected None, got {self.pretrained!r}"
            )
        if schema != "hf-hub:" and Path(identifier).is_dir():
            if (Path(identifier) / "open_clip_config.json").is_file():
                return "open_clip", f"local-dir:{identifier}"
            if (Path(identifier) / "config.json").is_file():
                return "transformers", identifier
            raise ClipSourceError(
                f"name: {identifier} holds neither open_clip_config.json nor config.json; expected an open_clip or a "
                f"transformers CLIPModel folder"
            )
        if schema != "local-dir:" and re.fullmatch(r"[\w.-]+/[\w.-]+", identifier):
            return self._locate_on_hub(identifier)
        if schema or "/" in self.name or Path(identifier).suffix:
            raise ClipSourceError(f"name: there is no folder {identifier}")
        close = difflib.get_close_matches(self.name.lower(), [name.lower() for name in open_clip.list_models()], 5, 0.5)
        similar = [name for name in open_clip.list_models() if name.lower() in close]
        raise ClipSourceError(
            f"name: {self.name!r} is no open_clip architecture, folder or hub id (org/model); "
            f"{'close: ' + ', '.join(similar) if similar else 'open_clip.list_models() names the architectures'}"
        )

    def _locate_on_hub(self, identifier: str) -> tuple[_Kind, str]:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        with one_line_errors(f"name: {identifier}"):
            try:
                hf_hub_download(identifier, "open_clip_config.json", cache_dir=self.cache_dir)
            except EntryNotFoundError:
                return "transformers", identifier
        return "open_clip", f"hf-hub:{identifier}"

    def _load_open_clip(self, kind: _Kind, place: str) -> LoadedCLIP:
        import open_clip

        config = self._open_clip_config(kind, place)
        if kind == "architecture":
            self._require_weights(place)
        quick_gelu = self._open_clip_activation(kind, place, config)
        cache_dir = None if self.cache_dir is None else str(self.cache_dir)
        options: dict[str, Any] = {}
        if config.get("text_cfg", {}).get("hf_tokenizer_name"):
            # Also said where it is False: a folder's own configuration could ask for it.
            options["trust_remote_code"] = self.trust_remote_code
        with warnings.catch_warnings():
            # Settled here: the activation that is passed is the recorded one.
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            model, preprocess = open_clip.create_model_from_pretrained(
                place, self.pretrained, cache_dir=cache_dir, quick_gelu=quick_gelu, weights_only=True
            )
        return LoadedCLIP(model, preprocess, open_clip.get_tokenizer(place, cache_dir=cache_dir, **options))

    def _open_clip_config(self, kind: _Kind, place: str) -> dict[str, Any]:
        import open_clip
        from huggingface_hub import hf_hub_download

        if kind == "architecture":
            return dict(open_clip.get_model_config(place))
        schema, identifier = place.split(":", 1)
        path = Path(identifier) / "open_clip_config.json"
        if schema == "hf-hub":
            path = Path(hf_hub_download(identifier, "open_clip_config.json", cache_dir=self.cache_dir))
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))["model_cfg"])
        except (ValueError, KeyError, TypeError) as error:
            raise ClipSourceError(
                f"name: {path} is no open_clip configuration: expected JSON with model_cfg ({first_line(error)})"
            ) from error

    def _open_clip_activation(self, kind: _Kind, place: str, config: dict[str, Any]) -> bool:
        """Whether it is QuickGELU."""
        import open_clip

        own: bool | None = config.get("quick_gelu")
        if kind != "architecture":
            return self._quick_gelu(own, f"{place} was trained")
        assert self.pretrained is not None
        tag = open_clip.get_pretrained_cfg(place, self.pretrained)
        if tag:
            recorded: bool | None = bool(tag.get("quick_gelu", False))
        else:
            recorded = _recorded_quick_gelu(Path(self.pretrained))
        chosen = self._quick_gelu(own if recorded is None else recorded, f"{self.pretrained} was trained")
        if chosen != bool(own):
            why = "as asked" if recorded is None else f"with which its weights {self.pretrained} were trained"
            warnings.warn(
                f"{place} is built with {_ACTIVATIONS[chosen]} in place of {_ACTIVATIONS[bool(own)]}, {why}",
                stacklevel=4,
            )
        return chosen

    def _quick_gelu(self, recorded: bool | None, of: str) -> bool:
        """
        Raises:
            ClipSourceError: another one is asked for than is recorded.
        """
        asked = {"auto": None, "gelu": False, "quickgelu": True}[self.activation]
        if asked is not None and recorded is not None and asked != recorded:
            raise ClipSourceError(
                f"activation: {of} with {_ACTIVATIONS[recorded]}, got {self.activation}; GELU and QuickGELU have the "
                f"same weights but other features: use auto"
            )
        return bool(recorded if asked is None else asked)

    def _require_weights(self, architecture: str) -> None:
        import open_clip

        assert self.pretrained is not None
        if open_clip.get_pretrained_cfg(architecture, self.pretrained) or Path(self.pretrained).is_file():
            return
        raise ClipSourceError(
            f"pretrained: {self.pretrained!r} is neither a tag of {architecture} nor a file; {_tags(architecture)}"
        )


_ACTIVATIONS = {False: "GELU", True: "QuickGELU"}


def _recorded_quick_gelu(file: Path) -> bool | None:
    """What a checkpoint file that fastsds wrote says of its activation; None for others."""
    if file.suffix != ".safetensors":
        return None
    with safe_open(file, framework="pt") as checkpoint:
        identity = (checkpoint.metadata() or {}).get(IDENTITY_KEY)
    return None if identity is None else "QuickGELU" in json.loads(identity)["activation"]


def _tags(architecture: str) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    return f"tags: {', '.join(tags)}" if tags else "it has no tags: name a checkpoint file"
