# make demo    the demonstration
# make web     the same in a browser
# make test    every check
# PYTHON=python3.11 make test    with a Python of your choice (3.10 to 3.12)

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help env demo web test lint format clean clean-env

help:
	@echo "make demo       run the demonstration, tools/demo.py"
	@echo "make web        serve the web demo, tools/web_demo.py, at http://127.0.0.1:7860"
	@echo "make test       lint, formatting and type checks, and tests"
	@echo "make lint       lint, formatting and type checks only"
	@echo "make format     format the code and fix what ruff can fix"
	@echo "make env        make $(VENV) (the targets above do this themselves)"
	@echo "make clean      delete caches and build folders"
	@echo "make clean-env  delete $(VENV)"

env:
	@bash tools/setup_env.sh

demo: env
	@$(VENV_PYTHON) tools/demo.py

web: env
	@$(VENV_PYTHON) tools/web_demo.py

lint: env
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy

# Three processes, as each waits at times for others that its tests start; each with one thread and
# whole test files, in the order of tests/conftest.py. The processes that tests start share compiled
# files, also where Python is told to write none.
test: export OMP_NUM_THREADS ?= 1
test: lint
	@env -u PYTHONDONTWRITEBYTECODE \
		$(VENV_PYTHON) -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

format: env
	@$(VENV_PYTHON) -m ruff check --fix .
	@$(VENV_PYTHON) -m ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

clean-env:
	rm -rf $(VENV)
