"""`fastsds attributes`."""

from __future__ import annotations

from fastsds.commands.configs import save_config
from fastsds.data import attributes
from fastsds.data.attributes import AttributesConfig

__all__ = ["AttributesConfig", "run_attributes"]


def run_attributes(config: AttributesConfig) -> None:
    attributes.run_attributes(config)
    save_config(config.out.with_suffix(".config.yaml"), config, "attributes")
