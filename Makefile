# Everything here sets itself up: a virtual environment in $(VENV) with the tested versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
# One thread per test process: PyTorch's pools spin, and several of them on few cores slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(RUN)/python -m pytest

.PHONY: demo test test-slow test-gpu lint clean help

help:
	@echo "make demo       distill a 50-step teacher of digits into a one-step student, measure it, write runs/quickstart"
	@echo "make test       the tests        make test-slow, make test-gpu   the long ones, those that need a GPU"
	@echo "make lint       ruff and mypy    make clean                      remove the environment and the runs"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(RUN)/distill train quickstart --overwrite

test: $(VENV)/.installed-dev
	$(PYTEST) -n 2

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -n 2 -m slow

test-gpu: $(VENV)/.installed-dev
	$(PYTEST) -m gpu

lint: $(VENV)/.installed-dev
	$(RUN)/ruff check .
	$(RUN)/mypy

clean:
	rm -rf $(VENV) runs
