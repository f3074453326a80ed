# Every task of a developer, in a private environment under .venv that is made when missing.
#
#   make demo     show what moe-fx does to a model
#   make test     run the tests; pass arguments to pytest with ARGS, as in: make test ARGS="-k route -x"
#   make test-arm cross-compile the C++ tests for Arm and run them under QEMU (part of make test where tools are there)
#   make test-triton-ascend   compile the Triton kernels with Ascend's compilers (part of make test where they install)
#   make test-ascend  test the Ascend target with real torch_npu and torchair over a stand-in for CANN (x86-64 Linux)
#   make test-npu     run the Ascend target's models and operators on an NPU, and print a report to send back
#   make lint     check style and types of Python and C++
#   make docs     regenerate the generated pages of docs/
#   make format   bring Python and C++ into that style
#   make wheel    build a wheel into dist/
#   make clean    remove everything that make made, the environment included
#
# The environment is made with PYTHON (make test PYTHON=python3.12). Versions are pinned in pyproject.toml. An install
# is repeated only after a change to the packaging or to the C++ sources: Python files are used where they lie.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TRITON_ASCEND := $(VENV)/triton-ascend
ASCEND := $(VENV)/ascend
BUILD_INPUTS := pyproject.toml $(shell find CMakeLists.txt csrc -path csrc/ascendc -prune -o -type f -print)
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.asc')

.PHONY: demo test test-arm test-ascend test-npu test-triton-ascend lint format docs wheel clean

demo: $(VENV)/models.installed
	$(BIN)/python -m moe_fx.demo $(ARGS)

test: $(VENV)/test.installed $(TRITON_ASCEND)/installed
	$(BIN)/pytest $(ARGS)

test-triton-ascend: $(VENV)/test.installed $(TRITON_ASCEND)/installed
	$(BIN)/pytest tests/ascend_triton $(ARGS)

# The Ascend C kernels are built first (Debian: apt-get install cmake), since no test should wait for a minute of that.
# The plugin loads the stand-in before torch is imported, whose import loads torch_npu.
test-ascend: $(ASCEND)/installed
	PYTHONPATH=tests/ascend $(ASCEND)/bin/python -m host_cann.kernels
	PYTHONPATH=tests/ascend $(ASCEND)/bin/pytest -p host_cann.preload tests/ascend $(ARGS)

# In the user's own environment, whose torch_npu fits the machine's CANN; it needs moe-fx's extra `models`, and pytest,
# pytest-timeout and expecttest: pip install '.[models]' pytest pytest-timeout expecttest
NPU_PYTHON ?= $(PYTHON)
NPU_TESTS := $(patsubst %,tests/ascend/test_%.py,models attention lowered_ops combine_in_product weights artifacts ascendc_ops ascendc_graphs)

test-npu:
	PYTHONPATH=tests/ascend $(NPU_PYTHON) -m pytest -p npu_report -m npu $(NPU_TESTS) $(ARGS)

# Debian: apt-get install cmake doctest-dev g++-aarch64-linux-gnu qemu-user-static. An emulator takes a sample of the
# larger grids of cases. The last two processors lack i8mm, and i8mm and dotprod: they must not be given code with it.
QEMU := qemu-aarch64-static -L /usr/aarch64-linux-gnu
ARM_TESTS := build/native-arm/moe_fx_tests --minimal
ENGINE_TESTS := --source-file='*test_engine.cpp'

test-arm:
	cmake -S csrc/tests -B build/native-arm -DCMAKE_TOOLCHAIN_FILE="$(CURDIR)/cmake/aarch64-linux-gnu.cmake"
	cmake --build build/native-arm
	MOE_FX_TEST_SAMPLE=10 $(QEMU) -cpu max $(ARM_TESTS)
	MOE_FX_TEST_SAMPLE=20 MOE_FX_ISA=neon $(QEMU) -cpu max $(ARM_TESTS) $(ENGINE_TESTS)
	MOE_FX_TEST_SAMPLE=40 MOE_FX_ISA=scalar $(QEMU) -cpu max $(ARM_TESTS) $(ENGINE_TESTS)
	MOE_FX_TEST_SAMPLE=80 $(QEMU) -cpu neoverse-n1 $(ARM_TESTS)
	MOE_FX_TEST_SAMPLE=80 $(QEMU) -cpu cortex-a72 $(ARM_TESTS)

# mypy reads moe_fx through a folder of links in the shape of the installed package (see pyproject.toml).
lint: $(VENV)/lint.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	rm -rf $(VENV)/typing && mkdir -p $(VENV)/typing/moe_fx
	ln -s "$(CURDIR)"/moe_fx/* "$(CURDIR)/passes" "$(CURDIR)/lowering" $(VENV)/typing/moe_fx
	cd $(VENV)/typing && "$(abspath $(BIN)/mypy)" --config-file "$(CURDIR)/pyproject.toml" --cache-dir ../mypy_cache -p moe_fx
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/lint.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

docs: $(VENV)/test.installed
	$(BIN)/python docs/generate.py

wheel: | $(BIN)/python
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras. The extra `pinned` fixes torch, so that no install changes what another one chose.
$(VENV)/%.installed: $(BUILD_INPUTS) | $(BIN)/python
	$(PIP) install --editable '.[$*,pinned]'
	touch $@

# Pinned here, not in an extra: triton-ascend holds a package `triton`, as Triton itself does, and so needs a folder of
# its own, where an extra would bring moe-fx and torch along. They are built for x86-64 Linux and Python 3.9 to 3.11;
# elsewhere the tests that need them skip and say why.
$(TRITON_ASCEND)/installed: Makefile | $(BIN)/python
	rm -rf $(TRITON_ASCEND)
	$(PIP) install --no-deps --target $(TRITON_ASCEND) triton-ascend==3.2.0 ascendnpu-ir==1.0.0 pybind11==3.1.0 && \
	  touch $@ || echo "warning: no Ascend compilers here; the tests in tests/ascend_triton will be skipped" >&2

# An environment of its own: where torch_npu is installed, `import torch` loads it and fails without CANN.
$(ASCEND)/installed: $(BUILD_INPUTS)
	rm -rf $(ASCEND)
	$(PYTHON) -m venv $(ASCEND)
	$(ASCEND)/bin/python -m pip --disable-pip-version-check install --editable '.[test-ascend,pinned]'
	touch $@
