# make demo    the whole pipeline on the bundled sample          make check   lint, types, fast tests
# make up      Prefect server, worker and TensorBoard here       make down    ends them
# make test    all tests                                         make lint    lint and types alone
# make setup   .venv alone

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
DEMO := $(BIN)/python -m flows.pretrain --recipe demo --nproc_per_node 2

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-clean up down lint check format test

help:
	@sed -n 's/^# //p' Makefile

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(DEMO)

demo-clean:
	rm -rf data/demo artifacts/demo artifacts/promoted/*_demo_step_*
	test -e artifacts/best || rm -f artifacts/best

SERVICES := $(BIN)/python -m flows.services
up: FLAGS := $(if $(PORT),--port $(PORT)) $(if $(TENSORBOARD_PORT),--tensorboard_port $(TENSORBOARD_PORT))
ifdef DATABASE_URL  # in the environment, so that no command line shows its password
up: export PREFECT_SERVER_DATABASE_CONNECTION_URL := $(DATABASE_URL)
endif

up: setup
	@$(SERVICES) up $(FLAGS)

down: setup
	@$(SERVICES) down

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(PYTEST) -m 'not slow and not soak'

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup
	$(PYTEST)
