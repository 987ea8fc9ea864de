"""The index of a tar file: where each member's data lies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastsds.data.files import DataError

_BLOCK = 512  # bytes
_END = bytes(_BLOCK)
_GZIP = b"\x1f\x8b"
_REGULAR, _LONG_NAME, _EXTENDED = (b"0", b"\0"), b"L", b"x"


class TarMember(NamedTuple):
    """A regular file in a tar file."""

    name: str
    offset: int
    """Of its data, in bytes."""
    size: int


def tar_members(file: BinaryIO, path: Path) -> Iterator[TarMember]:
    """The regular files of an uncompressed tar file (POSIX `ustar` and `pax`, GNU), in its order.

    Python's `tarfile` takes about five times as long, minutes where a data set has hundreds of shards. The position of
    `file` may be moved between members.

    Args:
        path: of the file, for messages.

    Raises:
        DataError: it is truncated, which a missing end mark shows as well, or is no such tar file.
    """
    length = file.seek(0, 2)
    file.seek(0)
    if file.read(2) == _GZIP:
        raise DataError(f"path: {path} is compressed, and images are read where they lie in a shard: gunzip it first")
    offset, long_name, extended = 0, b"", b""
    while True:
        file.seek(offset)
        header = file.read(_BLOCK)
        if header == _END:
            return
        if len(header) < _BLOCK:
            raise _truncated(path, length)
        if header[257:262] != b"ustar":
            raise DataError(f"path: {path} is no uncompressed tar file: no header at byte {offset}")
        size = _number(header[124:136])
        kind = header[156:157]
        name = _text(header[:100])
        if header[263:265] == b"00" and header[345] and kind in _REGULAR:  # GNU has other things in a prefix's place
            name = _text(header[345:500]) + b"/" + name
        if kind in _REGULAR:
            name = _record(extended, b"path") or long_name or name
            size = _number(_record(extended, b"size"), 10) or size
        data = offset + _BLOCK
        if data + size > length:
            raise _truncated(path, length)
        if kind == _LONG_NAME:
            long_name = _text(file.read(size))
        elif kind == _EXTENDED:
            extended = file.read(size)
        else:
            long_name = extended = b""
            if kind in _REGULAR:
                yield TarMember(name.decode("utf-8", "replace"), data, size)
        offset = data + -(-size // _BLOCK) * _BLOCK


def _truncated(path: Path, length: int) -> DataError:
    return DataError(f"path: {path} is truncated: it ends at byte {length} of more; fetch or write it anew")


def _number(field: bytes, base: int = 8) -> int:
    """Digits, or GNU's big-endian bytes below a set first bit; 0 where it is neither."""
    if field[:1] >= b"\x80":
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0"), base)
    except ValueError:
        return 0


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _record(extended: bytes, key: bytes) -> bytes:
    """The value of a pax record `length key=value\\n`, empty where there is none."""
    while key in extended:
        digits = extended.partition(b" ")[0]
        length = _number(digits, 10)
        name, _, value = extended[len(digits) + 1 : length - 1].partition(b"=")
        if name == key:
            return value
        extended = extended[max(length, 1) :]
    return b""
