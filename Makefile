# Everything runs in one virtual environment, made on first use and brought up to date when
# pyproject.toml or constraints.txt change. `make help` lists the targets.

VENV ?= .venv
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3),python3.11)
JOBS ?= 2
ARGS ?=

PY := $(VENV)/bin/python
# One thread for each process: the tests are many small tensors, on which threads only wait.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

EXTRAS_cli := cli
EXTRAS_dev := cli,data,scipy,bench,dev
EXTRAS_docs := cli,docs

# A stamp counts only for a venv that was made in this place and still has its Python.
ifneq ($(shell cat $(VENV)/.checkout 2>/dev/null; test -x $(PY) || echo broken),$(CURDIR))
$(shell rm -f $(VENV)/.ready-*)
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint types layers docs bench format check clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 10

$(VENV)/.ready-%: pyproject.toml constraints.txt scripts/setup-venv
	@scripts/setup-venv "$(PYTHON)" "$(VENV)" "$(EXTRAS_$*)"
	@touch $@

setup: $(VENV)/.ready-dev $(VENV)/.ready-docs ## make the environment for development

demo: $(VENV)/.ready-cli ## train one flow on real data under every gradient strategy, into runs/demo
	$(VENV)/bin/symplectic-adjoint compare --out runs/demo --overwrite $(ARGS)

test: $(VENV)/.ready-dev ## run the tests, doctests and documented examples
	$(ONE_THREAD) $(PY) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/.ready-dev ## ruff: style, mistakes, formatting
	$(PY) -m ruff check $(ARGS) .
	$(PY) -m ruff format --check .

types: $(VENV)/.ready-dev ## mypy, strict
	$(PY) -m mypy $(ARGS)

layers: $(VENV)/.ready-dev ## imports point to lower layers
	$(VENV)/bin/lint-imports $(ARGS)

docs: $(VENV)/.ready-docs ## build the documentation into site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

bench: $(VENV)/.ready-dev ## measure us and the peers: make bench ARGS="spiral --quick"
	$(PY) -m benchmarks $(ARGS)

format: $(VENV)/.ready-dev ## rewrite the sources to the project's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

check: test lint types layers docs ## all that has to pass before a change is merged

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks docs examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
