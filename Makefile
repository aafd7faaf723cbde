# From a bare clone, with Python >= 3.11, pip and make:
#   make demo     set up, then the main job: one program, several backends, one table
#   make test     set up, then the tests (make test SEED=random for fresh seeds)
# Set-up makes .venv once; it is redone when pyproject.toml, constraints.txt or the checkout's place changes.

PYTHON ?= $(shell for p in python3 python python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PROJECTS := pyproject.toml $(wildcard plugins/*/pyproject.toml)
SEED ?= 0
ARGS ?=

# An environment that does not run, or that belongs to another folder, counts as not installed.
ifneq ($(shell $(BIN)/python -c 'print(open("$(STAMP)").read())' 2>/dev/null),$(CURDIR))
$(shell rm -f $(STAMP))
endif

.PHONY: install demo test slow bench check lint format types contracts dependencies clean

install: $(STAMP)

$(STAMP): $(PROJECTS) constraints.txt
	@test -n "$(PYTHON)" || { echo "pgen needs Python >= 3.11 on the PATH (or: make PYTHON=/path/to/python)" >&2; exit 1; }
	@test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ".[dev]" $(patsubst %/pyproject.toml,-e ./%,$(filter plugins/%,$(PROJECTS)))
	@printf '%s' '$(CURDIR)' > $@

demo: $(STAMP)
	$(BIN)/pgen demo $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=8 --dist=worksteal --seed=$(SEED) $(ARGS)

slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=8 --seed=$(SEED) -m slow $(ARGS)

# Those left out are run by an interpreter that has the peers.
bench: $(STAMP)
	@for path in $(filter-out %_peers.py %_posteriors.py,$(wildcard tests/benchmarks/[a-z]*.py)); do \
		echo "== $$path"; $(BIN)/python -m tests.benchmarks.$$(basename $$path .py) || exit 1; done

check: lint types contracts dependencies

lint: $(STAMP)
	$(BIN)/python -m ruff check --output-format=concise .
	$(BIN)/python -m ruff format --check .

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

types: $(STAMP)
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

contracts: $(STAMP)
	$(BIN)/lint-imports

dependencies: $(STAMP)
	$(BIN)/deptry .

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
