# make train   build the environment and run the main job
# make test    build the environment and run all tests
# make long    run the searches that take too long for make test
# make fuzz    run 100,000 random programs of each kind, or until one fails
# make ecosystem    convert models of other libraries, train them in other frameworks, report to other services
# make docs    build the documentation into site/; warnings are errors
# make notebooks    run the notebooks of docs/notebooks; ARGS=--write keeps what they print
# make dist    build and check what a package index gets, in dist/
#
# PYTHON=python3.12   the interpreter to build the environment from (3.11 or newer)
# TORCH=system        use the torch (2.11 or newer, CUDA for instance) that PYTHON already has instead of the pinned one
# ARGS="--steps 50"   passed on to the command that the target runs

PYTHON ?= python3
TORCH ?= pinned
VENV ?= .venv
EXTRAS ?= app,icons,tensorboard
JOBS ?= 3
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(TORCH)
# Beside a torch of the system its pin is left out.
CONSTRAINTS := $(if $(filter system,$(TORCH)),$(VENV)/constraints.txt,constraints.txt)
# Not compiled in advance, which takes longer than all else of an installation: what is imported is compiled once, and
# kept also where the environment forbids it, as each process of the tests would compile torch again.
export PYTHONDONTWRITEBYTECODE =
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check --quiet install --no-compile

PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))

.PHONY: train test long fuzz ecosystem lint types check format docs notebooks dist clean

train: $(STAMP)
	$(BIN)/revnet train $(ARGS)

# One thread per worker, and a worker more than two cores: some tests wait for processes of theirs.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

long: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -n $(JOBS) --dist worksteal $(ARGS)

# A failure is kept in .hypothesis and tried first the next time.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_fuzz.py -x --timeout 0 --hypothesis-profile fuzz --hypothesis-show-statistics $(ARGS)

ecosystem: $(VENV)/.installed-ecosystem
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ecosystem -n 2 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache > /dev/null || $(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

check: lint types test

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The variable silences a notice of each build: Material for MkDocs has fixes until May 2027, and a successor that reads
# the same mkdocs.yml.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebooks: $(VENV)/.installed-docs
	$(BIN)/python docs/site/notebooks.py $(ARGS)

dist: $(VENV)/.installed-release
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/installed_wheel.py dist

clean:
	rm -rf $(VENV) dist site .mypy_cache .pytest_cache .ruff_cache

# The packages of the group are installed when a target first asks for them: training and tests do without.
$(VENV)/.installed-docs $(VENV)/.installed-ecosystem $(VENV)/.installed-release: $(VENV)/.installed-%: $(STAMP)
	$(PIP_INSTALL) --constraint $(CONSTRAINTS) --group $*
	@touch $@

# pip first: the one that Python brings may not know dependency groups.
# torch is installed before anything that depends on it, so that the pin alone decides which build is taken.
$(VENV)/.installed-pinned: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --constraint constraints.txt pip
	$(PIP_INSTALL) --constraint constraints.txt torch==2.13.0
	$(PIP_INSTALL) --constraint constraints.txt hatchling editables
	$(PIP_INSTALL) --constraint constraints.txt --no-build-isolation --group dev --editable '.[$(EXTRAS)]'
	@touch $@

# An interpreter in an environment lends its packages by the .pth file; the option is for those of the system.
# setuptools is left out with torch because torch releases bound it differently.
$(VENV)/.installed-system: constraints.txt pyproject.toml
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(PYTHON) -c '$(PACKAGES)' > "$$($(BIN)/python -c '$(PACKAGES)')/outer.pth"
	@$(BIN)/python -c 'import torch; print("using torch", torch.__version__)'
	grep --invert-match --extended-regexp '^(torch|setuptools)==' constraints.txt > $(VENV)/constraints.txt
	$(PIP_INSTALL) --constraint $(VENV)/constraints.txt pip
	$(PIP_INSTALL) --constraint $(VENV)/constraints.txt hatchling editables
	$(PIP_INSTALL) --constraint $(VENV)/constraints.txt --no-build-isolation --group dev --editable '.[$(EXTRAS)]'
	@touch $@
