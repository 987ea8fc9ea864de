"""`fastsds info`: versions, devices, and what serves each op."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from fastsds.ops import _dispatch, _extension

_LIBRARIES = ("fastsds", "torch", "triton", "open_clip_torch", "diffusers", "transformers", "accelerate", "xformers")


@dataclass(frozen=True)
class InfoConfig:
    """Print versions, devices, and for every op the backend that serves it and why."""


def run_info(_: InfoConfig) -> None:
    console = Console()
    console.print(f"Python {platform.python_version()} on {platform.platform()}")
    for name in _LIBRARIES:
        try:
            console.print(f"{name} {version(name)}", highlight=False)
        except PackageNotFoundError:
            console.print(f"{name} is not installed", highlight=False)
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        console.print(f"CUDA {torch.version.cuda}: {torch.cuda.get_device_name()}", highlight=False)
    else:
        console.print("no CUDA device is available")
    console.print(_extension.describe(), highlight=False, soft_wrap=True)
    table = Table("op", "device", "backend", "why")
    for name in _dispatch.ops():
        for device in devices:
            choice = _dispatch.choose(name, device)
            table.add_row(name, device, choice.backend, choice.reason)
    console.print(table)
