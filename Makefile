# make help lists the targets. All commands run in .venv, which is created by the first target that needs it.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
STRESS ?= /tmp/data2vec_stress

.DEFAULT_GOAL := help
.PHONY: help install demo demo-audio demo-text test test-slow stress bench-gpu lint format docs build clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(READY)  ## Create .venv with the package and its tools

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)  ## Pretrain on the included digits (at most 5 minutes on 2 cores) and print the report's path
	$(RUN) -m data2vec_train modality=vision

demo-audio: $(READY)  ## The same with the included speech
	$(RUN) -m data2vec_train modality=audio

demo-text: $(READY)  ## The same with the included texts
	$(RUN) -m data2vec_train modality=text

test: $(READY)  ## Run the fast tests, two files at a time
	$(RUN) -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)  ## Run all tests, including those that train for minutes
	$(RUN) -m pytest

stress: $(READY)  ## Kill and signal runs and fill their disks for about an hour; results must be bit-identical
	OMP_NUM_THREADS=1 $(RUN) -m tests.stress.kills --kills 200 --folder $(STRESS)/kills
	OMP_NUM_THREADS=1 $(RUN) -m tests.stress.saves --kills 200 --full-disks 20 --folder $(STRESS)/saves
	OMP_NUM_THREADS=1 $(RUN) -m tests.stress.signals --signals 50 --folder $(STRESS)/signals
	OMP_NUM_THREADS=1 $(RUN) -m tests.stress.sweeps --kills 10 --folder $(STRESS)/sweeps

# Planned for one H200: 4 minutes of tests, 20 s for each of the 7 models and 15 s for each command to start, 30 s for
# attention. Times are of few rounds; use more for a figure that is published: make bench-gpu ROUNDS=9
ROUNDS ?= 3
PEAK := peak.side=8192 peak.repeats=10 peak.stated_tflops=790
STEP := what=step against=[] size=base precision=bf16 attention=auto compile=true step.beside=[fp32,eager] \
	rounds=$(ROUNDS) tolerance=0.1 step.loss_tolerance=0.02 $(PEAK)

bench-gpu: $(READY)  ## Test and time on an NVIDIA GPU with 80 GB or more, in at most 9 minutes
	$(RUN) -m pytest tests/gpu
	$(RUN) -m data2vec_train.benchmark $(STEP) modalities=vision step.batch_size=64
	$(RUN) -m data2vec_train.benchmark $(STEP) modalities=vision step.batch_size=64 step.objectives=[data2vec2] \
		'step.settings="objective.masks_per_sample=8"'
	$(RUN) -m data2vec_train.benchmark $(STEP) modalities=audio step.batch_size=8 step.audio_seconds=20
	$(RUN) -m data2vec_train.benchmark $(STEP) modalities=text step.batch_size=16 step.text_tokens=512
	$(RUN) -m data2vec_train.benchmark what=attention precision=bf16 rounds=$(ROUNDS) tolerance=0.05 $(PEAK) \
		backends.key_mask=[true] backends.backward=[true]

lint: $(READY)  ## Check style, spelling and dead code
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m codespell_lib data2vec_train configs recipes tests README.md Makefile
	$(RUN) -m vulture

format: $(READY)  ## Format the code
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: $(READY)  ## Write configs/README.md from the comments of the YAML files
	$(RUN) -m data2vec_train.config.reference

build: $(READY)  ## Build the wheel
	$(RUN) -m build --wheel

clean:  ## Remove .venv, build outputs and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
