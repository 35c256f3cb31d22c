# brim: `make demo` trains a model, `make test` runs the tests. Needs python3 (>= 3.11), pip and make.
# Another Python: `make demo PYTHON=python3.12`. More options for pytest: `make test PYTEST_ARGS="-k matmul"`.

PYTHON ?= python3
PYTEST_ARGS ?= -n 2

BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint venv python clean

help:
	@echo 'make demo    install brim into .venv and train a network on handwritten digits under a memory budget'
	@echo 'make test    install the test tools too and run the tests'
	@echo 'make lint    ruff check, ruff format --check, mypy'
	@echo 'make clean   remove .venv, caches and build outputs (runs/ is kept)'

demo: python
	@"$(PYTHON)" tools/make_venv.py
	$(BIN)/brim train digits --model mlp --hidden 256,128 --dropout 0.2 --batch-size 64 --epochs 15 --lr 0.1 \
		--device cpu --budget 256MiB

test: venv
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: venv
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# .venv with everything that tests and lint need
venv: python
	@"$(PYTHON)" tools/make_venv.py dev

# says what is missing before anything else can fail in a less readable way; any Python since 2 can run the check
python:
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
		echo 'brim needs Python 3.11 or newer, and "$(PYTHON)" was not found. Install it, or name another:' \
			'make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "brim needs Python 3.11 or newer, and \
	$(PYTHON) is %s. Install a newer one, or name it: make PYTHON=python3.12 $(MAKECMDGOALS)" \
	% sys.version.split()[0])'

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info src/*.egg-info
	find src backends benchmarks tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
