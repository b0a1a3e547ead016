# Two commands do all the set-up: `make serve` and `make test`. Each builds what it needs of .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable
# Settings of the server, such as `make serve ARGS="weights=/path num_replicas=2"`.
ARGS ?=

.PHONY: help venv serve serve-haproxy test test-system lint format clean
.DELETE_ON_ERROR:

help: ## List the targets.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

serve: $(VENV)/.server ## Install what the server needs and start it; it prints the page's address when ready.
	$(BIN)/serve run serving:app $(ARGS)

serve-haproxy: $(VENV)/.server ## The same for many people: HAProxy in front of two ingress replicas (docs/hosting.md).
	set -a; . cluster/haproxy.env; set +a; $(BIN)/serve run cluster/service.yaml

venv: $(VENV)/.all ## Build .venv with everything: server, training, tests.

# Files go to as many processes as there are processors, up to four; each calculates in one thread.
test: $(VENV)/.all ## The fast tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore=tests/system -n logical --maxprocesses 4 --dist loadfile

test-system: $(VENV)/.all ## The slow tests: several Ray processes, kills, Chromium.
	$(BIN)/python -m pytest tests/system --durations=15

lint: $(VENV)/.all ## ruff and mypy.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.all ## Let ruff put the code in order.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove .venv and what tools have left.
	rm -rf $(VENV) out build *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else 1)' || \
		{ echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "python3 -m venv failed: on Debian and Ubuntu, apt install python3-venv"; exit 1; }

$(VENV)/.server: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) .
	@touch $@

$(VENV)/.all: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) ".[train,test,bench]"
	@touch $@ $(VENV)/.server
