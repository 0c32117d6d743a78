# Habits. `make check` is what a change has to pass.
PYTHON := .venv/bin/python
SCRIPTS := $(shell git ls-files --cached --others --exclude-standard '*.sh' .ci/run 2>/dev/null)

.PHONY: help format lint types shell test test-full check bench
help:
	@echo "make format | lint | types | shell | test | test-full | check (lint types shell test) | bench"

.venv/setup.stamp: requirements/lock.txt
	@./setup.sh

format: .venv/setup.stamp
	@$(PYTHON) -m ruff check --fix-only --quiet . && $(PYTHON) -m ruff format .
	@.venv/bin/shfmt -i 2 -ci -w $(SCRIPTS)

lint: .venv/setup.stamp
	@$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .

types: .venv/setup.stamp
	@$(PYTHON) -m pyright

shell: .venv/setup.stamp
	@.venv/bin/shellcheck $(SCRIPTS) && .venv/bin/shfmt -i 2 -ci -d $(SCRIPTS)

test:
	@./run_tests.sh

test-full:
	@./run_tests.sh --full

check: lint types shell test

# gpu.py needs a GPU, and is started by hand.
bench: .venv/setup.stamp
	@set -e; for file in $(filter-out %/measure.py %/gpu.py,$(wildcard tests/benchmarks/*.py)); do $(PYTHON) "$$file"; done
