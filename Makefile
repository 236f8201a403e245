# make demo | test | test-all | test-gpu | lint | format | docs | clean
#
# Each target creates .venv and installs fedlight into it the first time. `make test VENV=` uses the Python
# that is active instead (a conda environment, a container) and installs nothing.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

ifeq ($(VENV),)
PY := $(PYTHON)
INSTALLED :=
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-gpu lint format docs clean

help:
	@echo "make demo      train FedAvg and FedAvg+MAN on real images, side by side"
	@echo "make test      run the tests (PYTEST_ARGS='-k man' passes options on)"
	@echo "make test-all  run also those that take more than ten seconds each"
	@echo "make test-gpu  run the tests that need a CUDA device"
	@echo "make lint      ruff and mypy; make format fixes what it can"
	@echo "make docs      build the documentation's site into site/"
	@echo "make clean     remove .venv and caches"

demo: $(INSTALLED)
	$(PY) examples/demo.py

test: $(INSTALLED)
	$(PY) -m pytest -n 2 --dist loadfile -m "not slow" $(PYTEST_ARGS)

test-all: $(INSTALLED)
	$(PY) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

test-gpu: $(INSTALLED)
	$(PY) -m pytest -m gpu $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(INSTALLED)
	$(PY) -m mkdocs build --strict

clean:
	rm -rf .venv build dist site .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp makes a second run quick; a change of the dependencies renews it.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedlight needs Python 3.11 or newer; pass one with make PYTHON=python3.11")'
	@echo "Installing fedlight into $(VENV) (a few minutes, once) ..."
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps 'sweeps>=0.3'
	@touch $@
