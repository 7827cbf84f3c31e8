PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8
UV_READY := $(VENV)/.uv-$(UV_VERSION)
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup test test-all lint typecheck format docs demo bench ablation constraints clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 14

setup: $(INSTALLED)  ## Create .venv and install the project with everything pinned

$(UV_READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "cocoa-embed needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] + "; run: make PYTHON=<path to a newer python>")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	touch $@

$(INSTALLED): $(UV_READY) pyproject.toml constraints.txt
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --constraints constraints.txt --build-constraints constraints.txt --editable '.[dev]'
	touch $@

test: $(INSTALLED)  ## Run the tests, without those marked slow or gpu
	$(BIN)/pytest -n auto

test-all: $(INSTALLED)  ## Run the tests, the slow ones too
	$(BIN)/pytest -n auto -m "not gpu"

lint: $(INSTALLED)  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory typecheck

typecheck: $(INSTALLED)  ## Check types
	$(BIN)/mypy
	$(BIN)/pyright

format: $(INSTALLED)  ## Fix what ruff can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## Build the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir build/site

demo: $(INSTALLED)  ## Train, export and search on this machine, start to finish
	$(BIN)/cocoa-embed demo

bench: $(INSTALLED)  ## Run every script in benchmarks/, but for the ablation
	@set -e; found=; \
	for script in benchmarks/*.py; do \
		test -f "$$script" -a "$$script" != benchmarks/ablation.py || continue; \
		found=yes; \
		echo "== $$script"; \
		$(BIN)/python "$$script"; \
	done; \
	test -n "$$found" || echo "nothing to run: benchmarks/ holds no .py file"

ablation: $(INSTALLED)  ## Train and compare what each stage is worth
	$(BIN)/python benchmarks/ablation.py

constraints: $(UV_READY)  ## Resolve constraints.txt again; UV_FLAGS=--upgrade moves the pins to the newest versions
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 \
		--no-header --no-annotate --no-emit-index-url --quiet $(UV_FLAGS) -o constraints.txt

clean:  ## Remove what builds and checks leave behind; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
