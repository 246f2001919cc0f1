# `make quickstart` and `make test` need only Python 3.11, 3.12 or 3.13, pip and make. They create
# .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Files of tests run in parallel, each in one process, in the order of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile \
  --no-loadscope-reorder --durations=15

.PHONY: quickstart test test-faults test-stores test-all soak lint docs docs-serve notebook
.PHONY: reference stores clean

quickstart: .venv/run
	$(BIN)/python -m farmer_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

# What matters after a change of the model or of a job. Compiled programs are kept, so that later
# runs are faster.
test: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.venv/compiled
test: .venv/dev lint
	$(PYTEST) -m "not faults and not slow and not stores"

# Killed processes, damaged files, fuzzing, several processes.
test-faults: .venv/dev
	$(PYTEST) -m "faults and not slow"

# Workdirs in emulators of Google Cloud Storage and S3.
test-stores: stores
	$(PYTEST) -m stores

# All tests, including those that take minutes.
test-all: .venv/dev .venv/docs lint
	$(PYTEST)

# Half an hour: a training run is killed 200 times and must end like an uninterrupted run.
soak: .venv/dev
	$(BIN)/python -m tests.faults.soak

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/mypy farmer_jax

# The documentation in site/. Warnings and broken links are errors. The build needs no network.
docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/docs
	$(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python -m docs._site.check_links site

docs-serve: .venv/docs
	$(BIN)/python -m mkdocs serve

# Executes notebooks/tour.py and writes notebooks/tour.ipynb.
notebook: .venv/docs
	$(BIN)/python -m docs._site.notebook

# PyTorch and torch-fidelity. The tests that compare with them are skipped without them.
reference: .venv/dev
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements-reference.txt

# Clients and emulators of object stores.
stores: .venv/dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-stores.txt

clean:
	rm -rf .venv runs site

# Debian's Python has no ensurepip, so virtualenv is used there.
.venv/bin/python:
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 13)' 2>/dev/null || \
	  { echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13;" \
	    "name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv 2>/dev/null || { rm -rf .venv && \
	  $(PYTHON) -m pip install -q --target .virtualenv virtualenv && \
	  PYTHONPATH=.virtualenv $(PYTHON) -m virtualenv -q .venv && rm -rf .virtualenv; }

.venv/run: .venv/bin/python requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv/docs: .venv/dev requirements-docs.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-docs.txt
	touch $@
