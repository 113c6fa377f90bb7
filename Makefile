# make run opens the page. What a target installs it installs once; after that everything works without a network.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.txt)
TORCH_CPU := https://download.pytorch.org/whl/cpu
DRIVER := $(shell { [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi; } >/dev/null 2>&1 && echo yes)
ZIG := $(shell sed -n 's/.*"\(ziglang[^"]*\)".*/\1/p' pyproject.toml)

.PHONY: run setup test test-all test-full lint browser bench seedling

run: setup  ## open the studio; ARGS="--port 8000" passes options on
	$(PY) app.py $(ARGS)

setup: $(VENV)/.installed $(VENV)/.compiler

# Linux wheels of torch carry several GB of CUDA libraries: without an NVIDIA driver the CPU build does the same.
$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Niwaki needs Python 3.11 or later, $(PYTHON) is older: make PYTHON=python3.12"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { echo "no virtual environment: apt-get install python3-venv"; exit 1; }
	@if [ "$$(uname -s)" = Linux ] && [ -z "$(DRIVER)" ]; then \
	    echo "No NVIDIA driver here: taking the CPU build of torch $(TORCH)."; \
	    $(PIP) install --no-deps --retries 1 --timeout 15 --index-url $(TORCH_CPU) torch==$(TORCH) || { \
	        echo "$(TORCH_CPU) does not answer: taking torch $(TORCH) from pip's usual sources."; \
	        $(PIP) install --no-deps torch==$(TORCH); }; \
	fi
	$(PIP) install -r requirements.txt
	@touch $@

# A C++ compiler builds the passes with which a processor with AVX-512 VNNI multiplies a big model's layers.
$(VENV)/.compiler: $(VENV)/.installed
	@if [ -z "$(DRIVER)" ] && grep -qs avx512_vnni /proc/cpuinfo && \
	    ! { command -v "$${CXX:-g++}" || command -v g++ || command -v c++ || command -v clang++; } >/dev/null; then \
	    echo "No C++ compiler here: taking zig's."; \
	    $(PIP) install "$(ZIG)" || echo "It can't be had: big models will take longer on this processor."; \
	fi
	@touch $@

$(VENV)/.test-tools: $(VENV)/.installed pyproject.toml
	$(PIP) install -e '.[test]'
	@touch $@

lint: $(VENV)/.test-tools
	$(PY) -m ruff check .
	$(PY) -m mypy

test: lint browser  ## the short round, in three processes
	$(PY) -m pytest -n 3 --max-worker-restart 1 --timeout 240 -m "not slow"

test-all: test  ## the short round, then the slow ones, which want the memory for themselves: training, the 4B model once
	$(PY) -m pytest -m "slow and not full_size"

test-full: $(VENV)/.test-tools  ## the 4B model with random codes on this CPU, in every size: its memory
	$(PY) -m pytest -m full_size -s tests/test_full_size.py

# Chromium for tests/browser, FriBiDi for Pillow's complex scripts. Where they can't be installed those tests are skipped
# and say so; in CI they must not be.
browser:
	@missing=""; \
	command -v chromium >/dev/null || missing="chromium"; \
	[ "$$(uname -s)" != Linux ] || ls /usr/lib/*/libfribidi.so.0 /usr/lib*/libfribidi.so.0 >/dev/null 2>&1 || \
	    $(PY) -c 'import ctypes; ctypes.CDLL("libfribidi.so.0")' 2>/dev/null || missing="$$missing libfribidi0"; \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing \
	        && exit 0; \
	fi; \
	echo "Missing for the browser tests: $$missing (on Debian: apt-get install $$missing)."; \
	[ "$$CI" != true ] || exit 1; \
	echo "Those tests are skipped."

bench: $(VENV)/.test-tools browser  ## our rows of SPEED.md; PACK=folder: a whole step of that pack, its cold start, its peers
	for model in seedling-dense seedling-ternary seedling-binary; do $(PY) app.py bench --model $$model --json || exit; done
	$(PY) -m tests.floor $(PACK)
	$(if $(PACK),$(PY) -m tests.cold $(PACK))
	$(if $(PACK),$(PY) -m tests.peers $(PACK))
	$(PY) -m tests.browser.measure
	$(PY) -m studio.bench_history --json

seedling: $(VENV)/.test-tools  ## train the demo model again: hours
	$(PY) -m engine.seedling $(ARGS)
