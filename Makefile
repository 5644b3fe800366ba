# Two commands on a fresh machine with Python 3.12 and a package index:
#   make demo   trains every scheme side by side and writes runs/demo/report.html
#   make test   runs the tests
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-gpu lint clean

demo: $(VENV)/.base
	$(BIN)/jattn compare --out runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gpu]'
	JAX_PLATFORMS=cuda XLA_FLAGS= XLA_PYTHON_CLIENT_PREALLOCATE=false \
		$(BIN)/python -m pytest tests/gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# What compiles kernels for a GPU on a machine without one: the plugin alone,
	@# not the gigabytes of CUDA libraries that it names as dependencies.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps \
		jax-cuda13-plugin
	touch $@
