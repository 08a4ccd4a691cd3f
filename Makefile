# Two commands set everything up: `make demo` and `make test`. Each makes .venv and installs into it
# what it needs; a second call installs nothing unless the pins or the package's metadata changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Compiling every installed module would take longer than the rest of the installation: the few that
# are used are compiled at first use, which an environment with this variable would forbid.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(PIP) install --no-compile

# one thread: the tests' networks are so small that more would spend their time waiting for one another;
# so two processes, each with whole files, which keeps what a file's tests share
TEST_THREADS ?= 1
TEST_PROCESSES ?= 2

.PHONY: demo demo-train test check format docs clean
.DELETE_ON_ERROR:

# draws with the shipped model
demo: $(VENV)/.installed
	$(BIN)/mezzotint demo

# trains a model in minutes, and draws with that
demo-train: $(VENV)/.installed-train
	$(BIN)/mezzotint demo --train

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=$(TEST_THREADS) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest \
	  -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-cache --no-logo

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the site in build/site, without a network; a link that leads nowhere is an error
docs: $(VENV)/.installed-dev
	$(BIN)/python -m tools.build_docs

clean:
	rm -rf $(VENV) .cache build dist .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Mezzotint needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-train: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e '.[train]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt requirements-reference.txt \
    requirements-reference-metrics.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e '.[dev]'
	$(INSTALL) --no-deps -r requirements-reference.txt
	rm -rf $(VENV)/reference
	$(INSTALL) --no-deps --target $(VENV)/reference -r requirements-reference-metrics.txt
	touch $@ $(VENV)/.installed-train
