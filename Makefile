# make demo | test | bench-check | lint | sanitize | cuda | cuda-host-ops | help. Each makes its own
# virtual environment in .venv.
#
#   PYTHON        the Python to use (3.11 or newer, which TRL needs)
#   TORCH         what to install as torch; it goes first, because fusedpo is compiled against it
#   TRL_VERSIONS  what `make test-trl` tests

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
TEST_ARGS ?=
# Each with the newest transformers, datasets, accelerate and peft, which work with all of these; but
# the first with the oldest that are tried.
TRL_VERSIONS ?= 1.9.2 1.13.0 1.14.2 1.15.0 1.16.0
WITH_TRL_1.9.2 := transformers==4.56.2 datasets==4.7.0 accelerate==1.10.1 peft==0.17.1
FUZZ_SECONDS ?= 20

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
TRL_PIP = $(VENV)/trl/$*/bin/python -m pip --quiet --disable-pip-version-check
STAMPS := $(VENV)/stamps
TORCH_STAMP := $(STAMPS)/$(subst /,_,$(subst $() ,_,$(TORCH)))
BUILD_TOOLS := "scikit-build-core>=1.0" "pybind11>=3.0" "cmake>=3.25" ninja

# Everything that ends in the installed package.
INSTALLED := pyproject.toml CMakeLists.txt \
  $(shell find build_backend cmake csrc python -type f -not -path '*/__pycache__/*')
CPP := $(shell find csrc tests/cpp tests/cuda_host tests/fuzz -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# make and CI never want the silent fallback to plain torch.
export FUSEDPO_NATIVE ?= require
# Few architectures compile quickly: the GPU's that is here, else two. (Installing has them all.)
export FUSEDPO_CUDA_ARCHS ?= $(shell nvidia-smi -L > /dev/null 2>&1 && echo native || echo '80-real;90-real')

.PHONY: help demo test bench-check test-trl test-engines lint sanitize cuda cuda-host-ops neon baseline tsan fuzz cuda-host clean

help:
	@echo 'make demo      train a small model by DPO with plain TRL and with fusedpo, side by side'
	@echo 'make test      pytest and GoogleTest'
	@echo 'make bench-check  whether a kernel has become slow, by ratios to torch in the same run'
	@echo 'make test-trl  the tests that depend on TRL, on each of TRL_VERSIONS'
	@echo 'make test-engines  the tests that need DeepSpeed or bitsandbytes, which it fetches'
	@echo 'make lint      ruff, mypy --strict, clang-format'
	@echo 'make sanitize  GoogleTest under the address and undefined-behaviour sanitizers'
	@echo 'make cuda      compile the CUDA kernels for every architecture of a release and check them'
	@echo 'make cuda-host the CUDA kernels on the CPU, checked; planted faults must fail their tests'
	@echo 'make cuda-host-ops  the operators'"'"' tests over CUDA operators with emulated kernels'
	@echo 'make neon      the CPU kernels for 64-bit ARM, their tests run under QEMU'
	@echo 'make baseline  the CPU kernels on the oldest x86 processor that wheels are for, under QEMU'
	@echo 'make tsan      the store and the pool of pages, used by several threads, under the thread sanitizer'
	@echo 'make fuzz      libFuzzer on the readers of the store, for FUZZ_SECONDS (Clang only)'
	@echo 'make clean     remove .venv and build/'
	@echo 'variables: PYTHON=$(PYTHON) TORCH=$(TORCH) VENV=$(VENV) TEST_ARGS=$(TEST_ARGS)'
	@echo '           TRL_VERSIONS=$(TRL_VERSIONS)'

demo: $(STAMPS)/demo
	$(PY) examples/demo.py

test: $(STAMPS)/test
	scripts/run_tests.sh $(VENV) $(TEST_ARGS)

bench-check: $(STAMPS)/test
	$(PY) -m benchmarks.check

test-trl: $(TRL_VERSIONS:%=$(VENV)/trl/%/stamp)
	scripts/run_trl_tests.sh $(VENV)/trl "$(TRL_VERSIONS)" $(TEST_ARGS)

test-engines: $(STAMPS)/test $(STAMPS)/engines
	PYTHONPATH=$(abspath $(VENV)/engines) $(PY) -c 'import bitsandbytes, deepspeed'  # or all is skipped
	PYTHONPATH=$(abspath $(VENV)/engines) scripts/pytest.sh $(PY) -k "zero2 or zero3 or four_bits" \
	  tests/python/test_trl_distributed.py tests/python/test_trl_shadow.py $(TEST_ARGS)

lint: $(STAMPS)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

sanitize: $(STAMPS)/tools
	scripts/build_cpp_tests.sh $(VENV) build/sanitize -DFUSEDPO_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	build/sanitize/tests/cpp/fusedpo_test --gtest_brief=1

cuda: $(STAMPS)/tools
	scripts/check_cuda_build.sh $(VENV) build/cuda

cuda-host: $(STAMPS)/tools
	scripts/test_cuda_host.sh $(VENV)

cuda-host-ops: $(STAMPS)/test
	scripts/test_cuda_host_ops.sh $(VENV)

neon: $(STAMPS)/tools
	scripts/check_neon.sh $(VENV) build/neon

baseline: $(STAMPS)/tools
	scripts/check_baseline.sh $(VENV) build/cpp-tests

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

# In a folder of their own: with DeepSpeed in sight every import of accelerate is slower. No
# dependencies, or DeepSpeed would ask for packages that training does not use.
ENGINES := deepspeed==0.19.8 bitsandbytes==0.50.2 hjson msgpack py-cpuinfo einops pydantic pydantic-core annotated-types \
  typing-inspection

$(STAMPS)/engines: $(STAMPS)/tools
	rm -rf $(VENV)/engines
	$(PIP) install --target $(VENV)/engines --no-deps $(ENGINES)
	@touch $@

.PRECIOUS: $(VENV)/trl/%/pyvenv.cfg  # make deletes what it takes for an intermediate file

# One wheel for all versions of TRL.
$(STAMPS)/wheel: $(STAMPS)/tools $(INSTALLED)
	rm -rf $(VENV)/wheel
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir $(VENV)/wheel .
	@touch $@

$(VENV)/trl/%/pyvenv.cfg:
	@mkdir -p $(VENV)/trl && scripts/make_venv.sh $(PYTHON) $(VENV)/trl/$*

$(VENV)/trl/%/stamp: $(STAMPS)/wheel | $(VENV)/trl/%/pyvenv.cfg
	$(TRL_PIP) install "$(TORCH)"
	$(TRL_PIP) install "$$(echo $(VENV)/wheel/*.whl)[test]" trl==$* $(WITH_TRL_$*)
	$(TRL_PIP) install --force-reinstall --no-deps $(VENV)/wheel/*.whl
	@touch $@
