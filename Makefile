# Every target sets up what it needs; PYTHON is the interpreter the environment is built from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUT ?= out

.PHONY: demo test test-fast lint bench-quality paper clean
.DEFAULT_GOAL := demo

# torch first: a plain resolve may fetch another build of it
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[compress,dev]"
	touch $@

QUIET := LLM_COMPRESSOR_LOG_LEVEL=ERROR TQDM_DISABLE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore

demo: $(INSTALLED)  ## prune the shipped model by every method and print one table
	$(QUIET) $(BIN)/python -m llmc_attnmask.compare

test: lint  ## everything CI runs
	$(BIN)/python -m pytest

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

lint: $(INSTALLED)
	$(BIN)/pre-commit run --all-files

# MODEL, CALIBRATION and EVALUATION may name any model folder and text
MODEL ?= llmc_attnmask/builtin/model
CALIBRATION ?= builtin:pydoc
EVALUATION ?= builtin:pydoc
bench-quality: $(INSTALLED)  ## the README's accuracy table
	mkdir -p $(OUT)
	$(QUIET) $(BIN)/python -m llmc_attnmask.compare --model $(MODEL) \
	    --calibration $(CALIBRATION) --evaluation $(EVALUATION) \
	    --recipe recipes/attention_2of4.yaml recipes/attention_unstructured_50.yaml \
	    integration/recipes/paper_2of4.yaml integration/recipes/paper_unstructured_50.yaml \
	    --json $(OUT)/quality.json

paper: $(INSTALLED)  ## the paper's synthetic experiment: CSV and plots in OUT/paper
	$(QUIET) $(BIN)/python -m llmc_attnmask.paper.experiment $(OUT)/paper

clean:
	rm -rf $(VENV) $(OUT)
