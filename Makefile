PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-full lint format docs clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## set up .venv (the other targets do it by themselves)

$(INSTALLED): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 12) else "Python 3.12 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "setting up $(VENV) (torch and friends, about 7 GB; two to five minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[data,eval,hf,trackers,docs,dev]'
	@touch $@

demo: $(INSTALLED) ## pretrain, fine-tune with CCA, sample, report: runs/quickstart
	@$(BIN)/python examples/quickstart/run.py

# A file's tests stay together on one of two processes; the long files, which come first, are given out first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED) ## every kind of guarantee, on two processes; needs no GPU
	@$(PYTEST) -m "not full" tests

test-full: $(INSTALLED) ## what `make test` leaves out: long kills, clusters, studies, benchmarks, 20 steps, the whole fuzz
	@$(PYTEST) -m full tests
	@MEGATRON_CCA_FUZZ_SCALE=1 $(PYTEST) tests/unit/test_fuzz_*.py

lint: $(INSTALLED) ## lint and format checks
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(INSTALLED) ## mend what lint would refuse
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(INSTALLED) ## write the references of keys and programs, build the site: site/index.html
	@$(BIN)/python docs/hooks/configuration.py docs/configuration.md
	@$(BIN)/python docs/hooks/programs.py docs/programs.md
	@$(BIN)/mkdocs build --strict

clean: ## forget all runs
	@rm -rf runs
