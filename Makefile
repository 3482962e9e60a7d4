# make demo    set up, then lend one file without a name to eight workers
# make test    set up, then the fast tier of the tests
# make long    the long tier: many rounds of what the fast one does briefly
# make check   ruff, mypy --strict, import contract
# make bench   the benchmarks of the main goals, raw rounds in build/ (minutes; quiet machine)
# PYTHON=...   another interpreter, 3.11 or newer; VENV=... another place for its environment

PYTHON ?= python3
VENV ?= .venv
# the system's own, if it will do: distributions build it with optimisations, worth a quarter of a cycle
BENCH_PYTHON ?= $(shell /usr/bin/python3 -c 'import sys, ensurepip; \
	print("/usr/bin/python3" if sys.version_info >= (3, 11) else "$(PYTHON)")' 2>/dev/null || echo $(PYTHON))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test long check bench clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	@$(BIN)/python examples/pool_shared_file.py

test: $(STAMP)
	$(BIN)/python -m pytest -q -m "not long" -n logical --maxprocesses 4 --dist worksteal

long: $(STAMP)
	$(BIN)/python -m pytest -q -m long

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench:
	@$(MAKE) --no-print-directory PYTHON=$(BENCH_PYTHON) VENV=.venv-bench .venv-bench/.installed
	@mkdir -p build
	for topic in rc cycle startup; do \
		.venv-bench/bin/python -m benchmarks $$topic --json build/bench-$$topic.json || exit; done

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fdbroker needs Python 3.11 or newer: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "python3 has no venv module: apt-get install python3-venv" >&2; exit 1; }
	@echo "setting up $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-bench build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
