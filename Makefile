# One command does everything from a fresh clone:  make demo  |  make test
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test lint bench effects weight-space many-tasks mutants peft zoo docs setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## compare four methods on banking77, save and prove the winner (5 to 7 minutes)
	$(BIN)/pegbox demo

# One thread a test process: two processes of two threads on two cores mostly wait for one another.
test: export OMP_NUM_THREADS = 1
test: $(STAMP)  ## the whole suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

bench: $(STAMP)  ## paired benchmarks against HF PEFT; rewrites docs/benchmarks.md
	$(BIN)/python -m benchmarks

effects: $(STAMP)  ## every method's effect on real data (about 15 minutes); rewrites docs/comparison.md
	$(BIN)/python -m benchmarks.effects
	$(BIN)/python docs/generate.py

weight-space: $(STAMP)  ## initialisers, growing ranks, experts beside LoRA on three data sets (some hours; goes on where it stopped)
	$(BIN)/python -m benchmarks.weight_space
	$(BIN)/python docs/generate.py

many-tasks: $(STAMP)  ## new tasks from few examples, choosing between adapters, several tasks at once (an hour or two; goes on where it stopped)
	$(BIN)/python -m benchmarks.many_tasks
	$(BIN)/python docs/generate.py

mutants: $(STAMP)  ## plant one defect per conformance check and see it caught
	$(BIN)/python -m tests.mutants

peft: $(STAMP)  ## the conformance suite over every tuner of the installed HF PEFT (about half an hour)
	$(BIN)/python -m tests.peft_bridge

zoo: $(STAMP)  ## train the models that ship, from the data sets beside the checkout (about three hours; goes on where it stopped)
	$(BIN)/python -m zoo

docs: $(STAMP)  ## the documentation site, in site/
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) site runs .mypy_cache .ruff_cache .pytest_cache
