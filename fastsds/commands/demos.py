"""`fastsds demo` and `fastsds intcoop-demo`."""

from __future__ import annotations

from fastsds.commands.configs import FILE_NAME, save_config
from fastsds.toyworld import demo, intcoop_demo
from fastsds.toyworld.demo import DemoConfig
from fastsds.toyworld.intcoop_demo import IntCoOpDemoConfig

__all__ = ["DemoConfig", "IntCoOpDemoConfig", "run_demo", "run_intcoop_demo"]


def run_demo(config: DemoConfig) -> None:
    demo.run_demo(config)
    save_config(config.out / FILE_NAME, config, "demo")


def run_intcoop_demo(config: IntCoOpDemoConfig) -> None:
    intcoop_demo.run_intcoop_demo(config)
    save_config(config.out / FILE_NAME, config, "intcoop-demo")
