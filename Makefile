# `make train` and `make test` set up what they need; only Python 3.11+ and make are asked for.

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/decoder
ARGS ?=

BIN = $(VENV)/bin
WORKERS ?= auto

.PHONY: help train test compiled lint types notebooks notebooks-build wheel clean

help:
	@echo "make train      train the decoder-only transformer into OUT=$(OUT), or go on with it"
	@echo "                (more options: make train ARGS='--norm rmsnorm --steps 200')"
	@echo "make test       run the tests"
	@echo "make compiled   compile for TPUs, without one, and count bytes (installs libtpu)"
	@echo "make lint       ruff and pyrefly"
	@echo "make notebooks  run the notebooks and compare each with its .py;"
	@echo "                make notebooks-build writes them anew from the .py"
	@echo "make wheel      build the wheel and the sdist into dist/"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; $(PYTHON) is older. Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

# One stamp for each group of dependencies in pyproject.toml.
$(VENV)/.%: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[flax]' --group $*
	@touch $@

train: $(VENV)/.example
	$(BIN)/python examples/train_decoder.py --resume --out $(OUT) $(ARGS)

test: $(VENV)/.test
	$(BIN)/pytest -n $(WORKERS) $(ARGS)

# In an environment of its own: where libtpu is installed, JAX looks for a TPU.
compiled:
	$(MAKE) VENV=$(VENV)-compiled $(VENV)-compiled/.compiled
	$(VENV)-compiled/bin/pytest -rs tests/test_tpu_compiled.py $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.lint
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

notebooks: $(VENV)/.notebook $(VENV)/.test
	@for notebook in notebooks/*.ipynb; do \
	  $(BIN)/jupytext --quiet --to py:percent --output - $$notebook \
	    | diff --ignore-matching-lines='^#     formats:' - $${notebook%.ipynb}.py \
	    || { echo "$$notebook and its .py differ; run $(BIN)/python notebooks/build.py"; exit 1; }; \
	done
	$(BIN)/pytest --nbmake -n $(WORKERS) notebooks/*.ipynb

notebooks-build: $(VENV)/.notebook
	$(BIN)/python notebooks/build.py

wheel: $(VENV)/.build
	$(BIN)/python -m build --quiet

clean:
	rm -rf $(VENV) $(VENV)-compiled build dist .pytest_cache .ruff_cache .hypothesis
