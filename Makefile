PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NVCC := $(VENV)/.nvcc
SOURCES := $(wildcard csrc/*)
INSTALL := $(BIN)/python -m pip install --progress-bar on
# GPU architectures take minutes to compile: they are left out of a machine that has no GPU.
FASTSDS_CUDA ?= $(if $(shell command -v nvidia-smi),auto,0)
# PyTorch's and CUDA's libraries come with PyTorch.
AUDITWHEEL := auditwheel repair --wheel-dir dist --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcuda*'
CUDA_ARCHITECTURES ?= 8.0;8.6;8.9;9.0;10.0;12.0+PTX

.PHONY: install demo test lint format docs weights wheel wheel-cuda bench verify-gpu clean

install: $(INSTALLED)  ## Make the virtual environment and install everything into it.

$(INSTALLED): pyproject.toml setup.py $(SOURCES)
	@echo "Setting up $(VENV): a few minutes, most of them for PyTorch's download and the compiler."
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "setuptools>=70" wheel ninja torch
	FASTSDS_CUDA=$(FASTSDS_CUDA) $(INSTALL) --no-build-isolation --editable ".[dev]"
	@touch $@

# The compiler of the CUDA that torch is built for; about 300 MB.
$(NVCC): $(INSTALLED)
	$(INSTALL) "cuda-toolkit[nvcc,cccl,cudart,crt,nvvm]==$$($(BIN)/python -c 'import torch; print(torch.version.cuda)').*"
	@touch $@

demo: install  ## Distil the toy teacher into the toy CLIP and report what it brought.
	$(BIN)/fastsds demo --out runs/demo --overwrite

test: install lint $(NVCC)  ## Lint, types and the whole test suite.
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

docs: install  ## Build the documentation into site/.
	$(BIN)/python -m mkdocs build --strict

weights: install  ## Train the toy world's models anew (about an hour).
	$(BIN)/python -m fastsds.toyworld.train --out fastsds/toyworld/weights

wheel: install  ## Build the wheel for the CPU into dist/.
	rm -rf dist/raw
	FASTSDS_CUDA=0 $(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist/raw .
	PATH="$(abspath $(BIN)):$$PATH" $(AUDITWHEEL) dist/raw/*.whl

wheel-cuda: install $(NVCC)  ## Build the wheel with CUDA kernels into dist/; needs no GPU.
	rm -rf dist/raw
	FASTSDS_CUDA=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHITECTURES)" \
	CUDA_HOME="$$($(BIN)/python -c 'import nvidia, pathlib; print(next(pathlib.Path(nvidia.__path__[0]).glob("cu*/bin/nvcc")).parents[1])')" \
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist/raw .
	PATH="$(abspath $(BIN)):$$PATH" $(AUDITWHEEL) dist/raw/*.whl

bench: install  ## Measure every op against eager PyTorch and torch.compile.
	$(BIN)/python -m benchmarks

verify-gpu:  ## Build, test and measure on a CUDA machine, in an environment that has torch; WHEELS=DIR holds the rest.
	$(PYTHON) benchmarks/verify_gpu.py $(if $(WHEELS),--wheels $(WHEELS))

clean:
	rm -rf $(VENV) build dist *.egg-info
