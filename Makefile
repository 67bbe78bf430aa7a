# Each target sets up what it needs; see `make help`.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-oldest test-optimized test-wheel torture outdated coverage lint bench

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The active virtual environment, or one of this project's own.
VENV := $(or $(VIRTUAL_ENV),.venv)
INSTALLED := $(VENV)/.hermes-async-dev
BENCH ?= sweep
FAILURES ?=
FUZZ ?= --mutations 100000
PIP_OPTIONS ?=
PIP_INSTALL = -m pip install --disable-pip-version-check --quiet $(PIP_OPTIONS)

help:
	@echo "make demo    run the model that ships with the package in less memory than its weights take"
	@echo "make test    run the tests; make coverage also measures their coverage, and takes longer"
	@echo "make test-oldest"
	@echo "             run the tests that depend on other libraries with their oldest tested versions"
	@echo "make test-optimized"
	@echo "             run the tests under python -O, on one event loop"
	@echo "make test-wheel"
	@echo "             install the wheel into an empty environment, with and without extras"
	@echo "make torture let everything fail that can fail, and open 100,000 damaged checkpoints; takes hours."
	@echo "             FAILURES='--stride 20' and FUZZ='--mutations 1000 --seed 7' try a part"
	@echo "make outdated"
	@echo "             list the libraries that have a newer release than the tested one"
	@echo "make lint    check style and types"
	@echo "make docs    build the documentation site into build/site"
	@echo "make bench   run a benchmark: BENCH=name, ARGS=its arguments"
	@echo "make setup   only create the virtual environment and install the dependencies for development"

setup: $(INSTALLED)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints-dev.txt | $(VENV)/bin/python
	@echo "installing into $(VENV); this takes some minutes the first time"
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints-dev.txt -e ".[dev]"
	@touch $@

demo: $(INSTALLED)
	$(VENV)/bin/hermes-async demo

# A file's tests run in one process, so that what a file sets up for all its tests is set up once.
test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q -n auto --dist loadfile

# What depends on the versions of other libraries: parity, checkpoints, forward passes, tokenizers, and the server. Left out
# are features that are the engine's own, and modules that use torch alone, of which both environments have the same
# version. Tokens are compared with transformers' at the smallest budget, where all weights are streamed and prompts are
# computed in chunks; `make test` has all budgets, with the newest tested versions.
VERSION_FEATURES := classification context_length embedding forwarding kernels prompt sampling_params sentences \
	structured_outputs text_length tokenizer
TORCH_ALONE := modeling/test_kernels modeling/test_kv_cache quantization/test_encoded_weight \
	quantization/test_name_patterns quantization/test_notes quantization/test_write
VERSION_TESTS := tests/parity tests/modeling tests/quantization tests/engine tests/faults/test_checkpoints.py \
	tests/serving/test_text_stream.py tests/server/test_app.py $(wildcard $(VERSION_FEATURES:%=tests/features/test_%.py)) \
	$(TORCH_ALONE:%=--ignore=tests/%.py)
VERSION_CHOICE = not (those_of_transformers and (middle or resident))

.venv-%/.installed: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	@echo "installing into .venv-$*; this takes some minutes the first time"
	.venv-$*/bin/python $(PIP_INSTALL) -c constraints-$*.txt -e ".[test]"
	@touch $@

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -q -n auto --dist loadfile $(VERSION_TESTS) -k "$(VERSION_CHOICE)"

# pytest's own asserts hold under `python -O` too. Bytecode is kept, because no other run has compiled the libraries so.
test-optimized: $(INSTALLED)
	PYTHONOPTIMIZE=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -q -n auto --dist loadfile -k "not uvloop"

# The wheel in an empty environment, first without extras. It takes minutes, so it is no part of `make test`.
test-wheel: $(INSTALLED)
	rm -rf build/wheel .venv-wheel
	$(VENV)/bin/python -m hatchling build --target wheel --directory build/wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --disable-pip-version-check --quiet -c constraints-dev.txt build/wheel/*.whl
	.venv-wheel/bin/python -I tests/packaging/installed.py
	.venv-wheel/bin/python -m pip install --disable-pip-version-check --quiet -c constraints-dev.txt \
		"$$(echo build/wheel/*.whl)[serve,structured]"
	.venv-wheel/bin/python -I tests/packaging/installed.py serve structured

# Every read, write, allocation and task switch of each scenario fails once in each way. ARGS="--stride 20" tries a part.
torture: $(INSTALLED)
	$(VENV)/bin/python -m tests.every_failure $(FAILURES)
	$(VENV)/bin/python -m tests.fuzz $(FUZZ)

outdated: $(INSTALLED)
	$(VENV)/bin/python tests/outdated.py

coverage: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q -n auto --dist loadfile --cov --cov-fail-under=90

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/hadolint Dockerfile

bench: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.$(BENCH) $(ARGS)

# The last check: no page loads anything from another host.
.PHONY: docs
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	! grep -rnE '<(script|link|img|iframe)[^>]+(src|href)="?(https?:)?//' build/site --include='*.html'
