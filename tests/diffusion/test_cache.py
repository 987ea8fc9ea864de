"""The cache on disk: what it gives back, what it drops, what it survives, and several processes at once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastsds.diffusion import TensorCache
from fastsds.diffusion.cache import content_key

WRITER = """
import sys, zlib, torch
from fastsds.diffusion import TensorCache
folder, name, max_bytes, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
cache = TensorCache(folder, max_bytes)
print("ready", flush=True)
sys.stdin.readline()
hits = 0
for i in range(rounds):
    for key in (f"shared {i % 5}", f"{name} {i}"):
        value = torch.arange(512) + zlib.crc32(key.encode())
        cache.put(key, {"value": value})
        for asked in (key, f"shared {(i + 2) % 5}"):
            found = cache.get(asked)
            hits += found is not None
            assert found is None or torch.equal(found["value"], torch.arange(512) + zlib.crc32(asked.encode())), asked
print(hits, flush=True)
"""


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.safetensors") if not path.name.startswith(".")]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


def _ledger(cache: TensorCache) -> int:
    return int((cache.folder / "bytes").read_text())


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    return TensorCache(tmp_path / "cache", 10**6)


@pytest.fixture
def used_at(cache: TensorCache) -> Callable[[str, float], None]:
    """Dates the last use of a key, in seconds before now."""

    def date(key: str, ago: float) -> None:
        stamp = time.time() - ago
        os.utime(cache._path(key), (stamp, stamp))

    return date


@pytest.mark.parametrize(
    "tensors",
    [
        {"embeddings": torch.randn(5, 8), "pooled": torch.randn(3).bfloat16()},
        {"half": torch.randn(2, 3).half(), "double": torch.randn(4).double(), "integers": torch.arange(7)},
        {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "view": torch.randn(6, 6).T[::2]},
        {},
    ],
)
def test_gives_back_what_was_put(cache: TensorCache, tensors: dict[str, Tensor]) -> None:
    key = "an astronaut / on *a* horse … " * 40
    assert cache.get(key) is None
    cache.put(key, tensors)
    found = TensorCache(cache.folder, 10**6).get(key)
    assert found is not None
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert cache.get(key + "!") is None


def test_files_are_genuine_safetensors_and_counted(cache: TensorCache) -> None:
    for i in range(5):
        cache.put(str(i), {"value": torch.full((10,), i)})
    assert sorted(load_file(path)["value"][0].item() for path in _files(cache.folder)) == [0, 1, 2, 3, 4]
    assert _ledger(cache) == _bytes(cache.folder)
    assert {path.name for path in cache.folder.rglob("*") if path.is_file()} == {
        "bytes",
        *(path.name for path in _files(cache.folder)),
    }


def test_put_replaces(cache: TensorCache) -> None:
    cache.put("a", {"value": torch.zeros(100)})
    cache.put("a", {"value": torch.ones(3)})
    found = cache.get("a")
    assert found is not None
    assert torch.equal(found["value"], torch.ones(3))
    assert len(_files(cache.folder)) == 1
    assert _ledger(cache) == _bytes(cache.folder)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    "corrupt",
    [
        _truncate,
        _flip,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(os.urandom(500)),
        lambda path: path.write_text('{"value": [1, 2]}'),
        lambda path: save_file({"value": torch.arange(40)}, path),
        lambda path: save_file({"value": torch.arange(40), "__crc32__": torch.zeros(2)}, path),
    ],
    ids=["truncated", "flipped bit", "empty", "noise", "JSON", "no checksum", "wrong checksum"],
)
def test_corrupt_file_is_a_miss_and_is_replaced(cache: TensorCache, corrupt: Callable[[Path], None]) -> None:
    cache.put("a", {"value": torch.arange(40)})
    cache.put("b", {"value": torch.arange(40)})
    corrupt(cache._path("a"))
    assert cache.get("a") is None
    assert cache.get("b") is not None
    cache.put("a", {"value": torch.arange(40)})
    found = cache.get("a")
    assert found is not None
    assert torch.equal(found["value"], torch.arange(40))


def _entry_bytes(folder: Path) -> int:
    probe = TensorCache(folder, 10**6)
    probe.put("probe", {"value": torch.zeros(1000)})
    return _bytes(folder)


def test_least_recently_used_are_dropped(tmp_path: Path, cache: TensorCache, used_at: Callable) -> None:
    size = _entry_bytes(tmp_path / "probe")
    cache.max_bytes = 10 * size
    for i in range(10):
        cache.put(str(i), {"value": torch.full((1000,), float(i))})
        used_at(str(i), 1000 - i)
    assert cache.get("0") is not None  # the oldest is used again
    cache.put("new", {"value": torch.zeros(1000)})
    assert [cache.get(str(i)) is not None for i in range(10)] == [True, False, False, *[True] * 7]
    assert cache.get("new") is not None
    assert _ledger(cache) == _bytes(cache.folder) == 9 * size


def test_bound_holds_whatever_the_sizes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    cache = TensorCache(tmp_path, 50_000)
    for size in torch.randint(1, 6000, (200,), generator=generator).tolist():
        cache.put(str(size % 60), {"value": torch.zeros(size)})
        assert _ledger(cache) == _bytes(tmp_path) <= 50_000
    assert _bytes(tmp_path) > 25_000


def test_entry_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, 5000)
    cache.put("small", {"value": torch.zeros(10)})
    cache.put("large", {"value": torch.zeros(5000)})
    assert cache.get("large") is None
    assert cache.get("small") is not None


def test_folder_is_rarely_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for every tenth of the bound that is written."""
    cache, listings = TensorCache(tmp_path, 100_000), []
    make_room = cache._make_room
    monkeypatch.setattr(cache, "_make_room", lambda *args: listings.append(1) or make_room(*args))
    for i in range(1000):
        cache.put(str(i), {"value": torch.zeros(50)})
    written = 1000 * _bytes(tmp_path) / len(_files(tmp_path))
    assert 1 < len(listings) <= 1 + written / 10_000


@pytest.mark.parametrize("ledger", [None, "", "gibberish", "0" * 20])
def test_lost_ledger_is_counted_anew(cache: TensorCache, ledger: str | None) -> None:
    """A sum that is only too low, which no crash leaves, holds until the next listing."""
    for i in range(6):
        cache.put(str(i), {"value": torch.zeros(1000)})
    path = cache.folder / "bytes"
    if ledger is None:
        path.unlink()
    else:
        path.write_text(ledger)
    cache.put("new", {"value": torch.zeros(1000)})
    if ledger != "0" * 20:
        assert _ledger(cache) == _bytes(cache.folder)
    cache.max_bytes = 3000
    cache.put("small", {"value": torch.zeros(10)})
    assert _ledger(cache) == _bytes(cache.folder) <= 3000


def test_what_killed_writers_left_is_removed(cache: TensorCache, used_at: Callable) -> None:
    cache.put("a", {"value": torch.zeros(10)})
    shard = cache._path("a").parent
    old, fresh = shard / f".{1:032x}", shard / f".{2:032x}"
    for path in (old, fresh):
        path.write_bytes(b"half a file")
    os.utime(old, (0, 0))
    (cache.folder / "bytes").unlink()
    cache.put("b", {"value": torch.zeros(10)})
    assert not old.exists()
    assert fresh.exists()
    assert cache.get("a") is not None
    assert cache.get("b") is not None


def test_what_is_not_the_caches_own_is_neither_counted_nor_dropped(tmp_path: Path) -> None:
    others = [tmp_path / name for name in ("photos/1.jpg", "ab/model.safetensors", "ab/.profile", "notes.txt")]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(5000))
        os.utime(path, (0, 0))
    cache = TensorCache(tmp_path, 3000)
    for number in range(20):
        cache.put(str(number), {"value": torch.zeros(100)})
    assert all(path.exists() for path in others)
    assert cache.get("19") is not None and cache.get("0") is None
    assert _ledger(cache) == _bytes(tmp_path) - 5000 <= 3000


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Three write shared and own keys at once, far more than fits; at every moment the bound holds."""
    entry = 4096 + 300
    cache = TensorCache(tmp_path / "cache", 20 * entry)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(cache.folder), name, str(cache.max_bytes), "150"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for name in ("first", "second", "third")
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None and writer.stdin is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        with cache._locked_ledger():  # files appear and vanish under the lock alone
            assert _bytes(cache.folder) <= cache.max_bytes
        time.sleep(0.01)
    for writer in writers:
        output, errors = writer.communicate()
        assert writer.returncode == 0, errors
        assert errors == ""
        assert int(output) > 150  # of 600
    assert _ledger(cache) == _bytes(cache.folder) <= cache.max_bytes
    assert len(_files(cache.folder)) >= 10
    assert not list(cache.folder.rglob(".*"))


def test_full_disk_costs_a_warning(cache: TensorCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        with open(path, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    cache.put("a", {"value": torch.zeros(3)})
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match=r"cache: could not write to .*No space left on device; going on without"):
        cache.put("a", {"value": torch.ones(3)})
    found = cache.get("a")
    assert found is not None
    assert torch.equal(found["value"], torch.zeros(3))
    assert not list(cache.folder.rglob(".*"))


def test_a_folder_that_is_read_only_is_read_and_costs_one_warning(
    cache: TensorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put("a", {"value": torch.ones(3)})

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    found = cache.get("a")
    assert found is not None and torch.equal(found["value"], torch.ones(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for key in ("b", "c", "d"):
            cache.put(key, {"value": torch.ones(3)})
    assert [str(warning.message) for warning in caught] == [
        f"cache: could not write to {cache.folder}: Read-only file system; going on without"
    ]


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_refused_bound(tmp_path: Path, max_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"max_bytes: expected at least 1, got {max_bytes}"):
        TensorCache(tmp_path, max_bytes)


def test_content_key() -> None:
    assert content_key(b"abc") == hashlib.sha256(b"bytes 3\nabc").hexdigest()
    tensor = torch.arange(6.0)
    keys = [
        content_key(*parts)
        for parts in (
            ["abc"], [b"abc"], ["ab", "c"], ["a", "bc"], ["abc", ""], [tensor], [tensor.view(2, 3)],
            [tensor.view(2, 3).T], [tensor.double()], [tensor + 1], [tensor.numpy().tobytes()],
        )
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert content_key(tensor.view(2, 3).T) == content_key(tensor.view(2, 3).T.contiguous())
