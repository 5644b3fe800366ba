# Two commands on a fresh machine with Python 3.12 and a package index:
#   make demo   trains every scheme side by side and writes runs/demo/report.html
#   make test   runs the tests
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin

# The newest JAX that the kernels are kept working on, beside the one in constraints.txt.
NEXT_JAX := 0.12.0.1
NEXT := .venv-012

.PHONY: demo test test-jax012 test-gpu lint clean

demo: $(VENV)/.base
	$(BIN)/jattn compare --out runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

test-jax012: $(NEXT)/.dev
	$(NEXT)/bin/python -m pytest -n 2 tests/kernels tests/ops

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gpu]'
	@# Every reference form runs once: tuning its matrix products would take longer.
	JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false \
		XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false" \
		$(BIN)/python -m pytest -n 8 tests/gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) $(NEXT) build dist *.egg-info

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

$(NEXT)/.dev: pyproject.toml constraints.txt Makefile
	test -x $(NEXT)/bin/python || $(PYTHON) -m venv $(NEXT)
	sed -E 's/^(jax|jaxlib|jax-cuda13-plugin)==.*/\1==$(NEXT_JAX)/' constraints.txt \
		> $(NEXT)/constraints.txt
	$(NEXT)/bin/python -m pip install --quiet --constraint $(NEXT)/constraints.txt \
		--editable '.[dev]'
	$(NEXT)/bin/python -m pip install --quiet --constraint $(NEXT)/constraints.txt \
		--no-deps jax-cuda13-plugin
	touch $@
