# The same commands serve people, pre-commit and CI. Needs: make and a Python >= 3.11 on PATH.
#   make demo | make test         do all the set-up they need; a second call does not install again
#   make install PYTHON=python3.12 TORCH_ARGS="--index-url ..."   to choose the interpreter or the torch build

.DEFAULT_GOAL := help
.PHONY: help install test test-all check check-lint check-format check-types format demo bench fuzz compare-demo assets assets-test clean

VENV  := .venv
RUN   := $(VENV)/bin/python
# Only what is imported gets compiled, a fourth of the modules: by the first import, which is part of the installation.
PIP   := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile
STAMP := $(VENV)/.install-stamp
TORCH := $(shell grep '^torch==' constraints.txt)
TORCH_ARGS ?=
PYTEST_ARGS ?=
DEVICE ?= cpu
FUZZ_ARGS ?=

# The first interpreter that starts and is new enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)

# One thread a process: two processes with two threads each on two cores only wait for one another.
export OMP_NUM_THREADS := 1
# Weights and data come from the asset cache, never from a hub.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Every process that a test starts would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  \1|/p' Makefile | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

install: $(STAMP) ## the virtual environment, at the tested versions

$(RUN):
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 on PATH: install one, or say make install PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(RUN)
	$(PIP) $(TORCH_ARGS) "$(TORCH)"
	$(PIP) -c constraints.txt -e ".[dev,compare,gguf]"
	@$(RUN) -c "import loralign.compare.report, loralign.train.sft, trl.trainer.sft_trainer"
	@touch $@

test: install assets-test ## the tests, without the slow ones
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -rs $(PYTEST_ARGS)

test-all: install assets-test ## every test: the full product of recipes and model families
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -rs -m "" $(PYTEST_ARGS)

check: check-lint check-format check-types ## ruff and mypy, as pre-commit runs them

check-lint: install
	$(RUN) -m ruff check .

check-format: install
	$(RUN) -m ruff format --check .

check-types: install
	$(RUN) -m mypy

format: install ## let ruff mend what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

demo: install ## lora and lora-ga side by side on a real language model, about 6 minutes on 2 cores
	$(RUN) scripts/assets.py smollm2
	$(RUN) scripts/assets.py bbc
	$(RUN) scripts/demo.py

bench: install ## one training step beside PEFT's own, time and memory (DEVICE=cuda on a GPU)
	$(RUN) benchmarks/bench_step.py --device $(DEVICE)

fuzz: install ## more than a thousand bad inputs, each to be refused in one short sentence, about 15 minutes on 2 cores
	$(RUN) scripts/fuzz.py $(FUZZ_ARGS)

compare-demo: install ## full, lora and lora-ga on BBC News, each at its own tuned rate, about 15 minutes on 2 cores
	$(RUN) scripts/assets.py minilm
	$(RUN) scripts/assets.py bbc
	$(RUN) scripts/compare_demo.py

assets: install ## real weights and data into the asset cache, about 180 MB to download
	$(RUN) scripts/assets.py smollm2
	$(RUN) scripts/assets.py smollm2 --layers 2
	$(RUN) scripts/assets.py minilm
	$(RUN) scripts/assets.py bbc

# Without a connection the tests marked `assets` are skipped, and pytest lists them.
assets-test: install
	@$(RUN) scripts/assets.py smollm2 --layers 2 || echo "make: no asset cache; the tests marked assets will be skipped" >&2

clean: ## remove what the tools leave behind, not the virtual environment
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
