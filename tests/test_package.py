"""The package as a user meets it: import, surface, structure, README."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastsds

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fastsds.__file__).parent

# A file imports from its own floor or a lower one.
FLOORS = (
    ("ops",),
    ("diffusion", "clip"),
    ("sdsclip", "intcoop"),
    ("data", "evaluation", "training"),
    ("toyworld",),
    ("commands",),
    ("cli",),
)
README_SNIPPETS = [
    snippet
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    if "toyworld" in snippet
]


def run_python(code: str, cwd: Path | None = None) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=cwd).stdout


def test_every_public_name_can_be_reached() -> None:
    for name in fastsds.__all__:
        assert getattr(fastsds, name) is not None
    assert set(fastsds.__all__) <= set(dir(fastsds))


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Distillery'"):
        fastsds.Distillery  # noqa: B018


def test_import_is_quick_and_asks_for_no_model_library() -> None:
    code = """
import sys, time, torch
start = time.process_time()
import fastsds, fastsds.ops
took = time.process_time() - start
heavy = {"diffusers", "open_clip", "transformers", "accelerate", "triton", "matplotlib"} & (set(sys.modules) - before)
print(took, sorted(heavy))
"""
    # torch itself may import triton; only what fastsds adds counts.
    code = code.replace("start = time", "before = set(sys.modules)\nstart = time", 1)
    took, heavy = run_python(code).split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(took) < 1  # of the CPU, so that neither other programs nor the disk count


@pytest.mark.parametrize("missing", ["diffusers", "triton", "open_clip", "xformers"])
def test_ops_work_where_a_library_is_missing(missing: str) -> None:
    code = f"""
import sys, torch
sys.modules[{missing!r}] = None
import fastsds
z = torch.zeros(1, 2, 2)
one = torch.ones(1, 1)
print(fastsds.ops.add_noise(z, one, one, torch.tensor(1)).shape)
"""
    assert run_python(code).strip() == "torch.Size([1, 1, 2, 2])"


def test_no_import_goes_to_a_higher_floor() -> None:
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    upward = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in floor_of:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("fastsds."):
                continue
            target = (node.module or "").split(".")[1]
            if floor_of.get(target, 0) > floor_of[parts[0]]:
                upward.append(f"{'/'.join(parts)} imports {node.module}")
    assert upward == []


def test_the_readme_has_snippets_to_run() -> None:
    assert len(README_SNIPPETS) >= 3


@pytest.mark.parametrize("snippet", README_SNIPPETS, ids=range(len(README_SNIPPETS)))
def test_readme_snippets_run_as_written(snippet: str, tmp_path: Path) -> None:
    run_python(snippet, cwd=tmp_path)


def test_readme_commands_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make ([a-z-]+)", readme, flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_no_machine_path_is_in_the_shipped_weights() -> None:
    for path in (PACKAGE / "toyworld" / "weights").rglob("*.json"):
        assert not re.search(r'"_name_or_path"|"(/[\w.-]+){2}', path.read_text(encoding="utf-8")), path
