# Everything from nothing: each target makes what it needs. `make help` lists them.

PYTHON ?= python3
VENV   ?= .venv
MODEL  ?= smollm2
CONSTRAINTS ?= constraints.txt
ARGS   ?=
OUT    ?= docs/benchmarks
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv chat test lint format gpu bench docs support clean

help:
	@echo 'make venv    build .venv and install kcache in it'
	@echo 'make chat    talk to the demo model            (ARGS="--topn 64", MODEL=owner/name)'
	@echo 'make test    lint, types, tests                (ARGS="-m \"not slow\"", WORKERS=2)'
	@echo 'make lint    ruff, import-linter and mypy only'
	@echo 'make format  let ruff rewrite what it can'
	@echo 'make gpu     GPU tests and benchmark, on the Python and packages that are there'
	@echo 'make bench   measure again what docs/benchmarks.md says of the CPU   (FRESH=1 to start over)'
	@echo 'make docs    write docs/cli.md anew'
	@echo 'make support  judge every architecture of transformers again, into docs/support.md'
	@echo 'make clean   remove what was built; the demo model in the cache folder stays'
	@echo 'PYTHON=...   the Python to build with (now: $(PYTHON))'

# Rebuilt when the requirements change. Reads no standard input, which may be a message for the model, and writes to
# standard error, so that an answer can be piped on. constraints.txt pins versions; it does not add packages.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' </dev/null || { \
		echo "kcache needs Python 3.11 or newer, and $(PYTHON) is not: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version </dev/null >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) </dev/null >&2
	$(BIN)/python -m pip install --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e '.[dev]' </dev/null >&2
	@touch $@

venv: $(STAMP)

# At a terminal kcache is a job of its own: Ctrl-C stops a reply, and make, which would die of it, does not see it. When
# Ctrl-Z stops kcache, make and this shell stop, too, so that `fg` brings back all three. In bash, since other shells put
# themselves in a group apart from make's; a function, since bash leaves a loop when a job stops.
chat: SHELL := bash
chat: $(STAMP)
	@again() { s=$$?; [ "$$(kill -l $$s)" = TSTP ] || exit $$s; kill -TSTP 0; fg >/dev/null; again; }; \
	[ ! -t 0 ] || set -m; $(BIN)/kcache chat $(MODEL) $(ARGS); again

# Without a card, whether there is one or not: Triton's interpreter stands in for it. What needs one is `make gpu`.
test: lint
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu:
	OUT=$(OUT) PYTHON=$(PYTHON) benchmarks/gpu.sh $(ARGS)

bench: $(STAMP)
	KCACHE=$(BIN)/kcache PYTHON=$(BIN)/python benchmarks/cpu.sh

docs: $(STAMP)
	$(BIN)/python -m kcache_cli docs --output docs/cli.md

support: $(STAMP)
	$(BIN)/kcache models --verify --output docs/support.md

clean:
	rm -rf $(VENV) .venv-newest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find kcache kcache_cli tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
