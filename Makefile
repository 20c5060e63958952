# make demo   every step of the pipeline on the demo model, in one table
# make test   the tests
# make lint   style, types, direction of imports
#
# All three make `.venv` first where it is missing or out of date. Nothing outside this directory is written,
# pip's cache aside. Another Python: make PYTHON=python3.12 ...

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Nothing is fetched at run time, and libraries keep their caches here.
export HF_HUB_OFFLINE := 1
export HF_HOME := $(CURDIR)/build/cache/huggingface
export MPLCONFIGDIR := $(CURDIR)/build/cache/matplotlib
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export ORT_DISABLE_TELEMETRY := 1

.PHONY: demo test lint format

demo: $(INSTALLED)
	$(BIN)/trimvlm demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n auto --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(INSTALLED): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "trimvlm needs Python 3.10 or newer, and $(PYTHON) is not: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip==26.3
	$(BIN)/python -m pip install --quiet -c constraints.txt --build-constraint constraints.txt \
	  --editable '.[export,ort,rtx,tools]' --group dev
	touch $@
