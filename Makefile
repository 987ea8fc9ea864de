PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lint format weights clean

install: $(INSTALLED)  ## Make the virtual environment and install everything into it.

$(INSTALLED): pyproject.toml
	@echo "Setting up $(VENV): a few minutes, most of them for PyTorch's download."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on "setuptools>=64" wheel torch
	$(BIN)/python -m pip install --progress-bar on --no-build-isolation --editable ".[dev]"
	@touch $@

demo: install  ## Distil the toy teacher into the toy CLIP and report what it brought.
	$(BIN)/fastsds demo --out runs/demo --overwrite

test: install lint  ## Lint, types and the whole test suite.
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

weights: install  ## Train the toy world's models anew (about an hour).
	$(BIN)/python -m fastsds.toyworld.train --out fastsds/toyworld/weights

clean:
	rm -rf $(VENV) build dist *.egg-info
