# make help lists the targets. Everything happens in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
STRESS ?= /tmp/data2vec_stress

.DEFAULT_GOAL := help
.PHONY: help install demo demo-audio demo-text test test-slow stress bench-gpu lint format build clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(READY)  ## Create .venv with the package and its tools

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)  ## Pretrain on the embedded digits (at most 5 minutes on 2 cores) and name the report
	$(RUN) -m data2vec_train modality=vision

demo-audio: $(READY)  ## The same with the embedded speech
	$(RUN) -m data2vec_train modality=audio

demo-text: $(READY)  ## The same with the embedded texts
	$(RUN) -m data2vec_train modality=text

test: $(READY)  ## Run the fast tests
	$(RUN) -m pytest -m "not slow"

test-slow: $(READY)  ## Run all tests, the ones that train for minutes too
	$(RUN) -m pytest

stress: $(READY)  ## Kill, signal and starve runs for about an hour; every one has to end in the same bits
	OMP_NUM_THREADS=1 $(RUN) -m tests.stress.kills --kills 200 --folder $(STRESS)/kills
	OMP_NUM_THREADS=1 $(RUN) -m tests.stress.saves --kills 200 --full-disks 20 --folder $(STRESS)/saves
	OMP_NUM_THREADS=1 $(RUN) -m tests.stress.signals --signals 50 --folder $(STRESS)/signals
	OMP_NUM_THREADS=1 $(RUN) -m tests.stress.sweeps --kills 10 --folder $(STRESS)/sweeps

bench-gpu: $(READY)  ## Tests and timings on an NVIDIA GPU, in at most 9 minutes
	$(RUN) -m pytest tests/gpu
	$(RUN) -m data2vec_train.benchmark what=[step] size=base precision=bf16 compile=true
	$(RUN) -m data2vec_train.benchmark what=[step] size=base precision=bf16 compile=false
	$(RUN) -m data2vec_train.benchmark what=[step] size=base precision=fp32 compile=false
	$(RUN) -m data2vec_train.benchmark what=[attention] size=base precision=bf16

lint: $(READY)  ## Check style, spelling and dead code
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m codespell_lib data2vec_train configs recipes tests README.md Makefile
	$(RUN) -m vulture

format: $(READY)  ## Rewrite the code in the project's format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

build: $(READY)  ## Build the wheel
	$(RUN) -m build --wheel

clean:  ## Remove .venv, build outputs and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
