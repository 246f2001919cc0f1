# `make quickstart` and `make test` need only Python 3.11, pip and make: they build .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# A file of tests is run by one process, and up to four at once.
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --durations=15

.PHONY: quickstart test test-all soak lint reference clean

quickstart: .venv/run
	$(BIN)/python -m farmer_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

test: .venv/dev lint
	$(PYTEST) -m "not slow"

# With the tests marked slow.
test-all: .venv/dev lint
	$(PYTEST)

# Half an hour: a training run is killed two hundred times, and ends as if it had not been.
soak: .venv/dev
	$(BIN)/python tests/faults/soak.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/mypy farmer_jax

# PyTorch and torch-fidelity, with which some tests compare; without them those are skipped.
reference: .venv/dev
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements-reference.txt

clean:
	rm -rf .venv runs

# Debian's Python comes without ensurepip; virtualenv stands in for venv there.
.venv/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), sys.version' 2>/dev/null || \
	  { echo "error: $(PYTHON) is not Python 3.11, for which requirements.txt is pinned;" \
	    "name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv 2>/dev/null || { rm -rf .venv && \
	  $(PYTHON) -m pip install -q --target .virtualenv virtualenv && \
	  PYTHONPATH=.virtualenv $(PYTHON) -m virtualenv -q .venv && rm -rf .virtualenv; }

.venv/run: .venv/bin/python requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@
