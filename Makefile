# Two commands do all the set-up: `make demo` and `make test` make .venv where it is missing.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow test-lowest lint docs clean

demo: $(VENV)/installed
	$(RUN) -m recipes.digits.demo

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n logical -m "not slow"

test-slow: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n logical -m slow

test-lowest:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(VENV)/installed docs/gallery/.package
	OMP_NUM_THREADS=1 $(RUN) -m sphinx -q -W --keep-going -b html docs docs/_build/html

# The build runs the examples that have changed, and all of them where the package has.
docs/gallery/.package: $(shell find lightning_pc -name "*.py") docs/conf.py
	rm -rf docs/gallery
	mkdir docs/gallery
	touch $@

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c $(CONSTRAINTS) torch
	$(RUN) -m pip install -q -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-lowest docs/_build docs/gallery
