"""The documentation builds without a warning, says what was measured, and its commands and examples run as written."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import report
from fastsds.cli import COMMANDS
from fastsds.commands.configs import parse

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What the config file of a run holds at least, by the command that wrote it.
CONFIGS = {
    "distill": {"clip": {"name": "toyworld"}, "captions": {"path": "captions.json"}},
    "intcoop": {"clip": {"name": "toyworld"}, "data": {"images": "images"}},
}


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """Strict: a broken link, a missing anchor, a page outside the navigation and an unknown name in the API fail."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    api = (tmp_path / "site" / "api" / "ops" / "index.html").read_text(encoding="utf-8")
    assert 'id="fastsds.ops.sds_loss.sds_loss"' in api
    kernels = (tmp_path / "site" / "kernels" / "index.html").read_text(encoding="utf-8")
    plots = re.findall(r'<img [^>]*src="\.\./([^"]+)"', kernels)
    assert len(plots) == 2
    assert [plot for plot in plots if not (tmp_path / "site" / plot).is_file()] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []


def commands(text: str) -> Iterator[list[str]]:
    """The words of every line that starts fastsds, the shell's variables that the text sets in their places."""
    variables: dict[str, str] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if assigned := re.fullmatch(r'\s*(\w+)="([^"]*)"', line) or re.fullmatch(r"\s*for (\w+) in (\S+) .*", line):
            variables[assigned[1]] = assigned[2]  # of a loop the first
        started = re.match(r"\s*(?:\.venv/bin/|accelerate launch .* -m )?fastsds (.*)", line)
        if started:
            known = re.sub(r"\$(\w+)", lambda found: variables.get(found[1], found[0]), started[1])
            yield shlex.split(known, comments=True)


def documented() -> list[list[str]]:
    """Those of the pages' shell blocks, and of every command's help."""
    texts = [block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.S)]
    for command in COMMANDS.values():
        config = getattr(import_module(f"fastsds.commands.{command.module}"), command.config)
        texts.append(inspect.cleandoc(config.__doc__))
    return [words for text in texts for words in commands(text)]


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_commands_have_the_options_that_the_pages_give_them(words: list[str], tmp_path: Path) -> None:
    name = next(name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS)
    rest = words[len(name.split()) :]
    if "--config" in rest:
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
        rest[rest.index("--config") + 1] = str(file)
    command = COMMANDS[name]
    kind = getattr(import_module(f"fastsds.commands.{command.module}"), command.config)
    assert isinstance(parse(kind, rest, command=name), kind)


def test_there_are_commands_to_check() -> None:
    assert {name for words in documented() for name in COMMANDS if words[: len(name.split())] == name.split()} == {
        *COMMANDS
    }


def test_the_kernels_page_has_the_recorded_benchmarks() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text("utf-8")
    plot = re.search(r"benchmarks/results/(.*threads)\.png", page)
    assert plot is not None
    recorded = json.loads((report.RESULTS / f"{plot[1]}.json").read_text("utf-8"))
    assert [line for line in report.tables(recorded).splitlines() if line not in page] == []
    readme = (ROOT / "README.md").read_text("utf-8")
    bars = [report.ratio(timing, baseline) for timing in recorded["timings"] for baseline in timing["bars"]]
    assert bars
    assert [f"{figure:.1f}x" for figure in bars if f" {figure:.1f}x " not in readme] == []


def test_the_pages_and_the_readme_have_the_same_figures() -> None:
    rows = [line for line in PAGES[0].read_text("utf-8").splitlines() if re.match(r"\| .*\d \[\d", line)]
    pages = "".join(page.read_text("utf-8") for page in PAGES[1:])
    assert rows
    assert [row for row in rows if row not in pages] == []


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_examples_run_as_written(example: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.strip()


def test_there_are_two_examples() -> None:
    assert len(EXAMPLES) == 2
