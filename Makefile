PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart smollm test explore lint clean

quickstart: $(VENV)/installed
	$(BIN)/paretomerge quickstart

# A real language model: SmolLM2-135M-Instruct and three adapters. About half an hour on two cores.
smollm: $(VENV)/installed
	$(BIN)/python -m examples.smollm.build examples/smollm/models/base
	$(BIN)/paretomerge plan examples/smollm/study.yaml
	$(BIN)/paretomerge search examples/smollm/study.yaml

test: lint
	$(BIN)/python -m pytest -n 2

# The property tests on new random examples; what one finds becomes an @example.
explore: $(VENV)/installed
	HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest -n 2 -m hypothesis

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One resolution against the pins; torch by itself first, because its CPU build may come from another place.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
