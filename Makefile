# Every target sets itself up: `make demo` and `make test` work from a bare clone with Python >= 3.11, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
FLOOR := .venv-floor
JOBS ?= 2# test processes, one torch thread each
ARGS ?=# passed on by demo, test, bench, studies and train
TORCH_ENV := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow floor envelope families check format lint types docs docs-serve snippets package bench studies train clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv and install the pinned versions (other targets do this by themselves)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "kvcomp needs Python 3.11 or newer, and '$(PYTHON)' is not on the PATH. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kvcomp needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "'$(PYTHON) -m venv' failed; some systems package it separately (python3-venv)"; exit 1; }
	@echo 'Installing the pinned versions into $(VENV); the first time this takes a few minutes.'
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev,docs]'
	@touch $@

demo: setup ## Compress the cache of the shipped testbed with several methods and show what it costs
	$(BIN)/kvcomp demo $(ARGS)

test: setup ## Run the tests (CPU, offline, minutes)
	$(TORCH_ENV) $(BIN)/python -m pytest -q -n $(JOBS) $(ARGS)

test-slow: setup ## Run the tests that take longer
	$(TORCH_ENV) $(BIN)/python -m pytest -q -n $(JOBS) -m 'slow and not gpu and not network' $(ARGS)

floor: $(FLOOR)/.setup-stamp ## Run the tests marked `floor` with the oldest transformers that kvcomp works with
	$(TORCH_ENV) $(FLOOR)/bin/python -m pytest -q -n $(JOBS) -m floor tests/integration $(ARGS)

$(FLOOR)/.setup-stamp: $(STAMP) constraints-floor.txt
	@echo 'Installing the oldest transformers into $(FLOOR); everything else is that of $(VENV).'
	@rm -rf $(FLOOR) && $(BIN)/python -m venv $(FLOOR)
	@packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		echo "import site; site.addsitedir('$$($(BIN)/python -c "$$packages")')" > "$$($(FLOOR)/bin/python -c "$$packages")/pinned.pth"
	@$(FLOOR)/bin/python -m pip install --disable-pip-version-check --no-compile -q -r constraints-floor.txt
	@touch $@

envelope: setup ## Try every feature with every recipe on every family, and write what was found for the documentation
	$(TORCH_ENV) $(BIN)/python -m kvcomp verify --model all --json $(ARGS) > $(VENV)/envelope.json; status=$$?; \
		test $$status -le 1 && mv $(VENV)/envelope.json docs/envelope.json; exit $$status

families: setup ## Test every model family with every recipe, and write what was found for the documentation
	$(TORCH_ENV) $(BIN)/python -m pytest -q -n $(JOBS) -m 'not gpu and not network' tests/integration/test_families.py \
		--junitxml=$(VENV)/families.xml -o junit_family=xunit1 $(ARGS); status=$$?; \
		$(BIN)/python tests/family_results.py $(VENV)/families.xml docs/families.json && exit $$status

check: lint types test docs package ## Everything that CI checks

format: setup ## Format the code and apply safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup ## Check format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup ## Check types (mypy, strict)
	$(BIN)/mypy

docs: setup ## Build the documentation into site/; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: setup ## Serve the documentation while you edit it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

snippets: setup ## Write the outputs that the documentation shows again
	@set -e; for out in docs/snippets/*.txt; do \
		$(TORCH_ENV) $(BIN)/python "$${out%.txt}.py" > $(VENV)/snippet.txt; \
		sed 's/ *$$//' $(VENV)/snippet.txt > "$$out"; done

package: setup ## Build the wheel, install it beside nothing else, and list what it registers
	rm -rf build/package
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w build/package .
	$(BIN)/python -m pip install -q --no-deps --target build/package/site build/package/*.whl
	cd build/package && PYTHONPATH=site $(CURDIR)/$(BIN)/python -c "import kvcomp, pathlib; from kvcomp.core.registry import registry; \
		assert pathlib.Path(kvcomp.__file__).is_relative_to(pathlib.Path('site').resolve()), kvcomp.__file__; \
		registry.find('recipe', 'flowmm'); registry.find('testbed', 'minimile-xs'); \
		print('the wheel registers', len(registry.entries()), 'things')"

bench: setup ## Measure prefill overhead and decode time against a stock cache
	$(BIN)/python benchmarks/speed.py $(ARGS)

studies: setup ## Run the five studies on MiniMile into studies-output (ARGS=--resume goes on)
	@set -e; for study in table1 table3 table4 figure3 figure4; do \
		echo "$$study"; $(TORCH_ENV) $(BIN)/kvcomp ablate $$study --out studies-output/$$study --workers $(JOBS) $(ARGS); done

train: setup ## Train a testbed like minimile-xs (at most 100 minutes on two cores)
	$(BIN)/python -m kvcomp.minimile.training --out training-output/minimile-xs $(ARGS)

clean: ## Remove everything that these targets made, .venv included
	rm -rf $(VENV) $(FLOOR) site build dist demo-output studies-output benchmark-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
