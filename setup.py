"""What pyproject.toml cannot say: the extension `fastsds._C`, the version that names its torch, `kernels/`.

Switches, all of them environment variables:

| variable | meaning |
|---|---|
| `FASTSDS_CUDA` | CUDA kernels: `auto` (default) where torch has CUDA and its nvcc is found; `0` none; `1` or fail |
| `TORCH_CUDA_ARCH_LIST` | `8.0;9.0+PTX`: GPU architectures; torch's own by default, with PTX for the last |
| `MAX_JOBS` | compiler processes at a time (ninja) |
| `NVCC_THREADS` | architectures that one nvcc compiles at a time |

Without torch or a C++ compiler the package installs all the same, in plain PyTorch, and `fastsds info` says what was
missing. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ROOT = Path(__file__).parent
RECORD = "_build.json"  # read by fastsds/ops/_extension.py
# Contraction and fast-math off: every machine makes the same noise and timesteps.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-Wno-maybe-uninitialized",
]
NVCC_FLAGS = ["-O3", "-fmad=false"]


@dataclass
class Plan:
    """What is built, for which torch; `problem` says why there is no extension."""

    torch: str | None = None
    cuda: str | None = None
    problem: str | None = None
    extensions: list[Extension] = field(default_factory=list)
    commands: dict[str, Any] = field(default_factory=dict)


def cuda_switch() -> str:
    value = os.environ.get("FASTSDS_CUDA", "auto")
    if value not in ("auto", "0", "1"):
        raise SetupError(f"FASTSDS_CUDA: expected auto, 0 or 1, got {value!r}")
    return value


def positive_switch(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise SetupError(f"{name}: expected a whole number of at least 1, got {value!r}")
    return int(value)


def nvcc_release(home: str | None) -> str | None:
    """`major.minor` of the nvcc under a CUDA folder."""
    nvcc = Path(home or "", "bin", "nvcc")
    if home is None or not nvcc.is_file():
        return None
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", printed)[1]


def missing_for_cuda(torch_cuda: str | None, home: str | None) -> str | None:
    """Why CUDA kernels cannot be built here, or None."""
    if torch_cuda is None:
        return "this PyTorch is a build without CUDA"
    release = nvcc_release(home)
    if release is None:
        return f"no nvcc of CUDA {torch_cuda} was found under CUDA_HOME or on PATH"
    if release.split(".")[0] != torch_cuda.split(".")[0]:
        return f"PyTorch is built for CUDA {torch_cuda}, but the nvcc of {home} is of CUDA {release}"
    return None


def architectures(torch_list: list[str]) -> list[str]:
    """`["8.0", "9.0+PTX"]`, from TORCH_CUDA_ARCH_LIST or from torch's `sm_80`, `sm_90`."""
    value = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if value:
        listed = re.split(r"[;\s]+", value.strip(" ;"))
    else:
        numbers = [re.fullmatch(r"sm_(\d+)(\d\w?)", name) for name in torch_list]
        listed = [f"{number[1]}.{number[2]}" for number in numbers if number]
        listed[-1:] = [f"{last}+PTX" for last in listed[-1:]]
    if not listed or not all(re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", name) for name in listed):
        raise SetupError(f"TORCH_CUDA_ARCH_LIST: expected a list such as '8.0;9.0+PTX', got {value!r}")
    return listed


def gencode_flags(listed: list[str]) -> list[str]:
    flags = []
    for name in listed:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def plan() -> Plan:
    switch, threads = cuda_switch(), positive_switch("NVCC_THREADS")
    positive_switch("MAX_JOBS")
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        torch = None
    if torch is None:
        problem = "PyTorch was not there at install time"
    elif shutil.which(cpp_extension.get_cxx_compiler().split()[0]) is None:
        problem = f"no C++ compiler ({cpp_extension.get_cxx_compiler()}) was found at install time"
    else:
        problem = None
    if problem is not None:
        if switch == "1":
            raise SetupError(f"FASTSDS_CUDA=1: {problem}")
        return Plan(problem=problem)

    missing = "not asked for" if switch == "0" else missing_for_cuda(torch.version.cuda, cpp_extension.CUDA_HOME)
    if missing is not None and switch == "1":
        raise SetupError(f"FASTSDS_CUDA=1: {missing}")
    extension = cpp_extension.CppExtension(
        "fastsds._C",
        sources("*.cpp", without="*_cuda.cpp"),
        depends=sources("*.h"),
        extra_compile_args={"cxx": [*CXX_FLAGS, *openmp_flags()], "nvcc": NVCC_FLAGS},
    )
    if missing is None:
        add_cuda(
            extension, Path(cpp_extension.CUDA_HOME), architectures(torch._C._cuda_getArchFlags().split()), threads
        )

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.force = True  # what was built for another torch or other switches looks up to date

    return Plan(
        torch.__version__, torch.version.cuda if missing is None else None, None, [extension], {"build_ext": Build}
    )


def sources(pattern: str, *, without: str = "") -> list[str]:
    """Paths from here, which setuptools insists on."""
    found = sorted(path.relative_to(ROOT) for path in ROOT.glob(f"csrc/{pattern}"))
    return [str(path) for path in found if not path.match(without or "/")]


def openmp_flags() -> list[str]:
    """`at::parallel_for` is OpenMP where torch is; its runtime comes with torch, so that there is one in a process."""
    import torch

    return ["-fopenmp"] if sys.platform == "linux" and "OpenMP" in torch.__config__.parallel_info() else []


def add_cuda(extension: Extension, home: Path, listed: list[str], threads: int | None) -> None:
    libraries = [path for folder in ("lib64", "lib") for path in sorted((home / folder).glob("libcudart.so*"))]
    if not libraries:
        raise SetupError(f"CUDA_HOME: expected libcudart.so in lib64 or lib, got {home}")
    extension.sources += [*sources("*_cuda.cpp"), *sources("*.cu")]
    extension.include_dirs.append(str(home / "include"))
    extension.libraries += ["c10_cuda", "torch_cuda"]
    # Named in full: the registry's runtime comes without the link that -lcudart looks for.
    extension.extra_link_args += [f"-L{libraries[0].parent}", f"-l:{libraries[0].name}"]
    extension.extra_compile_args["cxx"] += ["-DFASTSDS_WITH_CUDA", f"-DFASTSDS_ARCHITECTURES={','.join(listed)}"]
    extension.extra_compile_args["nvcc"] = [
        *NVCC_FLAGS, *gencode_flags(listed), *([f"--threads={threads}"] if threads else [])
    ]  # fmt: skip


def version(built: Plan) -> str:
    """The package's version, and the torch and CUDA that its extension is for: `0.1.0+torch2.14.cu130`."""
    base = re.search(r'^__version__ = "(.+)"', (ROOT / "fastsds/__init__.py").read_text(encoding="utf-8"), re.M)[1]
    if built.torch is None:
        return base
    torch_release = ".".join(built.torch.split(".")[:2])
    return f"{base}+torch{torch_release}.{'cu' + built.cuda.replace('.', '') if built.cuda else 'cpu'}"


PLAN = plan()


class BuildPyWithRecord(build_py):
    """Leaves the record of the build beside the modules, where it can be read without loading the extension."""

    def run(self) -> None:
        super().run()
        folder = ROOT / "fastsds" if self.editable_mode else Path(self.build_lib, "fastsds")
        folder.mkdir(parents=True, exist_ok=True)
        record = {"torch": PLAN.torch, "cuda": PLAN.cuda, "problem": PLAN.problem}
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


setup(
    version=version(PLAN),
    packages=[*find_packages(include=["fastsds*"]), "fastsds.kernels"],
    package_dir={"fastsds.kernels": "kernels"},
    ext_modules=PLAN.extensions,
    cmdclass={"build_py": BuildPyWithRecord, **PLAN.commands},
)
