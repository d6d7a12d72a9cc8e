# make demo      the main job: GRPO without and with pgcompile, writes grpo_arithmetic.png
# make test      lint, types and the tests (under 30 minutes on 2 cores)
# make test-all  the same with the tests marked slow
# make gpu       on a machine with an NVIDIA GPU: its tests, then its benchmarks, into docs/benchmarks, then the page.
#                Installs nothing but a link to this folder, so it needs no network, but Python with torch, transformers,
#                rich, click, matplotlib, pytest, pytest-xdist, hypothesis and setuptools 77 or later. Each part (gpu-tests,
#                gpu-published-qwen3-0.6b ...) ends within 9 minutes, and the next one runs behind one that failed; a
#                benchmark that isn't done by then goes on where it was when it is called again. Peers that aren't
#                installed are reported, and have no figures. GPU_FOLDER=... for other than docs/benchmarks.
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
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

GPU_PYTHON := $(PYTHON)
# An interrupted benchmark keeps the cases that it has.
GPU_LIMIT  := timeout --foreground --signal INT --kill-after 10 520
# The last case may take longer than the ones before it say, by what it compiles anew.
GPU_BENCH  := PYTORCH_ALLOC_CONF=expandable_segments:True $(GPU_LIMIT) $(GPU_PYTHON) -m pgcompile bench --device cuda \
              --dtype bf16 --against dense,dense-compiled,flex-tree,prefix-grouper,trl-tree --budget-seconds 330
GPU_PYTEST := TORCHINDUCTOR_COMPILE_THREADS=2 CUBLAS_WORKSPACE_CONFIG=:4096:8 $(GPU_LIMIT) \
              $(GPU_PYTHON) -m pytest -q -n 8 --dist worksteal
GPU_FOLDER := docs/benchmarks
CPU_RECORDS := $(patsubst %,docs/benchmarks/cpu-%.json,grid again cases more)
# What says most comes first. (Dense steps of all layers of the 4B model leave most shapes no memory.)
GPU_GRIDS  := published-qwen3-0.6b cases-qwen3-0.6b published-qwen3-8b \
              paper-qwen3-0.6b paper-qwen3-8b published-qwen3-4b paper-qwen3-4b

.PHONY: demo test test-all lint types format clean gpu gpu-install gpu-tests gpu-contract gpu-page $(GPU_GRIDS:%=gpu-%)
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

gpu:
	$(MAKE) -k gpu-tests gpu-contract $(GPU_GRIDS:%=gpu-%) gpu-page

gpu-install:
	$(GPU_PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .

gpu-tests: gpu-install
	$(GPU_PYTEST) tests/gpu

gpu-contract: gpu-install
	$(GPU_PYTEST) tests/test_ops.py tests/triton_checks.py

# gpu-GRID-MODEL; of the 8B model, eight layers
$(GPU_GRIDS:%=gpu-%): gpu-%: gpu-install
	mkdir -p $(GPU_FOLDER)
	$(GPU_BENCH) --grid $(firstword $(subst -, ,$*)) --model $(patsubst $(firstword $(subst -, ,$*))-%,%,$*) \
	  $(if $(findstring 8b,$*),--layers 8) --json $(GPU_FOLDER)/gpu-$*.json

# Of the records of all machines, those of this one among them.
gpu-page: gpu-install
	shopt -s nullglob; $(GPU_PYTHON) -m pgcompile bench --markdown docs/performance.md --notes docs/benchmarks/notes.toml \
	  $(CPU_RECORDS) $(GPU_FOLDER)/gpu-*.json > /dev/null

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
