"""Contenders timed side by side: in every round each runs once, so that what disturbs the machine disturbs all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

OURS = "fastsds"
ROUND_SECONDS = 0.005
"""A round repeats a short contender until it has taken about this long."""
FEWEST_ROUNDS, MOST_ROUNDS = 5, 60
_L2_BYTES = 512 * 2**20
"""More than any GPU's cache, so that bandwidth is the memory's."""

Contender = Callable[[], Any]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(
    benchmark: Any, contenders: Mapping[str, Contender], record: Mapping[str, Any], total_seconds: float
) -> dict[str, Any]:
    """Times `fastsds` with pytest-benchmark, and the others between its rounds.

    Args:
        contenders: by name; `fastsds` is among them.
        record: what the result says of itself: suite, case, bars.
        total_seconds: about as long as all rounds together take.

    Returns:
        The record with each contender's median and least seconds per call, as it goes into `extra_info`.
    """
    single = {name: _warm_up(contender) for name, contender in contenders.items()}
    calls = {name: max(1, math.ceil(ROUND_SECONDS / duration)) for name, duration in single.items()}
    a_round = sum(single[name] * calls[name] for name in contenders)
    rounds = min(max(round(total_seconds / a_round), FEWEST_ROUNDS), MOST_ROUNDS) if total_seconds else 2
    times: dict[str, list[float]] = {name: [] for name in contenders}

    def run(name: str) -> None:
        for _ in range(calls[name]):
            contenders[name]()
        synchronize()

    def others() -> None:
        for name in contenders:
            if name != OURS:
                start = time.perf_counter()
                run(name)
                times[name].append((time.perf_counter() - start) / calls[name])

    benchmark.pedantic(run, args=(OURS,), setup=others, rounds=rounds)
    times[OURS] = [duration / calls[OURS] for duration in benchmark.stats.stats.data]
    result = {
        "bars": {},
        **record,
        "rounds": rounds,
        "contenders": {name: _summary(times[name]) for name in contenders},
    }
    if torch.cuda.is_available():
        for name, contender in contenders.items():
            result["contenders"][name]["peak_bytes"] = peak_bytes(contender)
    benchmark.extra_info["result"] = result
    return result


def capture(contender: Contender) -> Contender:
    """The contender as a CUDA graph, to be replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            contender()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        contender()
    return graph.replay


def bytes_per_second(contenders: Sequence[Contender], bytes_moved: int) -> float:
    """Of contenders that touch memory of their own, captured one after the other in a CUDA graph, the best of ten.

    Args:
        bytes_moved: by one of them.
    """
    kept: list[Any] = []

    def all_of_them() -> None:
        kept[:] = [contender() for contender in contenders]

    replay = capture(all_of_them)
    replay()
    durations = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        durations.append(begin.elapsed_time(end) / 1000)
    return len(contenders) * bytes_moved / min(durations)


def copies_to_exceed_cache(bytes_moved: int) -> int:
    """How many contenders with memory of their own keep one another out of the cache."""
    return min(max(2, math.ceil(_L2_BYTES / bytes_moved)), 64)


def copy_bytes_per_second() -> float:
    """Of a device-to-device copy of a gibibyte: one read and one write."""
    source, target = (torch.empty(2**28, device="cuda") for _ in range(2))
    return bytes_per_second([lambda: target.copy_(source)], 2 * source.nbytes)


def seconds(contender: Contender) -> float:
    """Of one call."""
    start = time.perf_counter()
    contender()
    synchronize()
    return time.perf_counter() - start


def interleaved(sides: Mapping[str, Contender], rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Median seconds and, on a GPU, peak memory of sides that run in turn; one that does not fit says so."""
    measured: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():
        try:
            side()
            measured[name] = {"peak_bytes": peak_bytes(side)} if device.type == "cuda" else {}
        except torch.OutOfMemoryError:
            measured[name] = {"out_of_memory": True}
            torch.cuda.empty_cache()
    fitting = {name: side for name, side in sides.items() if "out_of_memory" not in measured[name]}
    times: dict[str, list[float]] = {name: [] for name in fitting}
    for _ in range(rounds):
        for name, side in fitting.items():
            times[name].append(seconds(side))
    for name in fitting:
        measured[name]["median_s"] = statistics.median(times[name])
    return measured


def peak_bytes(contender: Contender) -> int:
    """Of device memory in one call, above what was held before."""
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def _warm_up(contender: Contender) -> float:
    """Seconds of a call, after those that compile and fill caches."""
    for _ in range(2):
        contender()
    synchronize()
    return min(seconds(contender) for _ in range(2))


def _summary(durations: Sequence[float]) -> dict[str, float]:
    return {"median_s": statistics.median(durations), "min_s": min(durations)}
