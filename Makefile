# Everything starts here, on a fresh clone with Python 3.11+ and make:  make book   make test   make lab
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# pip arguments of your own, e.g. PIP_ARGS="--index-url https://..." for a CPU-only PyTorch
PIP_ARGS ?=
# More for pytest, e.g. PYTEST_ARGS="-k tokenizer"
PYTEST_ARGS ?=
# The tests and notebooks run in this many processes (0: in one, for a machine with little memory)
WORKERS ?= 2
# Threads a process: for the tests one, because two processes with two threads each on two cores are slower
TEST_THREADS ?= 1
THREADS ?= 2
# Threads that wait let go of their core, so that two notebooks side by side do not starve each other
export OMP_WAIT_POLICY ?= PASSIVE
export PYTHONUTF8 = 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup book test lab notebooks bench clean

help:
	@echo "make setup      a virtual environment in $(VENV), the package in it, and the files the book needs"
	@echo "make book       the book in both languages, in _build/html"
	@echo "make test       the book, every test, and every notebook against its stored outputs"
	@echo "make lab        JupyterLab on the chapters"
	@echo "make notebooks  runs the notebooks and stores their outputs (one chapter: make notebooks NB=quickstart)"
	@echo "make bench      the benchmarks, one after another"
	@echo "make clean      removes what was built; $(VENV) and the cache of fetched files stay"
	@echo "Every target but clean does the set-up first; what is there already is not done again."
	@echo "Another Python: make setup PYTHON=python3.12"

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "The book needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 || true)"; \
	  echo "Install a newer one, and if it has another name: make setup PYTHON=python3.12"; exit 1; }
	@echo "Setting up: $$($(PYTHON) --version) in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "No virtual environment could be made. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(PY) -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) --upgrade pip
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@test -f $@ && echo "pyproject.toml or constraints.txt changed: installing what differs" || \
	  echo "Installing the package and what it needs (a download of some hundred MB to a few GB)"
	@began=$$(date +%s); quiet=$$(test -f $@ && echo --quiet); \
	$(PY) -m pip install --disable-pip-version-check $$quiet $(PIP_ARGS) -e '.[book,dev]' -c constraints.txt || { \
	  echo; echo "The installation did not finish; 'make setup' goes on from here. If the network is slow or closed,"; \
	  echo "name a mirror near you: make setup PIP_ARGS='--index-url ADDRESS'"; exit 1; }; \
	echo "Installed in $$(( $$(date +%s) - began )) s"
	@touch $@

# Not behind a stamp: the files lie in the user's cache, where somebody may delete them. Checking takes half a second.
setup: $(VENV)/.installed
	@$(VENV)/bin/aquila2-tut assets fetch >/dev/null

book: setup
	@$(PY) book/build.py

# One pytest run, so that its last line counts the tests and the notebooks together.
test: setup book
	@OMP_NUM_THREADS=$(TEST_THREADS) $(PY) -m pytest tests book/en book/zh --continue-on-collection-errors -n $(WORKERS) --dist loadscope \
	  --nbval --nbval-current-env --nbval-sanitize-with tests/book/sanitize.cfg $(PYTEST_ARGS)

lab: setup
	@$(PY) -m jupyterlab --LabApp.default_url=/lab/tree/book

notebooks: setup
	@OMP_NUM_THREADS=$(THREADS) $(PY) book/run_notebooks.py $(NB)

bench: setup
	@status=0; for file in benchmarks/*.py; do \
	  echo; echo "== $$file"; OMP_NUM_THREADS=$(THREADS) $(PY) "$$file" || status=1; done; exit $$status

clean:
	rm -rf _build .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
