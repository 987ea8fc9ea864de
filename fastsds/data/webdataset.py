"""webdataset's shards: tar files whose members `name.jpg` and `name.txt` are one image and its caption.

The shards are indexed once, so that their pairs are rows like those of a file: any order can be read, and a stopped
run goes on in the middle of an epoch. An image is read where it lies in its shard, by a file opened for it alone.
"""

from __future__ import annotations

import glob
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fastsds.data.files import DataError
from fastsds.data.images import IMAGE_SUFFIXES, Pairs
from fastsds.data.tar import TarMember, tar_members


@dataclass(frozen=True)
class ShardImage:
    """An encoded image in a shard."""

    shard: Path
    member: str
    offset: int
    """In bytes, of its data in the shard."""
    size: int

    @property
    def name(self) -> str:
        return f"{self.shard}:{self.member}"

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class ShardImages(Sequence[ShardImage]):
    """The images of all shards, kept as numbers: millions fit into memory."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = shards
        self._members: list[str] = []
        self._places = array("q")  # shard, offset and size of each

    def append(self, shard: int, member: TarMember) -> None:
        self._members.append(member.name)
        self._places.extend((shard, member.offset, member.size))

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        shard, offset, size = self._places[3 * index : 3 * index + 3]
        return ShardImage(self._shards[shard], self._members[index], offset, size)


def read_webdataset(pattern: str, caption_key: str = "caption", *, progress: bool = True) -> Pairs:
    """Indexes shards.

    A sample is what shares a name up to its first dot: an image, and a caption in `.txt`, or one or a list of them in
    `.json` below `caption_key`. Samples that lack either are left out, as open_clip leaves them.

    Args:
        pattern: a shard, a folder of them, or several by braces (`{000..009}`, `{a,b}`) and wildcards.

    Raises:
        DataError: no such shards, a shard that cannot be read or is truncated, a caption that is none, or no pairs.
    """
    shards = expand_shards(pattern)
    images = ShardImages(shards)
    captions: list[Sequence[str]] = []
    for number, shard in enumerate(tqdm(shards, unit="shard", desc="index", disable=not progress or len(shards) < 2)):
        for member, texts in _read_shard(shard, caption_key):
            images.append(number, member)
            captions.append(texts)
    if not captions:
        raise DataError(
            f"path: expected images with captions (.txt, or {caption_key!r} in .json) in {pattern}, got none"
        )
    return Pairs(images, captions)


def expand_shards(pattern: str) -> list[Path]:
    """The shards that a pattern names, those of a wildcard in the order of their names.

    Raises:
        DataError: a named shard that does not exist, or a wildcard or folder without any.
    """
    shards: list[Path] = []
    for name in _expand_braces(pattern):
        if Path(name).is_file():
            found = [Path(name)]
        else:
            found = sorted(map(Path, glob.glob(f"{glob.escape(name)}/*.tar" if Path(name).is_dir() else name)))
        if not found:
            raise DataError(f"path: expected shards (*.tar) at {name}, got none")
        shards += found
    return shards


def _expand_braces(pattern: str) -> Iterator[str]:
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        yield pattern
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if span is None:
        choices = braces[1].split(",")
    else:
        choices = [f"{number:0{len(span[1])}}" for number in range(int(span[1]), int(span[2]) + 1)]
    for choice in choices:
        yield from _expand_braces(pattern[: braces.start()] + choice + pattern[braces.end() :])


def _read_shard(path: Path, caption_key: str) -> Iterator[tuple[TarMember, tuple[str, ...]]]:
    images: dict[str, TarMember] = {}
    captions: dict[str, tuple[str, ...]] = {}
    try:
        with path.open("rb") as shard:
            for member in tar_members(shard, path):
                name, suffix = _split(member.name)
                if suffix in IMAGE_SUFFIXES:
                    images.setdefault(name, member)
                elif suffix == ".txt" or (suffix == ".json" and name not in captions):
                    shard.seek(member.offset)
                    texts = _captions(f"{path}:{member.name}", shard.read(member.size), suffix, caption_key)
                    if texts:
                        captions[name] = texts
    except OSError as error:
        raise DataError(f"path: could not read {path}: {error.strerror}") from error
    for name, member in images.items():
        if name in captions:
            yield member, captions[name]


def _split(member: str) -> tuple[str, str]:
    """The sample's name, up to the first dot after the folders, and the rest."""
    folder, _, file = member.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}/{stem}", f".{suffix.lower()}"


def _captions(name: str, content: bytes, suffix: str, caption_key: str) -> tuple[str, ...]:
    """Empty where there is none."""
    try:
        document = {caption_key: content.decode("utf-8-sig")} if suffix == ".txt" else json.loads(content)
    except ValueError as error:
        raise DataError(f"path: {name} cannot be read as a caption: {error}") from error
    found = document.get(caption_key) if isinstance(document, dict) else None
    texts = found if isinstance(found, list) else [found]
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
