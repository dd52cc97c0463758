# What a user types: `make demo`, `make test`. Everything is set up by what needs it.
# Python 3.11 or newer and a package index are all that is asked for.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
	>/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LITELLM_VERSIONS := 1.83.10 1.100.5
LITELLM_READY := $(LITELLM_VERSIONS:%=.litellm/%/.ready)
PIP := -m pip --disable-pip-version-check --quiet

.PHONY: help demo test unit coverage bench-scrape check format docs litellm lock clean

help: ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(READY) ## Run the sidecar before a stand-in provider and compare its counts (ONCE=1 ends by itself).
	$(BIN)/python -m sidecar demo $(if $(ONCE),--once)

test: $(READY) ## Run all tests; what needs LiteLLM or Prometheus says so where they are absent.
	$(BIN)/python -m pytest $(ARGS)

unit: $(READY) ## Run the tests that need nothing but Python.
	$(BIN)/python -m pytest --ignore=tests/e2e $(ARGS)

coverage: $(READY) ## Run the tests of `unit` and hold them to what they have to cover.
	rm -f .coverage .coverage.*
	$(BIN)/python -m coverage run -m pytest tests/observe
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --include="sidecar/observe/*,sidecar/exchange.py" --fail-under=100
	$(BIN)/python -m coverage run -m pytest --ignore=tests/e2e --ignore=tests/observe
	$(BIN)/python -m coverage combine --quiet --append
	$(BIN)/python -m coverage report --fail-under=97

bench-scrape: $(READY) ## Measure what a scrape of 30,000 series does to a stream.
	@$(BIN)/python -m bench.scrape

check: $(READY) ## Lint, type-check, check who imports whom, and compare the generated docs.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_imports.py
	$(BIN)/python scripts/docs.py --check

format: $(READY) ## Format the code and regenerate the docs.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python scripts/docs.py

litellm: $(LITELLM_READY) ## Install the LiteLLM versions that the tests run against.

$(READY): requirements/dev.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 with venv is needed: install it, or name it with PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python $(PIP) install --no-deps --require-hashes -r requirements/dev.txt
	@touch $@

.litellm/%/.ready: requirements/litellm-%.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 with venv is needed: install it, or name it with PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv --clear .litellm/$*
	.litellm/$*/bin/python $(PIP) install --no-deps --require-hashes -r $<
	@touch $@

lock: ## Resolve the dependencies anew (needs uv).
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade pyproject.toml -o requirements/runtime.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade pyproject.toml --group dev -o requirements/dev.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade requirements/build.in -o requirements/build.txt
	for v in $(LITELLM_VERSIONS); do uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade requirements/litellm-$$v.in -o requirements/litellm-$$v.txt; done

clean: ## Remove what the other targets made.
	rm -rf $(VENV) .litellm .mypy_cache .ruff_cache .pytest_cache build dist
