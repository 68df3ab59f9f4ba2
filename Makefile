# `make` lists the targets. Each makes the virtual environment and installs what it needs, once.
#
#   PYTHON       the interpreter that makes .venv, 3.11 or later
#   TORCH        what is installed first; pinned, so that the demo and the tests mean the same everywhere
#   TORCH_INDEX  where it comes from: the CPU build. Empty: your usual package index

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet
PROTOS := $(wildcard protos/*.proto)
STUBS := $(VENV)/.stamp-protos

export TOKENIZERS_PARALLELISM = false
export PATH := $(abspath $(BIN)):$(PATH)
export PYTHONUNBUFFERED = 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

.PHONY: help
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/.stamp-worker $(STUBS)  ## run the embedded pair: live text, speculative and plain side by side
	@$(BIN)/outrider demo $(ARGS)

.PHONY: bench
bench: $(VENV)/.stamp-bench $(STUBS)  ## measure this machine and the embedded pair; ARGS='--quick --json FILE'
	@$(BIN)/outrider bench $(ARGS)

.PHONY: test
test: export OMP_NUM_THREADS = 1  # tests start processes of their own; on few cores more threads only wait
test: $(VENV)/.stamp-dev $(STUBS)  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

.PHONY: lint
lint: $(VENV)/.stamp-dev $(STUBS)  ## check style, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: protos
protos: $(VENV)/.stamp-dev  ## regenerate the gRPC stubs from protos/*.proto
	$(BIN)/python hatch_build.py
	@touch $(STUBS)

.PHONY: install
install: $(VENV)/.stamp-dev $(STUBS)  ## make .venv with everything that development needs

.PHONY: clean
clean:  ## remove .venv and all that is generated
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
	rm -rf $(shell find . -name __pycache__ -not -path './$(VENV)/*')
	rm -f protos/*_pb2.py protos/*_pb2.pyi protos/*_pb2_grpc.py protos/*_pb2_grpc.pyi

# Torch comes first and alone, so that only it is looked for at TORCH_INDEX; what it needs comes with the next step.
# Installing runs the build hook, which makes the stubs; after that a changed .proto remakes them.

$(VENV)/.stamp-torch:
	@echo "making $(VENV) with $(TORCH)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Outrider needs Python 3.11 or later: make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
	@touch $@

$(VENV)/.stamp-worker: pyproject.toml hatch_build.py | $(VENV)/.stamp-torch
	@echo "installing outrider"
	@$(PIP) -e '.[worker]'
	@touch $@

$(VENV)/.stamp-bench: pyproject.toml hatch_build.py | $(VENV)/.stamp-torch
	@echo "installing outrider with what its benchmark needs"
	@$(PIP) -e '.[worker,bench]'
	@touch $@ $(VENV)/.stamp-worker

$(VENV)/.stamp-dev: pyproject.toml hatch_build.py | $(VENV)/.stamp-torch
	@echo "installing outrider with its development tools"
	@$(PIP) -e '.[worker,dev]'
	@touch $@ $(VENV)/.stamp-worker

$(STUBS): $(PROTOS) hatch_build.py | $(VENV)/.stamp-worker
	@$(BIN)/python -c 'import grpc_tools' 2>/dev/null && $(BIN)/python hatch_build.py || $(PIP) --no-deps -e .
	@touch $@
