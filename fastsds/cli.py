"""The command line: `fastsds demo`, `fastsds intcoop-demo`, `fastsds attributes`, `fastsds info`."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fastsds.data.attributes import AttributesConfig, run_attributes
from fastsds.ops import _dispatch, _extension
from fastsds.toyworld.demo import DemoConfig, run_demo
from fastsds.toyworld.intcoop_demo import IntCoOpDemoConfig, run_intcoop_demo

_LIBRARIES = ("fastsds", "torch", "triton", "open_clip_torch", "diffusers", "transformers", "accelerate", "xformers")


def demo(config: Annotated[DemoConfig, tyro.conf.arg(name="")]) -> None:
    """Distil the toy teacher into the toy CLIP and report what it brought; a few minutes, no download."""
    run_demo(config)


def intcoop_demo(config: Annotated[IntCoOpDemoConfig, tyro.conf.arg(name="")]) -> None:
    """Prompt-tune the toy CLIP with IntCoOp and its baselines and compare them; a few minutes, no download."""
    run_intcoop_demo(config)


def attributes(config: Annotated[AttributesConfig, tyro.conf.arg(name="")]) -> None:
    """Ask BLIP-2 for an attribute of every training image, as IntCoOp trains on."""
    run_attributes(config)


def info() -> None:
    """Print versions, devices, and for every op the backend that serves it and why."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; an error the user can mend is one line on standard error and exit status 1."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"demo": demo, "intcoop-demo": intcoop_demo, "attributes": attributes, "info": info},
            args=arguments,
            prog="fastsds",
        )
    except (ValueError, RuntimeError, OSError) as error:
        print(f"fastsds: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastsds: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
