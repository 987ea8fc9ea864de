"""The build: its switches and what it says, the CUDA sources on every architecture, and the wheel as a user gets it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import fastsds

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="there is nothing to build beside a wheel")


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """With no switch set but those given."""
    switches = ("FASTSDS_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "NVCC_THREADS", "CUDA_HOME", "CXX")
    clean = {name: value for name, value in os.environ.items() if name not in switches}
    return subprocess.run(command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True)


@pytest.fixture
def fake_nvcc(tmp_path: Path) -> Path:
    """A CUDA folder whose nvcc only knows its release, that of torch."""
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {torch.version.cuda}, V1'\n")
    nvcc.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"FASTSDS_CUDA": "yes"}, "FASTSDS_CUDA: expected auto, 0 or 1, got 'yes'"),
        ({"NVCC_THREADS": "many"}, "NVCC_THREADS: expected a whole number of at least 1, got 'many'"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS: expected a whole number of at least 1, got '0'"),
        ({"FASTSDS_CUDA": "1", "CXX": "no-such-c++"}, "FASTSDS_CUDA=1: no C++ compiler (no-such-c++) was found"),
    ],
)
def test_a_bad_switch_is_an_error(switches: dict[str, str], message: str) -> None:
    tried = run(sys.executable, "setup.py", "--version", **switches)
    assert tried.returncode != 0
    assert message in tried.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch without CUDA")
def test_cuda_that_cannot_be_is_an_error_that_names_what_is_missing(fake_nvcc: Path) -> None:
    def tried(**switches: str) -> str:
        return run(sys.executable, "setup.py", "--version", FASTSDS_CUDA="1", **switches).stderr

    assert f"FASTSDS_CUDA=1: no nvcc of CUDA {torch.version.cuda} was found" in tried(CUDA_HOME=str(fake_nvcc / "bin"))
    message = tried(CUDA_HOME=str(fake_nvcc), TORCH_CUDA_ARCH_LIST="Ampere")
    assert "TORCH_CUDA_ARCH_LIST: expected a list such as '8.0;9.0+PTX', got 'Ampere'" in message
    assert f"CUDA_HOME: expected libcudart.so in lib64 or lib, got {fake_nvcc}" in tried(CUDA_HOME=str(fake_nvcc))
    (fake_nvcc / "bin" / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.2, V9.2.1'\n")
    message = tried(CUDA_HOME=str(fake_nvcc))
    assert f"PyTorch is built for CUDA {torch.version.cuda}, but the nvcc of {fake_nvcc} is of CUDA 9.2" in message


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("compiler", "no C++ compiler (no-such-c++) was found at install time"),
        ("torch", "PyTorch was not there at install time"),
    ],
)
def test_what_is_missing_leaves_a_package_that_says_so(missing: str, problem: str, tmp_path: Path) -> None:
    environment = {"CXX": "no-such-c++"}
    if missing == "torch":
        (tmp_path / "hidden").mkdir()
        (tmp_path / "hidden" / "torch.py").write_text("raise ImportError\n")
        environment = {"PYTHONPATH": str(tmp_path / "hidden")}
    built = run(sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path / "base", **environment)
    assert built.returncode == 0, built.stderr
    (package,) = (tmp_path / "base").glob("lib*/fastsds")
    assert json.loads((package / "_build.json").read_text()) == {"torch": None, "cuda": None, "problem": problem}
    assert (package / "kernels" / "__init__.py").exists()
    assert not list(package.glob("_C*"))
    version = run(sys.executable, "setup.py", "--version", **environment).stdout.strip()
    assert version == fastsds.__version__


def nvcc_home() -> Path | None:
    """The registry's nvcc beside torch, else the one that is installed."""
    found = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin/nvcc"))
    installed = os.environ.get("CUDA_HOME") or (shutil.which("nvcc") and str(Path(shutil.which("nvcc")).parents[1]))
    return found[0].parents[1] if found else Path(installed) if installed else None


@pytest.mark.slow
@pytest.mark.skipif(nvcc_home() is None, reason="no nvcc; `make test` installs one")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_sources_compile_without_a_spill(architecture: int, tmp_path: Path) -> None:
    """`EM_CUDA` in the ELF header of the machine code; registers as the assembler reports them."""
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    assert sources
    for source in sources:
        cubin = tmp_path / f"{source.stem}.cubin"
        compiled = run(
            nvcc_home() / "bin" / "nvcc", "-O3", "-fmad=false", "-std=c++17", "-cubin", f"-arch=sm_{architecture}",
            "-Xptxas=-v", source, "-o", cubin,
        )  # fmt: skip
        assert compiled.returncode == 0, compiled.stderr
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled.stderr)
        assert len(spills) >= 4  # one for each strategy
        assert {bytes_ for spill in spills for bytes_ in spill} == {"0"}
        assert int.from_bytes(cubin.read_bytes()[18:20], "little") == 190


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CPU wheel, built from a copy of the source, so that nothing is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    kept_out = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__", "_build.json")
    shutil.copytree(ROOT, folder / "source", ignore=kept_out)
    built = run(
        sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index",
        "--wheel-dir", folder, folder / "source", cwd=folder, FASTSDS_CUDA="0", MAX_JOBS="2",
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_wheel_carries_what_it_must(wheel: Path) -> None:
    release = ".".join(torch.__version__.split(".")[:2])
    assert wheel.name.startswith(f"fastsds-{fastsds.__version__}+torch{release}.cpu-cp")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("fastsds/py.typed", "fastsds/kernels/add_noise.py", "fastsds/_build.json"):
        assert name in names
    assert any(re.fullmatch(r"fastsds/_C\..*\.so", name) for name in names)
    weights = (ROOT / "fastsds/toyworld/weights").rglob("*.safetensors")
    assert {str(path.relative_to(ROOT)) for path in weights} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/"))]
    record = json.loads(zipfile.ZipFile(wheel).read("fastsds/_build.json"))
    assert record == {"torch": torch.__version__, "cuda": None, "problem": None}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_wheel_serves_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    """An environment of its own that sees the dependencies of this one, but not its editable install."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    installed = run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path
    )
    assert installed.returncode == 0, installed.stderr
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.copytree(ROOT / "tests", tmp_path / "outside" / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "outside")
    for code, expected in (
        ("import fastsds; print(fastsds.__file__)", str(packages)),
        ("from fastsds.ops import _dispatch; print(_dispatch.choose('sds_loss', 'cpu').backend)", "cpp"),
    ):
        assert run(python, "-c", code, cwd=tmp_path / "outside").stdout.startswith(expected)
    parts = ("tests/ops", "tests/toyworld/test_weights.py")
    smoke = run(python, "-m", "pytest", "-q", "-m", "smoke", "-p", "no:cacheprovider", *parts, cwd=tmp_path / "outside")
    assert smoke.returncode == 0, smoke.stdout + smoke.stderr
    assert int(re.search(r"(\d+) passed", smoke.stdout)[1]) >= 10
