"""Options and fixtures of the suites."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import timing
from benchmarks.cases import BANDWIDTH_CASE, BAR_CASE, CASES, TINY_CASE, Case, Inputs, make_inputs

BANDWIDTH_SHARE = 0.75
"""Of the copy bandwidth, which a kernel at `BANDWIDTH_CASE` has to reach."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastsds benchmarks")
    group.addoption("--extent", choices=("full", "bars", "tiny"), default="full", help="all, the bars, or a smoke test")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--threads", type=int, default=2, help="CPU threads")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "bar: states a bar that the library has to meet")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--extent") != "bars":
        return
    dropped = [item for item in items if item.get_closest_marker("bar") is None]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    extent = metafunc.config.getoption("--extent")
    # Bandwidth is a GPU's bar.
    bars = (BAR_CASE, BANDWIDTH_CASE) if metafunc.config.getoption("--device") == "cuda" else (BAR_CASE,)
    cases = {"full": CASES, "bars": bars, "tiny": (TINY_CASE,)}[extent]
    marked = [pytest.param(case, marks=pytest.mark.bar) if case in bars else case for case in cases]
    metafunc.parametrize("case", marked, ids=str)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session", autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def inputs(case: Case, device: torch.device) -> Inputs:
    return make_inputs(case, device)


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., dict[str, Any]]:
    """`timing.compare` for this test, at the length that was asked for."""
    seconds = 0.0 if request.config.getoption("--extent") == "tiny" else 1.5

    def run(contenders: dict[str, timing.Contender], **record: Any) -> dict[str, Any]:
        return timing.compare(benchmark, contenders, record, seconds)

    return run


@pytest.fixture(scope="session")
def copy_bytes_per_second() -> float:
    return timing.copy_bytes_per_second()


@pytest.fixture
def report_bandwidth(benchmark: Any, copy_bytes_per_second: float) -> Callable[..., None]:
    """Measures the bandwidth of a contender that is made once for every copy of the inputs, and writes it down."""

    def report(
        suite: str, case: Case, inputs: Inputs, make: Callable[[Inputs], timing.Contender], bytes_moved: int
    ) -> None:
        contenders = [make(inputs.clone()) for _ in range(timing.copies_to_exceed_cache(bytes_moved))]
        achieved = timing.bytes_per_second(contenders, bytes_moved)
        share = achieved / copy_bytes_per_second
        bar = {"needed_share": BANDWIDTH_SHARE, "met": share >= BANDWIDTH_SHARE} if case == BANDWIDTH_CASE else {}
        benchmark.extra_info["bandwidth"] = {
            "suite": suite, "case": str(case), "bytes_moved": bytes_moved, "bytes_per_second": achieved,
            "copy_bytes_per_second": copy_bytes_per_second, "share": share, **bar,
        }  # fmt: skip
        benchmark.pedantic(contenders[0], rounds=1)

    return report
