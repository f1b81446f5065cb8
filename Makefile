# make quickstart | test | test-slow | test-sglang | test-cross-check | check | fmt | bench
# PYTHON: the interpreter the environment is made with. TORCH: what pip installs as torch (for a CUDA build of your own,
# say TORCH=torch==2.11.0, or TORCH= to keep what the interpreter already has: then the environment sees its packages).
# TEST_JOBS: how many test files run at a time.
PYTHON ?= python3
TEST_JOBS ?= 2
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp-$(shell cat setup.py Makefile 2>/dev/null | cksum | cut -d' ' -f1)

.PHONY: quickstart test test-slow test-sglang test-cross-check check fmt bench clean

quickstart: $(STAMP)
	$(BIN)/flowrl run recipes/quickstart.yaml run.name=quickstart-$$(date +%Y%m%d-%H%M%S)

test: $(STAMP)-dev
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --durations=30 -m "not sglang and not slow"

test-slow: $(STAMP)-dev
	$(BIN)/python -m pytest -m slow

test-sglang: $(STAMP)-dev
	tests/sglang_cpu/install.sh .venv-sglang
	FLOWRL_REQUIRE_SGLANG=1 $(BIN)/python -m pytest -m "sglang and not slow"

# Losses, KL and masks against TRL's own, which this installs beside.
test-cross-check: $(STAMP)-dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[cross_check]'
	FLOWRL_REQUIRE_TRL=1 $(BIN)/python -m pytest tests/algorithms/test_against_trl.py

check: $(STAMP)-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

fmt: $(STAMP)-dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(STAMP)-dev
	$(BIN)/python benchmarks/time_to_reward.py

# torch comes first and by itself, so that nothing else chooses another build of it.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "FlowRL needs Python 3.11 or later; $(PYTHON) is older. Try: make PYTHON=python3.12"; exit 1; }
	@test -d $(VENV) || $(PYTHON) -m venv $(if $(TORCH),,--system-site-packages) $(VENV)
	$(if $(TORCH),$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH))
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[tasks]'
	@rm -f $(VENV)/.stamp-* && touch $@

$(STAMP)-dev: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[tasks,parquet,dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-sglang build *.egg-info
