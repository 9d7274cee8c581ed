# `make demo` trains, samples and evaluates on the embedded digits; `make test` checks everything. Both make .venv first.
#   make bench      measures speed against its goals, in under 20 minutes, and writes benchmarks/RESULTS.md
#   make test-all   runs also the slow tests: every fault, 10,000 inputs of each reader, 20,000 steps, further cases
#   make test PYTHON=python3.12     uses another interpreter (a pyenv version works too)

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
DEMO_CONFIG := configs/vp/digits_ddpmpp_continuous.py
DEMO_WORKDIR := runs/demo

.PHONY: demo test test-all bench clean

demo: core
	$(BIN)/python main.py --config $(DEMO_CONFIG) --mode train --workdir $(DEMO_WORKDIR)
	$(BIN)/python main.py --config $(DEMO_CONFIG) --mode eval --workdir $(DEMO_WORKDIR)

test: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-all: dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "exhaustive or not exhaustive"

bench: core
	$(BIN)/python -m benchmarks.run

.PHONY: core dev
core dev:
	sh tools/make_venv.sh "$(PYTHON)" $(VENV) requirements-$@.txt

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
