# Two commands for a bare clone: `make demo` and `make test`. Everything they need goes into .venv, build/ and demo/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find ace_ext csrc -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')
JOBS ?= 2

.PHONY: demo test test-cpp test-python test-quick check-kernels check-arm check-memory check-pages check-vllm fuzz gpu lint docs dist clean \
	nightly nightly-python nightly-cpp nightly-fuzz coverage coverage-python coverage-cpp coverage-core mutation \
	mutation-python licenses test-oldest

demo: $(VENV)/installed
	PYTHON=$(BIN)/python tools/demo.sh

test: test-cpp test-python

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip 'setuptools>=77' wheel ninja numpy 'torch>=2.11'
	touch $@

# Installed as a user would, not in place: the tests import the installed package.
$(VENV)/installed: $(VENV)/ready $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation '.[test]'
	touch $@

# Each process of pytest computes with one thread: the tests' tensors are small, and JOBS processes are quicker.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --dist worksteal

test-python: $(VENV)/installed
	$(PYTEST)

# The tests for a change to Python, in less than three minutes on two cores once the package is installed. Left out are
# whole runs in many variants, what starts many processes, and ops that only a change to C++ reaches. `make test` runs all.
SLOW := bench/test_contest cli/test_bad_inputs engine/test_distillation engine/test_distributed models/test_families models/test_lockstep \
	ops/test_balance_restore ops/test_errors ops/test_gpu ops/test_mask_prune ops/test_packed project/test_counts \
	project/test_examples project/test_fetch_models project/test_notebook project/test_paper_tables \
	runs/test_full_disk runs/test_heal runs/test_memory_model runs/test_offload runs/test_real_model runs/test_resume \
	runs/test_statistics_file runtime/test_quantizer
test-quick: $(VENV)/installed
	$(PYTEST) $(SLOW:%=--ignore=python_tests/%.py)

# The C++ core, and the CUDA kernels on the host: all with the address and undefined-behaviour sanitizers, and the kernels
# without them too, where (with nvcc) their PTX is run as well.
test-cpp:
	tools/system_packages.sh
	ACE_KERNELS_ONLY=ON tools/test_cpp.sh build/cpp ""
	tools/test_cpp.sh build/cpp-asan "address,undefined"

# Checks of the code that nvcc generates: warnings, spills, registers, 128-bit loads. Needs nvcc, but no GPU.
# ACE_CUDA_ARCHS=80, as CI does, leaves sm_90 to the nightly job.
check-kernels: $(VENV)/tools
	tools/check_nvcc.sh build/nvcc
	$(BIN)/python tools/check_registers.py build/nvcc build/ptx/sm_80
	$(BIN)/python tools/check_sass.py build/nvcc
	PYTHON=$(BIN)/python tools/check_glue.sh

# The C++ tests of what runs on a CPU, built for 64-bit ARM and run in an emulator.
check-arm: $(VENV)/ready
	PYTHON=$(BIN)/python tools/check_arm.sh build/arm

# Prunes a model of over 4 GB from the disk within 2 GB of memory, and a small one from the disk and in memory, and
# compares the bytes of the latter two. Takes some minutes.
check-memory: $(VENV)/installed
	$(BIN)/python tools/check_memory.py

# Opens what a run, a comparison and a measurement write for people in Chromium, as on a desktop and on a phone. Leaves
# screenshots in build/pages.
check-pages: $(VENV)/installed
	tools/browser.sh
	$(BIN)/pip install --quiet playwright
	ACE_PAGES="$$PWD/build/pages" OMP_NUM_THREADS=1 $(BIN)/pytest -m browser python_tests/reporting/test_browser.py

# Serves packed models with vLLM and asks them through an OpenAI client, in an environment of its own, .venv-vllm (2 GB).
check-vllm:
	PYTHON=$(PYTHON) tools/vllm_env.sh .venv-vllm
	mkdir -p build/vllm
	ACE_VLLM_FOLDERS=build/vllm OMP_NUM_THREADS=1 .venv-vllm/bin/pytest -m vllm python_tests/serving

# Mutates a model's files and runs the command line on them, for FUZZ_SECONDS.
FUZZ_SECONDS ?= 30
fuzz: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tools/fuzz.py --seconds $(FUZZ_SECONDS)

# What takes hours, or would rarely find what `make test` does not; docs/trust.md has the figures. Each part can be run
# alone.
nightly: nightly-python test-oldest nightly-cpp check-kernels check-arm check-memory check-pages check-vllm coverage mutation licenses nightly-fuzz

# The tests that `make test` leaves out (pyproject.toml, addopts), also those that need lm-eval, llama.cpp or ONNX Runtime.
nightly-python: $(VENV)/installed
	$(BIN)/pip install --quiet 'lm-eval[hf]>=0.4.9' 'xllamacpp>=2026.10' onnxruntime onnxscript
	$(PYTEST) -m nightly

# The tests with the oldest releases that pyproject.toml allows, in an environment of its own. On Linux pip fetches a
# torch built for CUDA for it, some 3 GB; nothing of it runs on a GPU.
test-oldest:
	ACE_CUDA=0 PIP_CONSTRAINT="$$PWD/.ci/oldest.txt" $(MAKE) test-python VENV=.venv-oldest

# The kernels' source and PTX under sanitizers, also under ThreadSanitizer, which takes each CUDA thread for a thread; `make
# test` runs the source under the first two, and the PTX without sanitizers. Also compares the PTX for sm_90 with that for
# sm_80, which is the one that is run.
nightly-cpp:
	tools/system_packages.sh
	ACE_CUDA_ARCHS="80 90" ACE_ALL_TYPES=ON tools/test_cpp.sh build/cpp-asan "address,undefined"
	ACE_CUDA_ARCHS="80" ACE_ALL_TYPES=ON tools/test_cpp.sh build/cpp-tsan "thread"

nightly-fuzz:
	$(MAKE) fuzz FUZZ_SECONDS=3600

# Lines and branches that the tests of `make test` reach: of ace_ext by the Python tests, of csrc by the C++ tests.
coverage: coverage-python coverage-cpp

coverage-python: $(VENV)/installed $(VENV)/tools
	$(PYTEST) --cov --cov-report=term:skip-covered

coverage-cpp: $(VENV)/tools
	tools/system_packages.sh
	PATH="$$PWD/$(BIN):$$PATH" tools/coverage_cpp.sh build/cpp-coverage

# Of csrc/core alone, by its own tests.
coverage-core: $(VENV)/tools
	tools/system_packages.sh
	PATH="$$PWD/$(BIN):$$PATH" tools/coverage_cpp.sh --core build/cpp-core-coverage

# Changes operators of csrc/core one at a time and counts how many changes the tests notice.
mutation: $(VENV)/ready
	tools/system_packages.sh
	$(BIN)/python tools/mutate.py

# The same for the Python files that pyproject.toml names (tool.mutmut); MUTANTS is a pattern of their names. A second call
# continues where the first stopped. Not yet run as a whole, so not a part of nightly.
MUTANTS ?= *
mutation-python: $(VENV)/installed $(VENV)/tools
	cp $(VENV)/lib/python*/site-packages/ace_ext/_C*.so ace_ext/
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children $(JOBS) '$(MUTANTS)'
	$(BIN)/mutmut results

# The licence of each package that `pip install ace_ext` brings; one without a licence is an error.
licenses: $(VENV)/installed $(VENV)/tools
	$(BIN)/pip-licenses --from mixed --with-system --no-version --format markdown --fail-on UNKNOWN --packages \
	  $$($(BIN)/uv pip tree --python $(BIN)/python --package ace_ext 2>/dev/null | \
	    grep -oE '[[:alnum:]._-]+ v[0-9]' | cut -d' ' -f1 | sort -u)

# Needs a GPU, a torch built for CUDA in $(PYTHON), and nvcc.
gpu:
	PYTHON=$(PYTHON) tools/gpu.sh

$(VENV)/tools: $(VENV)/ready .ci/tools.txt
	$(BIN)/pip install --quiet -r .ci/tools.txt
	touch $@

# typos skips the files of .gitignore and of pyproject.toml.
lint: $(VENV)/installed $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/codespell
	$(BIN)/typos

# The documentation site in build/site; a warning is an error. Help texts and tables come from the installed package.
docs: $(VENV)/installed $(VENV)/tools
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Wheel and source distribution: each is installed into an empty environment and run from another folder. Takes some
# minutes.
dist: $(VENV)/ready
	PYTHON=$(BIN)/python tools/check_dist.sh build/dist

clean:
	rm -rf $(VENV) build demo mutants
