# Each target sets up what it needs and can be run again at once: `make demo`, `make test`.
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench setup

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The active virtual environment, or one of this project's own.
VENV := $(or $(VIRTUAL_ENV),.venv)
STAMP := $(VENV)/.hermes-async-dev
export VIRTUAL_ENV_DISABLE_PROMPT := 1

help:
	@echo "make demo    run the model that comes with the library, in less memory than it has weights"
	@echo "make test    run the tests with coverage"
	@echo "make lint    check style and types"
	@echo "make bench   run the benchmarks; BENCH=name runs one"

setup: $(STAMP)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints-dev.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints-dev.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(VENV)/bin/hermes-async demo

test: $(STAMP)
	$(VENV)/bin/python -m pytest --cov --cov-fail-under=90

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
