# make book   the book, in _build/html
# make zip    the book as one file to hand on, _build/morph-book-VERSION.zip
# make test   lint, types, every notebook at the smoke preset, the book without warnings, all tests
# make latency  calibrate this machine, time three small shapes on it, and make the first chapter's page with them
# make study  train what is left of the study of small models; TABLE=_build/own_runs.csv trains all of it into a table of your own
# make notebook NB=03 P="exponents=free"  one notebook with parameters of your own, and its page, under _build/own
# make diff   what changed between the published numbers and those just computed, and which verdicts moved
# make published  record the numbers just computed as the published ones; they are committed with the change that moved them
# make faults  kill the build at ten moments, damage its files, fill its disk; a table of what happened (ten to twenty minutes)
# They install what they need into .venv first. PYTHON and PRESET can be set: make book PRESET=smoke.

PYTHON ?= python3
PRESET ?= laptop
TABLE ?= morphlib/data/small_runs.csv
BEFORE ?= morphlib/data/published.json
AFTER ?= _build/$(PRESET)/tree/notebooks
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: book zip test latency study notebook diff published faults lock clean

book: $(VENV)/installed
	@python -m morphlib.pipeline snakemake publish --cores all --quiet rules --config preset=$(PRESET)
	@echo "The book: $(CURDIR)/_build/html/index.html"

zip: book
	@file=_build/morph-book-$$(python -c 'import morphlib; print(morphlib.__version__)').zip && \
	python -m morphlib.pipeline zip _build/html $$file && echo "The book as one file: $(CURDIR)/$$file"

test: $(VENV)/installed
	ruff check .
	ruff format --check .
	mypy
	python -m morphlib.pipeline snakemake --cores all --quiet rules --config preset=smoke
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 pytest -n 2 --dist loadfile

latency: $(VENV)/installed
	rm -f _build/own_latency.csv
	morph latency calibrate
	morph latency measure --shape 24x384/8192v --shape 12x576/8192v --shape 4x960/8192v --threads 1 --out-tokens 64 --quick --record _build/own_latency.csv
	@python -m morphlib.pipeline notebook 01 --preset $(PRESET)
	@echo "make book puts the rows into every figure of the book that has a place for them."

study: $(VENV)/installed
	@python -m morphlib.pipeline snakemake study --cores all --keep-going --config table=$(TABLE)

# P reaches the shell as it was given: make exports what stands on its command line
notebook: $(VENV)/installed
	@python -m morphlib.pipeline notebook "$(NB)" --preset $(PRESET) --parameters "$$P"

diff: $(VENV)/installed
	@python -m morphlib.pipeline diff $(BEFORE) $(AFTER)

published: $(VENV)/installed
	@python -m morphlib.pipeline record _build/laptop/tree/notebooks morphlib/data/published.json

faults: $(VENV)/installed
	@python benchmarks/faults.py

# The stamp is written last, so that an interrupted installation is taken up again.
$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; set PYTHON=..." >&2; exit 2; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --progress-bar off -r requirements.lock
	$(VENV)/bin/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@

# Resolves pyproject.toml anew. Run it with a CPU-only torch, so that no CUDA package is pinned.
lock:
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --editable '.[notebooks,book,models,dev]'
	$(VENV)-lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock
	rm -rf $(VENV)-lock

clean:
	rm -rf _build .snakemake
