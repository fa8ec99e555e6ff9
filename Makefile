# make demo | test | bench | lint | wheel | clean
# Overrides: PYTHON=python3.12 TORCH="torch==2.11.0" VENV=... CUEMU_DIR=... MAX_JOBS=... DELTAFUSE_CUDA=...
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
CUEMU_DIR ?= $(firstword $(wildcard ../shared/cuemu shared/cuemu ../cuemu))
NVCC ?= $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
DEMO_OUT ?= runs/demo
DEMO_FLAGS ?=
TEST_FLAGS ?=
SASS_TOOLS := $(if $(NVCC),nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
SOURCES := CMakeLists.txt setup.py pyproject.toml \
  $(shell find csrc python third_party -name '*.[chp]*' -not -name '*.pyc' -o -name '*.cu*' -o -name '*.cmake')

.PHONY: demo test test-native test-emulated emulated bench lint wheel clean

# torch's waiting threads sleep: on a busy machine spinning costs several times the work
demo test-native test-emulated: export OMP_WAIT_POLICY ?= passive

demo: $(VENV)/installed
	rm -rf $(DEMO_OUT)
	$(BIN)/deltafuse train --preset tiny --out $(DEMO_OUT) --compare-reference $(DEMO_FLAGS)

test: test-native test-emulated

test-native: $(VENV)/test-tools
	$(BIN)/python -m pytest -q -m "not emulated and not slow" $(TEST_FLAGS)

bench: $(VENV)/test-tools
	$(BIN)/python bench/run.py --all

lint: $(VENV)/lint-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/cpp/*.cu' | xargs $(BIN)/clang-format -n -Werror
	$(BIN)/python -m pytest -q --noconftest tests/test_layout.py

wheel: $(VENV)/torch
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps -w dist .

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/torch: $(VENV)/created
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(PIP) ".[train]"
	touch $@

$(VENV)/test-tools: $(VENV)/installed
	$(PIP) pytest pytest-benchmark numpy setuptools cmake ninja transformers==5.24.0 $(SASS_TOOLS)
	touch $@

$(VENV)/lint-tools: $(VENV)/created
	$(PIP) pytest ruff==0.14.5 clang-format==19.1.7
	touch $@

# The CUDA kernels on the emulator: test libraries in build/emulated, never installed.
ifneq ($(and $(NVCC),$(CUEMU_DIR)),)
emulated: $(VENV)/test-tools
	$(BIN)/cmake -G Ninja -S . -B build/cmake-emulated -DDELTAFUSE_CUDA=EMULATED \
	  -DCMAKE_CUDA_COMPILER="$(NVCC)" -DCUEMU_DIR="$(abspath $(CUEMU_DIR))" \
	  -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN)/ninja)" -DPython_EXECUTABLE="$(abspath $(BIN)/python)" \
	  -DTORCH_DIR="$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')"
	$(BIN)/cmake --build build/cmake-emulated --target emulated

test-emulated: emulated
	$(BIN)/python -m pytest -q -m "emulated and not slow" $(TEST_FLAGS)
else
emulated test-emulated:
	@echo "emulated CUDA tests skipped: $(if $(NVCC),no cuemu (set CUEMU_DIR),no nvcc)"
endif

clean:
	rm -rf build dist $(VENV) runs
