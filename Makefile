# `make` alone says what there is to do.

.DEFAULT_GOAL := help
BIN := .venv/bin
UV := $(shell command -v uv 2>/dev/null)

.PHONY: help
help: ## Say what there is to do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: .venv/ready ## Build .venv from the lock file (the others do it by themselves)

# Python 3.11 or newer builds it; uv does where it is there, and pip where uv cannot.
.venv/ready: LOCK := requirements-dev.lock
.venv/ready: requirements-dev.lock pyproject.toml
.venv-bench/ready: LOCK := bench/requirements.lock
.venv-bench/ready: bench/requirements.lock pyproject.toml
.venv/ready .venv-bench/ready:
	@set -e; \
	for python in python3 python3.14 python3.13 python3.12 python3.11 python none; do \
	    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	done; \
	if [ $$python = none ]; then \
	    echo "Python 3.11 or newer is needed: install it, then try again." >&2; exit 1; \
	fi; \
	echo "Building $(@D) with $$($$python --version)"; \
	rm -rf $(@D); \
	$$python -m venv $(@D); \
	packages=$$(grep -c == $(LOCK)); \
	echo "Installing up to $$packages locked packages, in a minute or two"; \
	if [ -z "$(UV)" ] || ! { "$(UV)" pip install --quiet --compile-bytecode \
	        --python $(@D)/bin/python --require-hashes --requirement $(LOCK) || { echo "pip takes over" >&2; false; }; }; then \
	    $(@D)/bin/python -m pip install -qq --disable-pip-version-check \
	        --require-hashes --requirement $(LOCK); \
	fi; \
	$(@D)/bin/python -m pip install -qq --disable-pip-version-check \
	    --no-index --no-deps --no-build-isolation --editable .; \
	touch $@; \
	echo "Ready: $(@D)/bin/dispatcher --help"

.PHONY: demo
demo: setup ## Watch 2,000 messages go through, with limits and a ban, in half a minute
	@$(BIN)/dispatcher demo

.PHONY: up
up: ## Run PostgreSQL, the migration and a worker in containers
	docker compose up --build

.PHONY: test
test: setup ## Run the tests, in parallel, and hold the coverage
	@rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest -m "not faults"
	@$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=95
	$(BIN)/coverage report --include="dispatcher/domain/*" --fail-under=100

.PHONY: faults
faults: setup ## Kill processes and cut connections: the slow tests of what must survive
	$(BIN)/pytest tests/faults

.PHONY: check
check: lint ## Lint, and check the format, the migrations' SQL and the container files
	$(BIN)/ruff format --check .
	$(BIN)/dispatcher migrate --sql > .venv/migrations.sql
	$(BIN)/squawk .venv/migrations.sql
	$(BIN)/pytest -qq -n0 tests/unit/test_deploy_files.py

.PHONY: lint
lint: setup ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: format
format: setup ## Put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: .venv-bench/ready ## Measure all, against peers and the ceiling, in under ten minutes
	@.venv-bench/bin/python -m bench

.PHONY: bench-quick
bench-quick: .venv-bench/ready ## Measure the same on small numbers, in under a minute
	@.venv-bench/bin/python -m bench --quick

.PHONY: lock
lock: ## Lock the newest versions that pyproject.toml allows (needs uv)
	@[ -n "$(UV)" ] || { echo "uv is needed: pip install uv, then try again." >&2; exit 1; }
	$(UV) $(COMPILE) --output-file requirements.lock
	$(UV) $(COMPILE) --extra embedded --group dev --output-file requirements-dev.lock
	$(UV) $(COMPILE) --extra embedded --group bench --constraints requirements-dev.lock \
	    --output-file bench/requirements.lock

COMPILE := pip compile pyproject.toml --universal --python-version 3.11 \
    --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet --upgrade
