# Everything a newcomer needs: `make demo`, `make test`, `make run GATEWAY_UPSTREAM=http://...`.
# Each target installs what it needs into .venv, client/node_modules and tests/node/node_modules, once.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# 3.13 when it can be found, also where a version manager keeps it; 3.11 is the floor.
PYTHON ?= $(shell for candidate in python3.13 "$$HOME"/.pyenv/versions/3.13*/bin/python3.13 python3.14 python3.12 python3.11 python3; do \
	"$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$candidate"; break; }; done)
VERSION := $(if $(PYTHON),$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null))
VENV ?= .venv
BIN := $(VENV)/bin
NODE := tests/node
CLIENT := client
# What the gateway serves at /gateway/v1/client.js; the last that `npm run build` writes.
CLIENT_MODULE := gateway/edge/static/client.js
# With the folders, whose times tell that a file has gone.
CLIENT_SOURCE := $(shell find $(CLIENT)/src)

.PHONY: help setup client run demo test test-client test-core test-faults torture lint wheel bench lock clean

help: ## Show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed-$(VERSION) ## Install the gateway and its tools into .venv

# Another PYTHON makes the environment anew.
$(VENV)/.installed-$(VERSION): requirements/dev.txt pyproject.toml
	@test -n "$(VERSION)" || { echo "unable to find Python 3.11 or newer with venv (Debian, Ubuntu: python3-venv); install it, or say PYTHON=/path/to/python"; exit 1; }
	@echo "Installing into $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

client: $(CLIENT_MODULE) $(CLIENT)/dist/index.js ## Build the npm package and the module that the gateway serves

$(CLIENT)/node_modules/.installed: $(CLIENT)/package.json $(CLIENT)/package-lock.json
	@command -v npm >/dev/null || { echo "unable to find npm; the client is built with it: install Node 20.19 or newer"; exit 1; }
	@echo "Installing what builds and tests the client"
	@cd $(CLIENT) && npm ci >/dev/null
	@touch $@

$(CLIENT_MODULE): $(CLIENT)/node_modules/.installed $(CLIENT_SOURCE) $(CLIENT)/tsconfig.json $(CLIENT)/tsconfig.build.json
	@cd $(CLIENT) && npm run --silent build
	@touch $@

# Written by the same build, before the module: it is only missing when somebody has removed it.
$(CLIENT)/dist/index.js: $(CLIENT_MODULE)
	@test -e $@ || (cd $(CLIENT) && npm run --silent build)
	@touch $@

$(NODE)/node_modules/.installed: $(NODE)/package.json $(NODE)/package-lock.json
	@command -v npm >/dev/null || { echo "unable to find npm; the tests drive the real AI SDK with it"; exit 1; }
	@echo "Installing the real AI SDK (5, 6 and 7) for the tests"
	@cd $(NODE) && npm ci --silent --no-audit --no-fund
	@touch $@

# The page, and the client for each major of the SDK.
$(NODE)/dist/main.js: $(NODE)/node_modules/.installed $(NODE)/build.mjs $(wildcard $(NODE)/page/*) $(CLIENT_MODULE)
	@cd $(NODE) && npm run --silent build
	@touch $@

run: setup client ## Run in front of a backend: make run GATEWAY_UPSTREAM=http://127.0.0.1:3000
	@exec $(BIN)/session-gateway

demo: setup client ## Run the product with a built-in backend and page
	@exec $(BIN)/session-gateway demo

test: setup test-client $(NODE)/dist/main.js ## All tests: real Valkey, real AI SDK, real browser
	@$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/faults $(PYTEST)

test-faults: setup $(NODE)/dist/main.js ## What takes longer: killed and frozen nodes, failovers, clusters, rolling restarts
	@$(BIN)/python -m pytest -n 2 --dist loadfile tests/faults $(PYTEST)

torture: setup ## Clients and faults at random, every frame checked: make torture SECONDS=600 [SEED=7]
	@$(BIN)/python -m tests.faults.torture --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED)) $(TORTURE)

test-client: client ## The client's own tests: needs no Python
	@cd $(CLIENT) && npm test --silent

test-core: setup ## The core and the journal only: no Node needed
	@$(BIN)/python -m pytest tests/core tests/test_journal.py tests/test_store.py $(PYTEST)

lint: setup $(CLIENT)/node_modules/.installed $(NODE)/node_modules/.installed ## Format, lint, types, import rules
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/pyright
	@$(BIN)/lint-imports
	@cd $(CLIENT) && npm run --silent lint
	@cd $(CLIENT) && npm run --silent check

wheel: setup client ## Build wheel and sdist into dist/, with the built client in them
	@$(BIN)/hatchling build

bench: setup client $(NODE)/node_modules/.installed ## Latency, throughput, CPU and memory beside nginx, in one run
	@$(BIN)/python -m bench $(BENCH)

lock: setup ## Compile the locks from pyproject.toml
	@for what in "run" "dev --group dev"; do set -- $$what; file=$$1; shift; \
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		pyproject.toml "$$@" -o requirements/$$file.txt; done

clean: ## Remove what was installed and built
	rm -rf $(VENV) $(NODE)/node_modules $(NODE)/dist $(CLIENT)/node_modules $(CLIENT)/dist $(CLIENT)/LICENSE $(CLIENT_MODULE) \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
