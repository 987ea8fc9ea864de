"""Tensors kept on disk between runs, in a folder that several processes share and that does not grow beyond a bound."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_CHECKSUM = "__crc32__"
_LEDGER, _DIGITS = "bytes", 20
_SHARD, _ENTRY = re.compile(r"[0-9a-f]{2}"), re.compile(r"[0-9a-f]{64}\.safetensors|\.[0-9a-f]{32}")
_ROOM = 0.1  # of the bound, made at once when it is reached, so that few puts have to list the folder
_ABANDONED_SECONDS = 3600.0


class TensorCache:
    """Named tensors by key, one safetensors file each; the least recently used are dropped first.

    Processes may read and write the same folder at once: a file appears whole or not at all, and the sum of the
    sizes is kept under a lock. A file that cannot be read, or whose checksum is wrong, is a miss, and the next `put`
    of its key replaces it. A disk that refuses costs a warning, not the run.

    Args:
        folder: made if it does not exist.
        max_bytes: bound on the files' sizes together. Every process that is writing may have one file beside it.

    Raises:
        ValueError: a bound below 1.
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path | str, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes: expected at least 1, got {max_bytes}")
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cache: could not make the folder {self.folder}: {error.strerror}") from error

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of `key`, on the CPU, or None."""
        path = self._path(key)
        try:
            tensors = load(path.read_bytes())
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        with suppress(OSError):  # of another's file, or on a disk that is read only
            os.utime(path)
        checksum = tensors.pop(_CHECKSUM, None)
        return tensors if checksum is not None and torch.equal(checksum, _checksum(tensors)) else None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps `tensors`, in place of any that `key` had. What is larger than the whole bound is not kept."""
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        data = save({**contiguous, _CHECKSUM: _checksum(contiguous)})
        if len(data) > self.max_bytes:
            return
        path = self._path(key)
        partial = path.with_name(f".{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(exist_ok=True)
            partial.write_bytes(data)
            with self._locked_ledger() as ledger:
                grown = len(data) - _size(path)
                total = _read_total(ledger)
                if total is None or total + grown > self.max_bytes:
                    total = self._make_room(path, len(data))
                else:
                    total += grown
                # Before the rename: a process killed between the two leaves a sum that is too high, not too low.
                _write_total(ledger, total)
                path.unlink(missing_ok=True)  # a rename onto a file would wait for the disk
                os.replace(partial, path)
        except OSError as error:
            # The same words every time, so that Python shows them once.
            warnings.warn(f"cache: could not write to {self.folder}: {error.strerror}; going on without", stacklevel=2)
        finally:
            with suppress(OSError):
                partial.unlink()

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    @contextmanager
    def _locked_ledger(self) -> Iterator[int]:
        ledger = os.open(self.folder / _LEDGER, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(ledger, fcntl.LOCK_EX)
            yield ledger
        finally:
            os.close(ledger)

    def _make_room(self, path: Path, size: int) -> int:
        """Drops old files for `size` bytes at `path`, if there is need; returns the sum with them, newly counted."""
        files, total = [], size
        for entry in self._entries():
            try:
                status = entry.stat()
                if entry.name.startswith("."):
                    if status.st_mtime < time.time() - _ABANDONED_SECONDS:
                        os.unlink(entry)
                elif entry.path != str(path):
                    files.append((status.st_mtime_ns, status.st_size, entry.path))
                    total += status.st_size
            except FileNotFoundError:
                continue
        if total > self.max_bytes:
            files.sort(reverse=True)
            while files and total > (1 - _ROOM) * self.max_bytes:
                _, dropped, name = files.pop()
                Path(name).unlink(missing_ok=True)
                total -= dropped
        return total

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        """Only what is named as the cache names its own: other things in the folder are not its to drop."""
        with os.scandir(self.folder) as shards:
            for shard in shards:
                if _SHARD.fullmatch(shard.name) and shard.is_dir():
                    with os.scandir(shard) as entries:
                        yield from (entry for entry in entries if _ENTRY.fullmatch(entry.name))


def content_key(*parts: bytes | str | Tensor) -> str:
    """SHA-256 over the parts in their order, in hexadecimal; of tensors their dtype, shape and bytes."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            data: bytes | memoryview = _bytes(part)
            kind = f"{part.dtype} {list(part.shape)}"
        else:
            data = part.encode() if isinstance(part, str) else part
            kind = type(part).__name__
        digest.update(f"{kind} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(_bytes(tensors[name]), zlib.crc32(name.encode(), checksum))
    return torch.tensor(checksum)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read_total(ledger: int) -> int | None:
    try:
        return int(os.pread(ledger, _DIGITS, 0))
    except ValueError:
        return None


def _write_total(ledger: int, total: int) -> None:
    """Of fixed width, because a file that is cut before it is written is flushed to disk at every close."""
    os.pwrite(ledger, f"{total:0{_DIGITS}d}".encode(), 0)
