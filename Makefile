# Two commands for a bare clone: `make demo` and `make test`. Everything they need goes into .venv, build/ and demo/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find ace_ext csrc -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
JOBS ?= 2

.PHONY: demo test test-cpp test-python check-kernels check-memory gpu lint clean

demo: $(VENV)/installed
	PYTHON=$(BIN)/python tools/demo.sh

test: test-cpp test-python

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip 'setuptools>=77' wheel ninja numpy 'torch>=2.11'
	touch $@

# The same command as a user's. Not in the tree: the tests import what was installed.
$(VENV)/installed: $(VENV)/ready $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation '.[test]'
	touch $@

test-python: $(VENV)/installed
	$(BIN)/pytest

# The core and the CUDA kernels' source on the host: plain, under the sanitizers, and with a thread a CUDA thread.
test-cpp:
	tools/system_packages.sh
	tools/test_cpp.sh build/cpp ""
	tools/test_cpp.sh build/cpp-asan "address,undefined"
	tools/test_cpp.sh build/cpp-tsan "thread"

# What nvcc makes of the kernels: warnings, spills, 128-bit loads. Needs nvcc, but no GPU.
check-kernels: $(VENV)/ready
	tools/check_nvcc.sh build/nvcc
	$(BIN)/pip install --quiet nvidia-cuda-nvdisasm
	$(BIN)/python tools/check_sass.py build/nvcc

# A model of over 4 GB on the disk, pruned under 2 GB of memory, and its small twin both ways. Takes some minutes.
check-memory: $(VENV)/installed
	$(BIN)/python tools/check_memory.py

# Needs a GPU, a torch built for CUDA in $(PYTHON), and nvcc.
gpu:
	PYTHON=$(PYTHON) tools/gpu.sh

lint: $(VENV)/ready
	$(BIN)/pip install --quiet 'ruff==0.17.6'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build demo
