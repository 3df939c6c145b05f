# Everything here works from a clone and Python alone. The targets share one environment, .venv; the stamp files in it
# depend on pyproject.toml and constraints.txt, so a second run does not install again.
# Choose the interpreter with `make test PYTHON=python3.12`, pass options on with `make test ARGS="-k rows -x"`.

PYTHON ?= python3
ARGS ?=
# of the tests that learn, e.g. `make slow SEEDS="0 1 2"`
SEEDS ?= 0

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
# Always with the constraints: another torch than the one pinned there brings gigabytes of CUDA packages.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# The processor of Qwen3-VL imports torchvision. Its wheel is a CUDA build: beside a CPU torch it would break
# `import sentence_transformers`, so it never enters the environment itself. It lies in a folder of its own that
# tests/conftest.py puts on the path, after preparing torch for it. Without the folder those tests are skipped.
TORCHVISION_FOR_TESTS := $(VENV)/test-only

# One thread: two threads on two busy cores ran up to ten times slower. The tests never reach for the Hub.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MMTUNE_TEST_SEEDS="$(SEEDS)" \
	MMTUNE_TEST_TORCHVISION="$(CURDIR)/$(TORCHVISION_FOR_TESTS)"

# A process for each core, a file of tests at a time: a file builds its models and runs once.
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# The oldest versions of the declared ranges, in an environment of their own. torchvision is not in it: the tests of
# Qwen3-VL are skipped.
OLDEST := .venv-oldest
OLDEST_TESTS := $(addprefix tests/test_,testing.py dataset.py evaluation.py precision.py rerankers.py routers.py)

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest slow check format docs build clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## train a small model on drawn pages; leaves the model and a report in demo-output/
	$(BIN)/python examples/demo.py --output demo-output $(ARGS)

test: $(INSTALLED_DEV)  ## run the tests, without those marked slow
	$(PYTEST) $(ARGS)

test-oldest: $(OLDEST)/.installed  ## run the tests of models, data and evaluation on the oldest versions of the ranges
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest $(OLDEST_TESTS) $(ARGS)

slow: $(INSTALLED_DEV)  ## run the tests marked slow
	$(PYTEST) -m slow $(ARGS)

check: $(INSTALLED_DEV)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: $(INSTALLED_DEV)  ## rewrite the code as `make check` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED_DEV)  ## build the documentation into docs/_build/html; a warning is an error
	HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

build: $(INSTALLED_DEV)  ## build the wheel and the source distribution into dist/
	$(BIN)/python -m build --no-isolation

clean:  ## remove what the other targets made, the environment too
	rm -rf $(VENV) $(OLDEST) build dist demo-output docs/_build .pytest_cache .ruff_cache .hypothesis
	find . -type d -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'The versions in constraints.txt need Python 3.11 or newer. Choose one with PYTHON=python3.12.'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[report]'
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(PIP_INSTALL) --editable '.[dev,lora,pdf,generate,audio,video,report,mteb]'
	$(PIP_INSTALL) --no-deps --upgrade --target $(TORCHVISION_FOR_TESTS) torchvision \
		|| echo 'No torchvision wheel here: the tests that need one are skipped.'
	@touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --constraint constraints-oldest.txt --editable '.[lora]' \
		pytest pytest-timeout pytest-xdist hypothesis ir-measures pytrec_eval-terrier
	@touch $@
