"""`fastsds attributes`."""

from __future__ import annotations

from pathlib import Path

from fastsds.commands.configs import read_config, save_config
from fastsds.data import attributes
from fastsds.data.attributes import AttributesConfig

__all__ = ["AttributesConfig", "run_attributes"]


def run_attributes(config: AttributesConfig) -> None:
    """
    Raises:
        ValueError: `out` holds answers to another question, or of another model.
    """
    record = config.out.with_suffix(".config.yaml")
    if record.is_file() and _holds_answers(config.out):
        before = read_config(record, AttributesConfig, "attributes")
        for name in ("question", "model"):
            asked, now = getattr(before, name), getattr(config, name)
            if asked != now:
                raise ValueError(f"{name}: {config.out} holds answers of {asked!r}, got {now!r}; name another --out")
    try:
        attributes.run_attributes(config)
    finally:
        if _holds_answers(config.out):
            save_config(record, config, "attributes")


def _holds_answers(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0
