# Everything a person does with this repository, from a fresh clone on. `make` alone lists it.
#
# The first target that needs it makes .venv with the torch of constraints.txt; stamps in .venv/.made and build/ then
# keep each step from running twice. Nothing is installed outside the environment and .cuda.

PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?=
ARGS ?=

# Make's own default is g++, torch's is c++, and a machine may have clang++ alone.
ifeq ($(origin CXX),default)
CXX := $(firstword $(foreach name,c++ g++ clang++,$(shell command -v $(name))))
endif
export CXX

PY := $(VENV)/bin/python
MADE := $(VENV)/.made
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml tools/cuda.py tools/toolkit.py

SETTINGS := $(abspath $(VENV)) $(CXX) $(FORCE_CUDA) $(CUDA_HOME) $(CUDA_PATH) $(TORCH_CUDA_ARCH_LIST)
# One tree may be built for several environments and settings in turn: the last build is the one in place.
BUILT := build/for-$(firstword $(shell echo '$(SETTINGS)' | cksum))

# What says that torch is there, and what holds pip to it.
ifeq ($(VENV),.venv)
TORCH := $(MADE)/torch
CONSTRAINTS := constraints.txt
else
TORCH := $(MADE)/constraints.txt
CONSTRAINTS := $(TORCH)
endif
PIP = $(PY) -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS)

TOOLS_build := 'setuptools>=77,<82' wheel 'pybind11>=2.13' ninja numpy
TOOLS_test := 'pytest>=8' pytest-cov hypothesis build scikit-learn 'pytorch-metric-learning>=2.9,<3' matplotlib tqdm pillow
TOOLS_train := scikit-learn matplotlib tqdm pillow
TOOLS_demo := scikit-learn matplotlib tqdm
TOOLS_bench := matplotlib
TOOLS_lint := ruff mypy clang-format

# This tree comes first, whatever roadmap_ext the environment may hold.
export PYTHONPATH := $(CURDIR)

FAIL = { echo "$(1)" >&2; exit 1; }

.PHONY: help build test demo train bench lint asan clean FORCE
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make demo     train an embedding with the loss and draw what comes of it"
	@echo "make train    train a network for retrieval: ARGS='--data-root ...', ARGS=--help for all there is"
	@echo "make test     the tests, with their coverage"
	@echo "make lint     ruff, mypy and clang-format, changing nothing"
	@echo "make bench    time and memory against plain PyTorch"
	@echo "make build    compile the extension into roadmap_ext/"
	@echo "make asan     the C++ core under the address and undefined-behaviour sanitizers"
	@echo "make clean    remove what was built; .venv and .cuda stay (rm -r them for a fresh start)"
	@echo
	@echo "PYTHON=python3.12     the Python, 3.10 or newer, that .venv is made with"
	@echo "VENV=path             use this environment and its torch, 2.11 or newer, instead of .venv"
	@echo "TORCH_ARGS='...'      options for pip when it installs torch into .venv, such as --index-url"
	@echo "ARGS='...'            options for what demo, train, test and bench run"
	@echo "FORCE_CUDA=1 or 0     demand the CUDA kernels, or leave them out"

build: $(BUILT)
	@echo "roadmap_ext is built for $(VENV)"

test: $(BUILT) $(MADE)/test
	@$(PY) -m pytest --cov=roadmap_ext --cov-fail-under=95 $(ARGS)

demo: $(BUILT) $(MADE)/demo
	@$(PY) examples/digits.py $(ARGS)

train: $(BUILT) $(MADE)/train
	@$(PY) examples/train_retrieval.py $(ARGS)

bench: $(BUILT) $(MADE)/bench
	@$(PY) -m benchmarks.ap_loss $(ARGS)
	@$(PY) -m benchmarks.roadmap_loss $(ARGS)
	@$(PY) -m benchmarks.retrieval_metrics $(ARGS)

# Needs no build: mypy reads roadmap_ext/_C.pyi, and torch is there for its types.
lint: $(MADE)/lint
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@find csrc -type f | xargs $(VENV)/bin/clang-format --dry-run --Werror

# Needs a compiler alone: the core knows nothing of torch.
asan:
	@bash tests/native/run.sh

clean:
	@rm -rf build dist *.egg-info .coverage .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@rm -f roadmap_ext/*.so roadmap_ext/_reference_only.py
	@find roadmap_ext tests tools examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

# --- the environment -------------------------------------------------------------------------------------------------

ifeq ($(VENV),.venv)
$(TORCH): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  $(call FAIL,$(PYTHON) is not a Python of 3.10 or newer: install one and name it: make PYTHON=python3.12)
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  $(call FAIL,$(PYTHON) cannot make virtual environments: install its venv package (Debian and Ubuntu: python3-venv))
	@echo "making .venv with $$(sed -n 's/^torch==/torch /p' constraints.txt) (once)"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(PIP) $(TORCH_ARGS) torch
	@mkdir -p $(MADE) && touch $@
else
# An environment of the user's: its torch stays as it is, and pip is held to it.
$(TORCH):
	@[ -x $(PY) ] || $(call FAIL,VENV=$(VENV) is no Python environment: there is no $(PY))
	@$(PY) -m pip --version >/dev/null 2>&1 || $(call FAIL,VENV=$(VENV) has no pip: run $(PY) -m ensurepip)
	@$(PY) -c 'import sys, torch; sys.exit((*map(int, torch.__version__.split(".")[:2]),) < (2, 11))' 2>/dev/null || \
	  $(call FAIL,VENV=$(VENV) has no torch of 2.11 or newer: install one there or leave VENV out to get .venv)
	@mkdir -p $(MADE)
	@$(PY) -c 'import torch; print(f"torch=={torch.__version__}")' >$@
endif

$(MADE)/%: $(TORCH) Makefile
	@echo "installing the tools for $* into $(VENV) (once): $(TOOLS_$*)"
	@$(PIP) $(TOOLS_$*)
	@touch $@

# --- the extension ---------------------------------------------------------------------------------------------------

# A .pth file rather than an editable install: ninja then compiles again only what changed. --force makes it look:
# setuptools compares file times alone and would miss other compiler flags.
$(BUILT): $(MADE)/build $(SOURCES) $(if $(wildcard roadmap_ext/_C*.so),,FORCE)
	@command -v $(or $(firstword $(CXX)),c++) >/dev/null || \
	  $(call FAIL,there is no C++ compiler: install g++ or clang++ (Debian and Ubuntu: build-essential) or set CXX)
	@$(PY) -c 'import os, sysconfig; os.stat(sysconfig.get_paths()["include"] + "/Python.h")' 2>/dev/null || \
	  $(call FAIL,Python.h is not there: install the headers of this Python (Debian and Ubuntu: python3-dev))
	@echo "building roadmap_ext for $(VENV) (half a minute; log in build/log)"
	@mkdir -p build && rm -f build/for-* roadmap_ext/_reference_only.py
	@root=$$($(PY) -m tools.toolkit) && env $${root:+CUDA_HOME="$$root"} \
	  $(PY) setup.py build_ext --inplace --force >build/log 2>&1 || { cat build/log >&2; exit 1; }
	@grep '^CUDA kernels' build/log || true
	@echo "$(CURDIR)" >"$$($(PY) -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/roadmap_ext.pth"
	@touch $@
