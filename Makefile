# Everything a developer or a first-time user types. Needs make and Python 3.11, 3.12 or 3.13; no C compiler.
# Another interpreter: make test PYTHON=python3.12 (the environment is made again when its version changes).
# Tests run in as many processes as there are cores, at most four, or in WORKERS of them; 0 is this one, for a debugger.

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=
WORKERS ?= auto --maxprocesses=4
ARGS ?=

VENV := .venv
PARITY := .venv-parity
TUNIX := .venv-tunix
EASYDEL := .venv-easydel
DOCS := .venv-docs
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
# Whole files at a time: the tests of one share what they compile.
PYTEST = -m pytest -n $(WORKERS) --dist=loadfile
PIP_INSTALL = -m pip install --disable-pip-version-check --prefer-binary --quiet $(PIP_FLAGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env quickstart test slow parity bench check format docs clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

quickstart: $(VENV)/run-$(VERSION).stamp ## install what running needs and run the embedded example
	$(VENV)/bin/python -m sera_jax.main --config=configs/quickstart.py

env: $(VENV)/test-$(VERSION).stamp ## make .venv with the run-time and test packages

test: $(VENV)/test-$(VERSION).stamp ## run the tests
	$(VENV)/bin/python $(PYTEST) $(PYTEST_FLAGS)

slow: $(VENV)/test-$(VERSION).stamp ## run the slow tests: kills, several devices, damaged files and rows, wrong configs, the worlds
	$(VENV)/bin/python -m pytest -m slow $(PYTEST_FLAGS)

parity: $(PARITY)/parity-$(VERSION).stamp ## compare with PyTorch implementations, in an environment of their own
	$(PARITY)/bin/python $(PYTEST) tests/parity $(PYTEST_FLAGS)

bench: $(PARITY)/parity-$(VERSION).stamp ## time the same work by ours and by its peers, in turns: ARGS="--works W1 --check"
	$(MAKE) $(TUNIX)/tunix-$(VERSION).stamp || echo "Tunix cannot be installed, so it is left out"
	$(MAKE) $(EASYDEL)/easydel-$(VERSION).stamp || echo "EasyDeL cannot be installed, so it is left out"
	$(PARITY)/bin/python -m tests.benchmarks.bench $(ARGS)

check: $(VENV)/test-$(VERSION).stamp ## formatting, lint, types
	@failed=0; \
	for command in "ruff format --check ." "ruff check ." "pyright --pythonpath $(VENV)/bin/python"; do \
	  echo "$$command"; $(VENV)/bin/$$command || failed=1; \
	done; exit $$failed

format: $(VENV)/test-$(VERSION).stamp ## format the code and repair what lint can repair
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

docs: $(DOCS)/docs-$(VERSION).stamp ## build the documentation as a site, which is opened at site/index.html
	rm -rf site
	$(DOCS)/bin/python -m sphinx -b html -c docs -d .cache/docs -E -n -W --keep-going -q . site
	cp site/README.html site/index.html

clean: ## remove the environments, the caches and the site; runs/ stays
	rm -rf $(VENV) $(PARITY) $(TUNIX) $(EASYDEL) $(DOCS) site .cache .pytest_cache .ruff_cache
	find sera_jax tests configs studies -name __pycache__ -prune -exec rm -rf {} +

# Stamps carry the interpreter's version, so that PYTHON=python3.12 after python3.11 starts afresh, and nothing is
# installed again while the requirement files stay as they are.
%/python-$(VERSION).stamp:
	@$(PYTHON) -c 'import sys; ok = sys.version_info >= (3, 11); ok or print(sys.version); sys.exit(not ok)' || { \
	  echo "sera_jax needs Python 3.11, 3.12 or 3.13, which '$(PYTHON)' is not: give one, as in make PYTHON=python3.12"; \
	  exit 1; }
	$(PYTHON) -m venv --clear $*
	@echo "installing packages into $* (once; up to 1.6 GB, minutes on a slow line)"
	touch $@

$(VENV)/run-$(VERSION).stamp: requirements.txt | $(VENV)/python-$(VERSION).stamp
	$(VENV)/bin/python $(PIP_INSTALL) -r requirements.txt
	touch $@

$(VENV)/test-$(VERSION).stamp: requirements.txt requirements-test.txt | $(VENV)/python-$(VERSION).stamp
	$(VENV)/bin/python $(PIP_INSTALL) -r requirements.txt -r requirements-test.txt
	touch $(VENV)/run-$(VERSION).stamp $@

$(PARITY)/parity-$(VERSION).stamp: requirements.txt requirements-test.txt requirements-parity.txt | $(PARITY)/python-$(VERSION).stamp
	$(PARITY)/bin/python $(PIP_INSTALL) -r requirements.txt -r requirements-test.txt -r requirements-parity.txt
	touch $@

$(TUNIX)/tunix-$(VERSION).stamp: requirements-tunix.txt | $(TUNIX)/python-$(VERSION).stamp
	$(TUNIX)/bin/python $(PIP_INSTALL) -r requirements-tunix.txt
	touch $@

$(EASYDEL)/easydel-$(VERSION).stamp: requirements-easydel.txt | $(EASYDEL)/python-$(VERSION).stamp
	$(EASYDEL)/bin/python $(PIP_INSTALL) -r requirements-easydel.txt
	touch $@

$(DOCS)/docs-$(VERSION).stamp: requirements-docs.txt | $(DOCS)/python-$(VERSION).stamp
	$(DOCS)/bin/python $(PIP_INSTALL) -r requirements-docs.txt
	touch $@
