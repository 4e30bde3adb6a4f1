# Every target builds .venv first when it is missing or out of date; nothing outside this folder is touched.
# Another interpreter:  make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL_LOG := $(VENV)/install.log

DEMO_ARGS ?=
TEST_ARGS ?=
TEST_PROCESSES ?= 2
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## run the demonstration; options: DEMO_ARGS="--output DIR"
	@$(BIN)/mixpool demo $(DEMO_ARGS)

test: lint ## lint, then the whole test suite; options: TEST_ARGS="-m 'not slow' -x" TEST_PROCESSES=8
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(TEST_ARGS)

test-fast: lint ## the daily loop; leaves out tests marked slow (all of the fused kernels) and all parameters but a test's first
	$(BIN)/python -m pytest --fast -n $(TEST_PROCESSES) --dist worksteal $(TEST_ARGS)

lint: $(STAMP) ## ruff check and ruff format --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP) ## run the benchmarks; options: BENCH_ARGS="..."
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

clean: ## remove build products and caches (.venv stays; remove it by hand to start afresh)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "constraints.txt pins versions that need Python 3.11 or later, and $(PYTHON) is older or missing." >&2; \
	    echo "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# The stamp is touched only after a complete install, so an interrupted one starts again.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing mixpool and its pinned dependencies into $(VENV) (log: $(INSTALL_LOG))."
	@echo "A minute or two from local files; elsewhere PyTorch and CUDA are a download of some GB."
	@$(BIN)/python -m pip install -q --no-input --disable-pip-version-check -c constraints.txt -e ".[dev]" \
	    > $(INSTALL_LOG) 2>&1 || { grep -v 'Location .* is ignored' $(INSTALL_LOG) | tail -n 40 >&2; \
	    echo "The installation failed; everything pip said is in $(INSTALL_LOG)." >&2; exit 1; }
	@touch $@
