# Two commands on a fresh machine: `make demo` and `make test`.
.PHONY: demo test test-all check format clean
.ONESHELL:
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
# Threads that spin collapse when anything else runs.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
ASK := --ask 'Tom buys 3 boxes of 12 pencils and gives away 7. How many pencils are left?' \
       --ask 'Write a Python function that returns the largest even number in a list.' \
       --ask 'Tell me a story about a little owl who was afraid of the dark.'
# torch first, the pinned CPU one where there is no GPU. Where an index serves that version with CUDA, name another:
# make demo TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= $(if $(shell command -v nvidia-smi),'torch>=2.6',torch==2.13.0)

.venv/.demo: pyproject.toml builder/kernels.c
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[builder,service]'
	touch $@

.venv/.dev: pyproject.toml builder/kernels.c
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/.demo  ## build the demo zoo, serve it, ask it three questions
	@$(BIN)/builder build --zoo demo --out bundles/demo
	exec $(BIN)/service --bundle bundles/demo --port $(PORT) $(ASK)

test: check  ## every check and the fast tests
	$(BIN)/pytest

test-all: check  ## the slow tests too: the real demo zoo, minutes
	$(BIN)/pytest -m ''

check: .venv/.dev  ## format, lint, types, import rule
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv bundles build dist *.egg-info
