# Each target sets up what it needs; see `make help`.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-oldest test-newest outdated coverage lint bench

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The active virtual environment, or one of this project's own.
VENV := $(or $(VIRTUAL_ENV),.venv)
INSTALLED := $(VENV)/.hermes-async-dev
BENCH ?= sweep

help:
	@echo "make demo    run the model that ships with the package in less memory than its weights take"
	@echo "make test    run the tests; make coverage also measures their coverage, and takes longer"
	@echo "make test-oldest, make test-newest"
	@echo "             run the tests that depend on other libraries with the oldest and the newest tested versions"
	@echo "make outdated"
	@echo "             list the libraries that have a newer release than the tested one"
	@echo "make lint    check style and types"
	@echo "make bench   run a benchmark: BENCH=name, ARGS=its arguments"
	@echo "make setup   only create the virtual environment and install the dependencies for development"

setup: $(INSTALLED)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints-dev.txt | $(VENV)/bin/python
	@echo "installing into $(VENV); this takes some minutes the first time"
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints-dev.txt -e ".[dev]"
	@touch $@

demo: $(INSTALLED)
	$(VENV)/bin/hermes-async demo

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q -n auto

# What depends on the versions of transformers and torch: parity, checkpoints, forward passes, tokenizers. `make test`
# runs all tests on both event loops; to stay short, these run on one, and leave out features that are the engine's own.
OWN_FEATURES := admission automatic_budget budgets drafting foreign_errors memory_of_many_lengths pausing preparation \
	resize sessions sharing tracing
VERSION_TESTS := tests/parity tests/modeling tests/faults/test_checkpoints.py tests/storage/test_checkpoint.py tests/engine \
	tests/features $(OWN_FEATURES:%=--ignore=tests/features/test_%.py) tests/serving/test_text_stream.py -k "not uvloop"

.venv-%/.installed: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	@echo "installing into .venv-$*; this takes some minutes the first time"
	.venv-$*/bin/python -m pip install --disable-pip-version-check --quiet -c constraints-$*.txt -e ".[dev]"
	@touch $@

test-oldest test-newest: test-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest -q -n auto $(VERSION_TESTS)

outdated: $(INSTALLED)
	$(VENV)/bin/python tests/outdated.py

coverage: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q -n auto --cov --cov-fail-under=90

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.$(BENCH) $(ARGS)
