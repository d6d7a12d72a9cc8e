# make demo      the main job: GRPO without and with pgcompile, writes grpo_arithmetic.png
# make test      lint, types and the tests (under 30 minutes on 2 cores)
# make test-all  the same with the tests marked slow
#
# The first call creates .venv. To use an environment of your own, name it: make test VENV=/path. Nothing is downloaded
# into that one: it needs torch and the extras dev and examples already, and gets only a link to this folder.

SHELL   := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON  ?= python3
TORCH   ?= torch==2.13.0
VENV    ?= .venv
WORKERS ?= 2

BIN   := $(VENV)/bin
STAMP := $(VENV)/.pgcompile-installed
TREE  := .mypy_cache/tree/pgcompile
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: demo test test-all lint types format clean
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(BIN)/python examples/grpo_arithmetic.py

test: lint types
	$(TESTS) -m "not slow"

test-all: lint types
	$(TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The tree mypy reads: pgcompile/ with passes/ inside, as it is once installed.
types: $(STAMP)
	rm -rf $(TREE) && mkdir -p $(TREE)
	ln -s "$(CURDIR)"/pgcompile/* "$(CURDIR)/passes" $(TREE)
	$(BIN)/mypy | sed 's|^$(TREE)/passes|passes|; s|^$(TREE)|pgcompile|'

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and by itself, so that nothing below can bring another version along.
$(STAMP): pyproject.toml
ifeq ($(origin VENV),file)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install -e ".[dev,examples]"
else
	$(BIN)/python -m pip install --no-build-isolation --no-deps -e .
endif
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info *.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
