# Every target works on a fresh clone: what it needs is installed into .venv first, once, and again only when
# pyproject.toml or constraints.txt changes.
#
#   make install PYTHON=/path/to/python3.12     another interpreter (3.11 or newer)
#   make install TORCH_INDEX=                   torch from the package index alone (on Linux: the CUDA build, several GB)
#   make test PYTEST_ARGS="-x -k splits"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-bench demo test lint format docs wheel check-wheel tutorials refresh-tutorials clean distclean

# The first of these that is Python 3.11 or newer; looked for only when .venv is made.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell $(p) -c \
	"import sys; print(sys.executable if sys.version_info >= (3, 11) else '')" 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

# An index with CPU builds of torch, asked beside the usual one. Where it cannot be reached pip says so and goes on
# without it; few retries keep that short.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
INSTALL_TORCH = install --no-deps -c constraints.txt torch \
	$(if $(TORCH_INDEX),--retries 1 --timeout 20 --extra-index-url $(TORCH_INDEX))

# Real data for the tests that want them, where the folder lies beside the checkout; the suite does without.
ifneq ($(wildcard ../shared/data),)
export SCCVAE_DATA_DIR ?= $(abspath ../shared/data)
endif

# What runs here multiplies small matrices: a second thread gains little, and on a busy machine costs tenfold.
# numba's counts as well: it shares OpenMP with torch, and its first parallel loop sets torch's number to its own.
export OMP_NUM_THREADS ?= 1
export NUMBA_NUM_THREADS ?= 1

help:
	@echo "make install            .venv with sccvae (editable) and all that the targets below need"
	@echo "make install-bench      what benchmarks/ compares with, too"
	@echo "make demo               train, correct and plot the cells bundled with scanpy"
	@echo "make test               the tests"
	@echo "make lint | format      ruff: check | mend"
	@echo "make docs               docs/_build/html; a warning is an error"
	@echo "make wheel              dist/*.whl"
	@echo "make check-wheel        install that wheel into an empty environment and import it"
	@echo "make tutorials          run copies of the notebooks (build/tutorials); refresh-tutorials keeps the outputs"
	@echo "make clean | distclean  remove what was built | and .venv"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { \
		echo "No Python 3.11 or newer found: install one, or name it: make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip $(INSTALL_TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

install-bench: install
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench]'

demo: install
	$(BIN)/sccvae demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	rm -rf docs/generated
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

wheel: install
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist

# From another folder and with -I, so that only the installed wheel can be imported. Compiling all of what is
# installed costs more than the one import.
check-wheel: wheel
	rm -rf build/wheel-venv
	$(BIN)/python -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip $(INSTALL_TORCH) --no-compile
	build/wheel-venv/bin/python -m pip install --no-compile -c constraints.txt dist/*.whl
	cd build && wheel-venv/bin/python -I ../.ci/check_wheel.py
	cd build && wheel-venv/bin/sccvae --help
	rm -rf build/wheel-venv

tutorials: install
	rm -rf build/tutorials && mkdir -p build/tutorials
	$(BIN)/python -m nbconvert --to notebook --execute --output-dir build/tutorials tutorials/*.ipynb

refresh-tutorials: install
	$(BIN)/python -m nbconvert --to notebook --execute --inplace tutorials/*.ipynb

clean:
	rm -rf build dist demo_output docs/_build docs/generated docs/tutorials/*.ipynb .pytest_cache .ruff_cache
	find sccvae tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
