# Set-up and everyday commands; `make help` lists them. Needs python3 with its venv module, nothing else.

PYTHON ?= python3
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
# Touched when an installation is complete, with the extras named.
CLI := $(VENV)/.installed-cli
DEV := $(VENV)/.installed-dev
OLDEST := .venv-oldest

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest lint clean distclean
.NOTPARALLEL:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  PYTHON=python3.12      the interpreter that the virtual environment is made with'
	@echo '  ARGS="seed=1 …"        arguments for fscreen (demo) or pytest (test)'

demo: $(CLI) ## set up, then train, screen and prune on the embedded digits; ARGS="experiment=… seed=1"
	$(VENV)/bin/fscreen $(ARGS)

test: $(DEV) ## set up, then run the tests; ARGS="-m 'not slow'"
	$(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

test-oldest: ## the same with the oldest torch, Lightning and torchmetrics supported, in an environment of its own
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -c tests/oldest.txt -e '.[dev]'
	CI=1 $(OLDEST)/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

lint: $(DEV) ## check style, types and the direction of imports
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-cache

clean: ## remove builds and caches; runs and data stay
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name '$(VENV)*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environments, too
	rm -rf $(VENV) $(OLDEST)

define INSTALL
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(MAKE) --no-print-directory $(VENV)
	$(RUN) -m pip install 'pip>=22'
endef

$(CLI): pyproject.toml setup.py
	$(INSTALL)
	$(RUN) -m pip install -e '.[cli]'
	@touch $@

$(DEV): pyproject.toml setup.py
	$(INSTALL)
	$(RUN) -m pip install -e '.[dev]'
	@touch $(CLI) $@

# Only ever made by INSTALL, where it has no working pip.
.PHONY: $(VENV)
$(VENV):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || \
	    { echo '$(PYTHON) is not Python 3.10 to 3.13: pass one that is, as in `make demo PYTHON=python3.12`' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
