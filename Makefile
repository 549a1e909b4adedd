# `make help` lists the targets. Only Python 3.10 or later and make are needed; everything else goes into $(VENV).
# COMFYUI_PATH=<folder> uses the ComfyUI you have instead of a fetched one.

PYTHON ?= python3
VENV ?= .venv
# The ordinary wheels of one release, together: a CPU-only torch beside PyPI's torchvision does not import.
TORCH ?= torch==2.12.1 torchvision==0.27.1 torchaudio==2.11.0
ARGS ?=

# A folder in memory for the files of `make check`, where it holds 2 GB: thousands of fsyncs take half a minute on a disk.
MEMORY := $(shell [ "$$(df --output=avail --block-size=1M /dev/shm 2>/dev/null | tail -1)" -ge 2000 ] 2>/dev/null && echo /dev/shm)

BIN := $(VENV)/bin
INSTALLED := $(VENV)/safety-experts-installed
BROWSER := $(VENV)/safety-experts-browser
COMFYUI := $(VENV)/safety-experts-comfyui

.PHONY: help demo test check lint format bench bench-alignment workflows test-browser clean force
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

demo: $(INSTALLED)  ## the whole pipeline on the toy world through a real ComfyUI (ARGS="--out DIR --fast")
	$(BIN)/safety-experts demo $(ARGS)

test: $(INSTALLED)  ## every test, on a real ComfyUI too, then lint (ARGS="-k merge" picks some)
	OMP_NUM_THREADS=1 $(BIN)/pytest --ignore=tests/browser --numprocesses 2 --dist loadfile $(ARGS)
	@$(MAKE) --no-print-directory lint

check: $(INSTALLED) lint  ## formatting, lint, types, and the tests that need no ComfyUI: a minute
	MYPYPATH="$$(cat $(COMFYUI))" $(BIN)/mypy .
	TMPDIR="$(MEMORY)" OMP_NUM_THREADS=1 $(BIN)/pytest --quiet --numprocesses 2 --dist worksteal \
		-o tmp_path_retention_policy=failed -m "not comfyui and not slow" $(ARGS)

format: $(INSTALLED)  ## put the code into the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# These want folders or other programs to measure, or run for days; each says how at its top.
APART := alignment first_hour gguf_models guards install recount

bench: $(INSTALLED)  ## every benchmark that needs nothing but this machine, hours on 2 cores, into benchmarks/results
	@$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --editable '.[bench]'
	for script in $(filter-out $(APART:%=benchmarks/%.py),$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

bench-alignment: $(INSTALLED)  ## safety alignment on the bench world, in pieces over days (ARGS="--list", "--minutes 60", "--write")
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/alignment.py $(ARGS)

workflows: $(BROWSER)  ## save example_workflows/ with the real frontend, from example_workflows/api/
	$(BIN)/python tests/browser/save_workflows.py

test-browser: $(BROWSER)  ## the example workflows in Chromium, as a user runs them (SCREENSHOTS=<folder> keeps pictures)
	$(BIN)/pytest tests/browser $(ARGS)

clean:  ## remove the virtual environment and the tools' caches
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache

lint: $(INSTALLED)
	@$(BIN)/ruff format --quiet --check . || { echo "some files are not in the house format; run make format"; exit 1; }
	@$(BIN)/ruff check --quiet .

# `python -m pytest` and the like would put this folder on sys.path, where nodes/ shadows ComfyUI's nodes.py:
# call the commands in $(BIN) instead.
$(INSTALLED): $(COMFYUI) pyproject.toml Makefile
	@echo "Installing PyTorch, ComfyUI's requirements and this pack into $(VENV): about 5 GB and a few minutes, once"
	@$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check \
		$(TORCH) --requirement "$$(cat $(COMFYUI))/requirements.txt" --editable '.[test]'
	@touch $@

$(BROWSER): $(INSTALLED)
	@command -v $${CHROMIUM:-/usr/bin/chromium} >/dev/null || { echo "Chromium is needed: install it or set CHROMIUM"; exit 1; }
	@$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check playwright
	@touch $@

# Holds the ComfyUI's folder; rewritten only when that changes, so that its requirements are installed anew only then.
$(COMFYUI): force | $(BIN)/python
	@found="$$($(BIN)/python demo/comfyui_source.py)" && \
		{ [ "$$found" = "$$(cat $@ 2>/dev/null)" ] || echo "$$found" > $@; }

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=<yours>")'
	$(PYTHON) -m venv $(VENV)

force:
