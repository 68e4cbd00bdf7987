# Everything a fresh machine needs, in one command each. Needs Python 3.11+ with venv, a C++ compiler and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One OpenMP thread a process: beside a busy neighbour two spin against each other and lose far more than they gain.
export OMP_NUM_THREADS ?= 1

.PHONY: demo compare test bench clean

demo: $(VENV)/.installed
	$(BIN)/realuid-fast demo --out runs/demo --overwrite

compare: $(VENV)/.installed
	$(BIN)/realuid-fast compare --then digits_tune --samples 43264 --out runs/compare --overwrite

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

bench: $(VENV)/.installed
	$(BIN)/python -m bench.micro
	$(BIN)/python -m bench.optimiser

# torch first and by exact version: the build below finds it, and nothing later may pull in another. A CPU build does not
# bring triton along. torchcfm is a test peer whose own requirements would replace torch.
$(VENV)/.installed: pyproject.toml setup.py $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0 triton==3.7.1
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps torchcfm==1.0.7
	touch $@

clean:
	rm -rf build *.egg-info realuid_fast/*.so
