# Everything a fresh machine needs, in one command each. Needs Python 3.11+ with venv, a C++ compiler and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One OpenMP thread a process: beside a busy neighbour two spin against each other and lose far more than they gain.
export OMP_NUM_THREADS ?= 1
# Tests start some hundred processes. Where a shell forbids to keep bytecode, each compiles this package and the tests anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo compare study test checks docs bench fuzz nullgpu nullgpu-budget nullgpu-networks nullgpu-compile nullgpu-rehearsal sanitize dist audit lock clean

demo: $(VENV)/.installed
	$(BIN)/realuid-fast demo --out runs/demo --overwrite

compare: $(VENV)/.installed
	$(BIN)/python -m bench.study.compare --then digits_tune --common --samples 43264 --out runs/compare --overwrite

# Does real data help on MNIST: hours, and the same command goes on. DATA is a folder with MNIST's four files.
DATA ?= data/mnist
study: $(VENV)/.installed
	$(BIN)/python -m bench.study.mnist --data $(DATA)

# The checks run beside the tests, on a processor that these leave free now and then. What they say comes last.
test: $(VENV)/.installed
	@mkdir -p build; make --no-print-directory checks > build/checks.log 2>&1 & checks=$$!; \
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --by-file --durations 15; \
	tests=$$?; wait $$checks; checks=$$?; cat build/checks.log; exit $$((tests | checks))

checks: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	! $(BIN)/python -m pip check | grep -vE '^(torchcfm |torch-fidelity |flow-matching |accelerate |lightning |No broken)'

# The site, without the network: a warning, such as a link that leads nowhere, is an error. It ends in build/docs/index.html.
docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

bench: $(VENV)/.installed
	$(BIN)/python -m bench.micro
	$(BIN)/python -m bench.optimiser

# Random calls and damaged files in the tens of thousands: hours. FUZZ is the number for each operator and reader.
FUZZ ?= 10000
fuzz: $(VENV)/.installed
	REALUID_FAST_FUZZ=$(FUZZ) $(BIN)/python -m pytest -v tests/ops/test_random_*.py tests/ops/test_threads.py tests/test_fuzz.py tests/kernels/test_executed.py

# torch's CUDA build on a CUDA that runs nothing (docs/without_gpu.md): no GPU is needed, but 6 GB of disk for an environment
# of its own. NULLGPU_VENV may be one that is there, with a file .installed in it.
NULLGPU_VENV ?= .venv-nullgpu
NULLGPU := build/nullgpu
ON_NULLGPU = LD_PRELOAD=$(CURDIR)/$(NULLGPU)/libnullgpu.so LD_LIBRARY_PATH=$(CURDIR)/$(NULLGPU) PYTHONPATH=$(CURDIR) \
	$(NULLGPU_VENV)/bin/python
nullgpu: $(NULLGPU)/libnullgpu.so
	$(ON_NULLGPU) -m pytest -q --by-file -p no:cacheprovider --durations 8 $(NULLGPU_ARGUMENTS) tests/nullgpu

# Launches and host times as they are now become the budget that `make nullgpu` compares with.
nullgpu-budget: $(NULLGPU)/libnullgpu.so
	$(ON_NULLGPU) -m tests.nullgpu.budget

# Counts the launches, bytes and memory of the CIFAR-10 recipe's networks, into bench/results. Compiling takes minutes.
nullgpu-networks: $(NULLGPU)/libnullgpu.so
	$(ON_NULLGPU) -m tests.nullgpu.networks

# Processor time of the first compiled update of the CIFAR-10 recipe, from an empty folder: two minutes.
nullgpu-compile: $(NULLGPU)/libnullgpu.so
	$(ON_NULLGPU) -m tests.nullgpu.first_update

# Runs all of bench.gpu where no GPU is: nine minutes at most. Its host times become a table of docs/without_gpu.md.
nullgpu-rehearsal: $(NULLGPU)/libnullgpu.so
	$(ON_NULLGPU) -m tests.nullgpu.rehearsal

$(NULLGPU)/libnullgpu.so: $(wildcard tests/nullgpu/device/*.cpp tests/nullgpu/device/*.h) tests/nullgpu/device/build.py $(wildcard csrc/autograd/*) | $(NULLGPU_VENV)/.installed
	$(NULLGPU_VENV)/bin/python tests/nullgpu/device/build.py $(NULLGPU)

$(NULLGPU_VENV)/.installed: requirements/dev.lock
	$(PYTHON) -m venv $(NULLGPU_VENV)
	$(NULLGPU_VENV)/bin/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1
	$(NULLGPU_VENV)/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements/dev.lock
	touch $@

# The operators' tests on code that checks itself. Python brings no AddressSanitizer along, so it is loaded ahead; leaks are
# not looked for, since the interpreter keeps what it allocates. Run from the sanitized copy, which imports find first.
SANITIZED := build/sanitize/lib
sanitize: $(VENV)/.installed
	REALUID_FAST_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build
	cd $(SANITIZED) && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
		REALUID_FAST_SANITIZE=address,undefined PYTHONPATH=$(CURDIR)/$(SANITIZED) $(abspath $(BIN))/python -m pytest -q \
		-p no:cacheprovider $(CURDIR)/tests/ops

# Source archive and wheel, installed in every way in fresh environments: the extension runs, or the build has stopped.
# Isolated builds fetch setuptools and ninja: this needs the network.
dist: $(VENV)/.installed
	rm -rf build/dist
	$(BIN)/python -m build --no-isolation --sdist --outdir build/dist .
	$(BIN)/python .ci/dist.py build/dist

# Known vulnerabilities of what dev.lock pins. The advisories are fetched from the package index: this needs the network,
# and fails without it. What can be told offline, that the installed versions fit together, is in `make test`.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit
	build/audit/bin/pip-audit --strict --require-hashes --disable-pip -r requirements/dev.lock

# Needs uv, which the locks bring, and the network. Raise a version with LOCK=--upgrade-package=NAME, all with LOCK=--upgrade.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --custom-compile-command 'make lock'
lock:
	$(COMPILE) $(LOCK) --extra train --extra nvtx --extra dev --extra docs --extra diffusers --extra hub --override requirements/without-torch.txt \
		$(addprefix --no-emit-package ,torch filelock fsspec jinja2 mpmath networkx sympy) \
		pyproject.toml requirements/dev.in -o requirements/dev.lock
	$(COMPILE) $(LOCK) --no-deps requirements/peers.in -o requirements/peers.lock

# torch first and by exact version: the build below finds it, and nothing later may pull in another. A CPU build does not
# bring triton along. Everything else is pinned and hashed; the locks name all there is to install, so nothing is resolved.
$(VENV)/.installed: pyproject.toml setup.py $(wildcard requirements/*.lock) $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0 triton==3.7.1
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements/dev.lock -r requirements/peers.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf build *.egg-info realuid_fast/*.so
