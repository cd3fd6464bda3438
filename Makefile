# Two commands, each with all of its set-up; quick where that is done already.
#   make demo    three pictures from prompts, painted by two processes on the CPU, offline: out/demo-1.png ...
#   make test    lint, types, import rules and the test suite
# WORKERS is the number of processes that share the tests.
# PYTHON names the interpreter that makes the environment (3.10 or newer): make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2
PROMPTS ?= "a red canyon at golden hour" "green hills at golden hour, hot air balloon" "snowy mountains at night, aurora"

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test clean

demo: $(VENV)/.installed
	@mkdir -p out
	@n=0; for prompt in $(PROMPTS); do \
	  n=$$((n + 1)); echo "$$prompt"; \
	  HF_HUB_OFFLINE=1 $(BIN)/distrifusion generate "$$prompt" --nproc 2 --device cpu --guidance-scale 2.5 --seed 0 -o out/demo-$$n.png || exit 1; \
	done

# In the order of their names: xdist would leave the files with the fewest tests for last, and these start processes.
test: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

clean:
	rm -rf $(VENV) out

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"Python {v[0]}.{v[1]} is too old: PYTHON=... names one of 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned: left to the dependencies' range, pip may take another build of it, gigabytes larger.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) "$(TORCH)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(PIP) "$(TORCH)"
	$(PIP) --editable ".[dev]"
	@touch $@
