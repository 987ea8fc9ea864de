"""Reports of a run: one self-contained HTML page with its pictures inside, and JSON."""

from __future__ import annotations

import base64
import html
import io
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastsds.training.checkpoint import atomic_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #dde3ea; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } footer { margin-top: 3rem; color: #66727f; font-size: 13px }
"""


class Page:
    """An HTML page that is built from the top down."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        lines = [_row("th", header), *(_row("td", row) for row in rows)]
        self._parts.append(f"<table>{''.join(lines)}</table>")

    def figure(self, figure: Figure, description: str) -> None:
        """A matplotlib figure; the description stands for it where it is not seen."""
        data = base64.b64encode(png(figure)).decode()
        self._parts.append(f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">')

    def render(self) -> str:
        body = "\n".join(self._parts)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n"
            f"<footer>{html.escape(machine_line())}</footer>\n</body></html>\n"
        )


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    alignment = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, alignment, *rows)) + "\n"


def machine_line() -> str:
    """Device, threads and versions, as every report states them."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("fastsds", "torch", "open_clip_torch", "diffusers"))
    return f"{device}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {libraries}"


def write_report(folder: Path, files: dict[str, str | bytes | dict[str, Any]]) -> None:
    """Writes the files of a report, JSON for dictionaries, all or none; an earlier report in `folder` is replaced."""
    with atomic_folder(folder) as staging:
        for name, content in files.items():
            if isinstance(content, dict):
                content = json.dumps(content, indent=1) + "\n"
            (staging / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _row(cell: str, values: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{html.escape(value)}</{cell}>" for value in values) + "</tr>"
