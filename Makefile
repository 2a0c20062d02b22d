# make demo | test | lint | sanitize | help. Each makes its own virtual environment in .venv.
#
#   PYTHON  the Python to use (3.11 or newer, which TRL needs)
#   TORCH   what to install as torch; it goes first, because fusedpo is compiled against it

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
TEST_ARGS ?=
FUZZ_SECONDS ?= 20

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
STAMPS := $(VENV)/stamps
TORCH_STAMP := $(STAMPS)/$(subst /,_,$(subst $() ,_,$(TORCH)))
BUILD_TOOLS := "scikit-build-core>=1.0" "pybind11>=3.0" "cmake>=3.25" ninja

# Everything that ends in the installed package.
INSTALLED := pyproject.toml CMakeLists.txt \
  $(shell find build_backend cmake csrc python -type f -not -path '*/__pycache__/*')
CPP := $(shell find csrc tests/cpp tests/fuzz -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# make and CI never want the silent fallback to plain torch.
export FUSEDPO_NATIVE ?= require

.PHONY: help demo test lint sanitize tsan fuzz clean

help:
	@echo 'make demo      train a small model by DPO with plain TRL and with fusedpo, side by side'
	@echo 'make test      pytest and GoogleTest'
	@echo 'make lint      ruff, mypy --strict, clang-format'
	@echo 'make sanitize  GoogleTest under the address and undefined-behaviour sanitizers'
	@echo 'make tsan      readers, writers and merges of the store under the thread sanitizer'
	@echo 'make fuzz      libFuzzer on the readers of the store, for FUZZ_SECONDS (Clang only)'
	@echo 'make clean     remove .venv and build/'
	@echo 'variables: PYTHON=$(PYTHON) TORCH=$(TORCH) VENV=$(VENV) TEST_ARGS=$(TEST_ARGS)'

demo: $(STAMPS)/demo
	$(PY) examples/demo.py

test: $(STAMPS)/test
	scripts/run_tests.sh $(VENV) $(TEST_ARGS)

lint: $(STAMPS)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

sanitize: $(STAMPS)/tools
	scripts/build_cpp_tests.sh $(VENV) build/sanitize -DFUSEDPO_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	build/sanitize/tests/cpp/fusedpo_test --gtest_brief=1

tsan: $(STAMPS)/tools
	scripts/run_tsan.sh $(VENV)

fuzz: $(STAMPS)/tools
	scripts/run_fuzz.sh $(VENV) $(FUZZ_SECONDS)

clean:
	rm -rf $(VENV) build

$(VENV)/pyvenv.cfg:
	@scripts/make_venv.sh $(PYTHON) $(VENV)

$(TORCH_STAMP): | $(VENV)/pyvenv.cfg
	$(PIP) install "$(TORCH)"
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/tools: $(TORCH_STAMP)
	$(PIP) install $(BUILD_TOOLS)
	@touch $@

# demo, test and dev are extras of the package.
$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/dev: $(STAMPS)/%: $(STAMPS)/tools $(INSTALLED)
	$(PIP) install --no-build-isolation ".[$*]"
	@touch $@
