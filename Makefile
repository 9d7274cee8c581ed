# `make demo` trains, samples and evaluates on the embedded digits; `make test` checks everything. Both make .venv first.
#   make bench      measures speed against its goals, in under 20 minutes, and writes benchmarks/RESULTS.md;
#                   compares with torch and diffusers as well, if `make peer` has installed them in a place of their own
#   make test-all   runs also the slow tests: every fault, 10,000 inputs of each reader, 20,000 steps, further cases
#   make test PYTHON=python3.13     uses another interpreter (a pyenv version works too)

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
PEER_VENV := peer-venv
DEMO_CONFIG := configs/vp/digits_ddpmpp_continuous.py
DEMO_WORKDIR := runs/demo

# Containers set it. Without bytecode to read, every process compiles what it imports: 7 s for TensorFlow.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all bench peer clean

demo: core
	$(BIN)/python main.py --config $(DEMO_CONFIG) --mode train --workdir $(DEMO_WORKDIR)
	$(BIN)/python main.py --config $(DEMO_CONFIG) --mode eval --workdir $(DEMO_WORKDIR)

test: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers auto
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-all: dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "exhaustive or not exhaustive"

bench: core
	$(BIN)/python -m benchmarks.run

peer:
	sh tools/make_venv.sh "$(PYTHON)" $(PEER_VENV) requirements-bench.txt

.PHONY: core dev
core dev:
	sh tools/make_venv.sh "$(PYTHON)" $(VENV) requirements-$@.txt

clean:
	rm -rf $(VENV) $(PEER_VENV) runs .mypy_cache .ruff_cache .pytest_cache
