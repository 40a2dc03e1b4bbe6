# `make help` lists the targets. Everything is installed into .venv in this checkout; nothing else is touched.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
.NOTPARALLEL:

PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?= --page
SOAK_KILLS ?= 200
VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt

# $(call install,EXTRA): install the project with one extra ("" for none). The whole log goes to a file; the terminal
# gets one line for each package of a megabyte or more, and on failure the end of the log.
define install
echo "==> Installing the dependencies$(if $(1), of '$(1)') into $(VENV) (PyTorch's CUDA build is several GB: a few minutes)"
$(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
	-c constraints.txt -e ".$(if $(1),[$(1)])" </dev/null 2>&1 \
	| tee $(VENV)/install.log \
	| { grep --line-buffered -E '^ +(Downloading|Using cached) .*\(?[0-9.]+ [MG]B|^Installing collected' || true; } \
	| sed -u -E 's/^ *(Downloading|Using cached) (.*\/)?([^ ]+)\.whl[^(]*/    \1 \3 /; s/^Installing collected.*/    Unpacking/' \
	|| { tail -n 20 $(VENV)/install.log >&2; \
	     echo "error: the installation failed (above; all of it in $(VENV)/install.log): mend it and run make again" >&2; \
	     exit 1; }
endef

.PHONY: help demo test coverage contract-env lint types format bench soak contract-latest docs clean

help: ## List the targets
	@sed -n -E 's/^([a-z-]+):.*## (.*)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf 'make %-16s %s\n' "$$name" "$$text"; done
	@echo
	@echo "Variables: PYTHON=$(PYTHON) (3.10 to 3.13), JOBS=$(JOBS) (test processes), PYTEST_ARGS='-k table', MNIST_DIR=folder"

demo: $(VENV)/.installed ## Set up, then train, quantize and evaluate the default run
	@SECONDS=0 most=-1 took='' slowest=''; \
	trap 'test -z "$$took" || echo "demo:$$took in all $$SECONDS s, most of it in $$slowest" >&2' EXIT; \
	for line in "train.py" "quantize.py --precision int8" "evaluate.py --report"; do \
		echo "+ $(BIN)/python $$line" >&2; \
		begin=$$SECONDS code=0; $(BIN)/python $$line || code=$$?; \
		seconds=$$((SECONDS - begin)); took+=" $${line%% *} $$seconds s,"; \
		if ((seconds > most)); then most=$$seconds slowest=$${line%% *}; fi; \
		if ((code)); then exit $$code; fi; \
	done

test: $(VENV)/.installed-dev contract-env ## Set up, then run the whole test suite (MNIST_DIR names MNIST's folder)
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 15 $(PYTEST_ARGS)

coverage: $(VENV)/.installed-dev contract-env ## Run the test suite and measure its coverage, branches too
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --cov --cov-report term --cov-report html $(PYTEST_ARGS)

contract-env: $(VENV)/.installed-dev
	@$(BIN)/python tests/contract/environment.py .contract

contract-latest: $(VENV)/.installed-dev ## Run the contract tests against the current Torch-TensorRT (its own torch: several GB)
	@$(BIN)/python tests/contract/environment.py --latest --strict .contract-latest
	@CONTRACT_DIR=.contract-latest $(BIN)/python -m pytest tests/contract $(PYTEST_ARGS)

soak: $(VENV)/.installed-dev ## Run the fault and fuzzing tests for hours: SOAK_KILLS (200) faults of each kind per command
	@$(BIN)/python -m pip install --quiet --only-binary :all: atheris </dev/null 2>/dev/null || true
	@$(BIN)/python tests/soak.py --kills $(SOAK_KILLS) --jobs $(JOBS) $(SOAK_ARGS)

bench: $(VENV)/.installed-bench ## Measure speed against other tools and write docs/benchmarks.md (let nothing else run)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

lint: $(VENV)/.installed-dev ## Check style and formatting (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev ## Check types (mypy)
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs ## Build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "site/index.html"

clean: ## Remove the environments and caches; artifacts/ stays
	rm -rf $(VENV) .contract .contract-latest site build *.egg-info .coverage .coverage.* htmlcov
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: '$(PYTHON)' is not found: install Python 3.10 to 3.13, or name it: make PYTHON=/path/to/python" >&2; \
		exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "error: Python 3.10 to 3.13 is needed, and $(PYTHON) is" \
			"$$($(PYTHON) -c 'import platform; print(platform.python_version())'):" \
			"name another: make PYTHON=/path/to/python" >&2; \
		exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) lacks venv or pip: install them (on Debian: apt-get install python3-venv)," \
			"or name another: make PYTHON=/path/to/python" >&2; \
		exit 2; }
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(INPUTS)
	@$(call install,)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created $(INPUTS)
	@$(call install,dev)
	@touch $@ $(VENV)/.installed

# What it compares with is optional: where it cannot be installed, the benchmark says so and goes on.
$(VENV)/.installed-bench: $(VENV)/.installed $(INPUTS)
	-@$(call install,bench)
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.created $(INPUTS)
	@$(call install,docs)
	@touch $@ $(VENV)/.installed
