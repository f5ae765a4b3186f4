# make help lists the targets. Override PYTHON to choose the interpreter of .venv, and TORCH_INDEX to take
# PyTorch from another index; without it, a Linux machine without an NVIDIA GPU gets the CPU build. `make images`
# takes TORCH_INDEX too, and BASE_IMAGE, the image with Python 3.11 that all are built on.
PYTHON ?= python3
BASE_IMAGE ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := .venv/bin
# Modules are compiled when they are first imported; most never are.
INSTALL := $(BIN)/pip install --no-compile --constraint constraints.txt
CPU_TORCH_INDEX := https://download.pytorch.org/whl/cpu
RUNTIME := .venv/.runtime-installed
TOOLS := .venv/.test-tools-installed
DOCS_TOOLS := .venv/.docs-tools-installed
# Files in the order of collection, not by their number of tests: the longest then begin first.
PYTEST := $(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder
# An image under another licence than the project's own is built by choice: calipert model build NAME.
MODELS := $(notdir $(patsubst %/Dockerfile,%,$(shell grep -l 'licenses="MIT"' model_containers/*/Dockerfile)))

.DEFAULT_GOAL := help
.PHONY: help setup tools demo images test coverage test-studies test-platform test-python fault docs up down clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(RUNTIME) ## install into .venv, if anything changed since the last time

tools: $(TOOLS) ## install what tests and pre-commit need, too

demo: setup ## benchmark two models on a simulated screen
	$(BIN)/calipert run demo

images: setup ## build the images of the models, for CALIPERT_ENGINE=docker
	$(BIN)/calipert model build $(if $(BASE_IMAGE),--arg BASE_IMAGE=$(BASE_IMAGE)) \
		$(if $(TORCH_INDEX),--arg TORCH_INDEX=$(TORCH_INDEX)) $(MODELS)

test: $(TOOLS) ## lint, types, import contracts, and all tests that take seconds (aim: 8 minutes)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST)

coverage: $(TOOLS) ## the tests of core again, with the lines that they do not reach: 95 % of core must be reached
	$(PYTEST) tests/core tests/test_end_to_end.py --cov --cov-report=term:skip-covered

test-studies: $(TOOLS) ## trainings on real and simulated screens, and the benchmarks on small ones (aim: 10 minutes)
	$(PYTEST) tests/studies

test-platform: $(TOOLS) ## tests with servers, containers and a browser, and one round of each fault (aim: 20 minutes)
	$(PYTEST) tests/fault tests/platform

fault: $(TOOLS) ## kill benchmarks, workers and servers at many moments, and compare all bytes (an hour)
	CALIPERT_FAULT_ROUNDS=10 $(BIN)/pytest -v -s tests/fault

test-python: ## core's and flows' tests, which need no PyTorch, in a container with another Python: IMAGE=...
	.ci/test-python $(or $(IMAGE),$(error make test-python needs IMAGE, such as calipert-trixie: CONTRIBUTING.md))

docs: $(DOCS_TOOLS) ## build the documentation into build/docs; a warning is an error
	$(BIN)/mkdocs build

up: setup ## start the servers and workers, and register all deployments
	@$(BIN)/python -m deployments.local up

down: ## stop what `make up` and `make demo` started
	@! test -x $(BIN)/python || $(BIN)/python -m deployments.local down

clean: down ## remove .venv and caches, but no data
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage .coverage.* \
		build dist *.egg-info
	find . -name __pycache__ -type d -not -path './data/*' -prune -exec rm -rf {} +

# A stamp in .venv is newer than the files that say what to install, so long as they have not changed.
$(RUNTIME): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit( \
		"calipert needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d: try make setup PYTHON=python3.12" % v)'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
ifeq ($(origin TORCH_INDEX),undefined)
# pip's usual index brings gigabytes of CUDA libraries. Where pip has find-links of its own, it looks there too.
	@if [ "$$(uname -s)" = Linux ] && ! timeout 60 nvidia-smi -L 2> /dev/null | grep -q '^GPU'; then \
		echo "No NVIDIA GPU found: installing the CPU build of PyTorch"; \
		$(INSTALL) --quiet --no-deps --retries 1 --timeout 15 --index-url $(CPU_TORCH_INDEX) torch 2> /dev/null || \
		echo "It cannot be installed from $(CPU_TORCH_INDEX): taking PyTorch from pip's usual index"; \
	fi
else ifneq ($(TORCH_INDEX),)
	$(INSTALL) --quiet --no-deps --index-url $(TORCH_INDEX) torch
endif
	$(INSTALL) --quiet --editable .
	touch $@

$(TOOLS): $(RUNTIME)
	$(INSTALL) --quiet --editable '.[test,bench]'
	touch $@

$(DOCS_TOOLS): $(RUNTIME)
	$(INSTALL) --quiet --editable '.[docs]'
	touch $@
