"""What a CLIP model's name stands for: an architecture of open_clip, a folder or a hub id."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastsds.clip.errors import ClipSourceError, first_line, one_line_errors
from fastsds.hub import NotOnHubError, is_fetched, require_on_hub

TOYWORLD = "toyworld"
_SHIPPED = Path(__file__).parents[1] / "toyworld" / "weights" / "clip"
OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG = "open_clip_config.json", "config.json"


class Location(NamedTuple):
    kind: Literal["architecture", "open_clip", "transformers"]
    place: str
    """As the library of that kind takes it: an architecture, `local-dir:…` or `hf-hub:…`; a folder or a hub id."""


def locate(name: str, pretrained: str | None, cache_dir: Path | None) -> Location:
    """Looks at the architectures, the disk and the hub, in this order.

    Raises:
        ClipSourceError: there is no such architecture, tag, file, folder or hub id.
    """
    if not name:
        raise ClipSourceError("name: expected an open_clip architecture, a folder or a hub id, got none")
    if (architecture := architecture_of(name)) is not None:
        _require_weights(architecture, pretrained)
        return Location("architecture", architecture)
    folder = folder_of(name)
    if pretrained is not None and (folder or name.startswith("hf-hub:")):
        raise ClipSourceError(f"pretrained: {name} brings its own weights; expected None, got {pretrained!r}")
    if folder is not None:
        if (folder / OPEN_CLIP_CONFIG).is_file():
            return Location("open_clip", f"local-dir:{folder}")
        if (folder / TRANSFORMERS_CONFIG).is_file():
            return Location("transformers", str(folder))
        raise ClipSourceError(
            f"name: {folder} holds neither {OPEN_CLIP_CONFIG} nor {TRANSFORMERS_CONFIG}; expected an open_clip or a "
            f"transformers CLIPModel folder"
        )
    if re.fullmatch(r"(hf-hub:)?[\w.-]+/[\w.-]+", name):
        return _locate_on_hub(name.removeprefix("hf-hub:"), cache_dir)
    raise _unknown(name)


def architecture_of(name: str) -> str | None:
    """The name under which open_clip knows an architecture, which may be written `ViT-B/32`; None for others."""
    import open_clip

    architecture = name.replace("/", "-")
    return architecture if architecture in open_clip.list_models() else None


def folder_of(name: str) -> Path | None:
    """The folder that a name which is no architecture stands for; None where there is none."""
    if name == TOYWORLD:
        return _SHIPPED
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    return folder if folder.is_dir() else None


def read_open_clip_config(place: str, cache_dir: Path | None) -> dict[str, Any]:
    """The `model_cfg` of an open_clip folder or hub id.

    Raises:
        ClipSourceError: it is not JSON, or something else.
    """
    schema, identifier = place.split(":", 1)
    path = Path(identifier) / OPEN_CLIP_CONFIG
    if schema == "hf-hub":
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(identifier, OPEN_CLIP_CONFIG, cache_dir=cache_dir))
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["model_cfg"])
    except (ValueError, KeyError, TypeError) as error:
        raise ClipSourceError(
            f"name: {path} is no open_clip configuration: expected JSON with model_cfg ({first_line(error)})"
        ) from error


def _require_weights(architecture: str, pretrained: str | None) -> None:
    import open_clip

    if pretrained and (open_clip.get_pretrained_cfg(architecture, pretrained) or Path(pretrained).is_file()):
        return
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
    if pretrained is None:
        raise ClipSourceError(f"pretrained: expected a tag or a checkpoint file, got None; tags: {tags}")
    raise ClipSourceError(f"pretrained: {pretrained!r} is neither a tag of {architecture} nor a file; tags: {tags}")


def _locate_on_hub(identifier: str, cache_dir: Path | None) -> Location:
    from huggingface_hub.errors import EntryNotFoundError

    on_hub = Location("open_clip", f"hf-hub:{identifier}")
    with one_line_errors(f"name: {identifier}"):
        if is_fetched(identifier, OPEN_CLIP_CONFIG, cache_dir):
            return on_hub
        try:
            require_on_hub(identifier, OPEN_CLIP_CONFIG)
        except NotOnHubError as error:
            absent = isinstance(error.__cause__, EntryNotFoundError)
            if absent or is_fetched(identifier, TRANSFORMERS_CONFIG, cache_dir):
                return Location("transformers", identifier)
            raise ClipSourceError(
                f"name: {identifier} is no folder, nothing of it was fetched, and the hub does not give it: {error}"
            ) from error
    return on_hub


def _unknown(name: str) -> ClipSourceError:
    import open_clip

    if Path(name).is_file():
        return ClipSourceError(f"name: {name} is a file; expected its architecture here, and the file as pretrained")
    if "/" in name or name.startswith("local-dir:"):
        return ClipSourceError(f"name: there is no folder {name.removeprefix('local-dir:')}")
    architectures = {architecture.lower(): architecture for architecture in open_clip.list_models()}
    close = [architectures[key] for key in difflib.get_close_matches(name.lower(), architectures, 5, 0.5)]
    return ClipSourceError(
        f"name: {name!r} is no open_clip architecture, folder or hub id (org/model); "
        + (f"close: {', '.join(close)}" if close else "open_clip.list_models() names the architectures")
    )
