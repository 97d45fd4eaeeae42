# `make` lists the targets. Variables: PYTHON (the interpreter to start from), VENV (the environment's folder),
# TORCH (what pip is given for PyTorch), TESTS (what pytest is given), PYTEST_ARGS, BENCH_ARGS; for gpu-check, gpu-bench,
# gpu-grid, gpu-llama and gpu-qlora OUT (where they write) and RESUME=1 (go on in OUT) or RESUME=folder (go on from the files of an earlier run).

PYTHON ?= python3
VENV ?= .venv
TORCH_FILE ?= requirements/torch.txt
TORCH ?= -r $(TORCH_FILE)
TESTS ?= tests $(wildcard bench)
OUT ?= out

BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
PACKAGES := $(VENV)/.packages
CXX_FILES := $(wildcard csrc/*.h csrc/*/* tests/native_host/*.h tests/native_host/*.cpp)
NATIVE_TESTS := tests/backends/native/test_native_cpu.py tests/backends/native/test_native_parts.py tests/core/test_philox.py \
  tests/weights/test_four_bits.py tests/weights/test_eight_bits.py
# What another PyTorch, Triton or NumPy may change: capture, what autograd keeps, the library's ABI, NVRTC, the interpreter.
OLDEST_TESTS := $(foreach name,compile branches training_memory few_tokens native_compat native_parts ops parts import \
  triton_kernels triton_parts,$(wildcard tests/*/test_$(name).py tests/backends/*/test_$(name).py))
# What no PyTorch changes: g++ compiles CUDA sources for the host. NVRTC, which comes with PyTorch, compiles them too.
SAME_ON_OLDEST := $(foreach name,a_fault_is_seen forward_is_the_reference,\
  --deselect tests/backends/native/test_few_tokens.py::test_$(name))
OLDEST := VENV=$(VENV)-oldest TORCH_FILE=requirements/torch-oldest.txt
INPUTS := pyproject.toml setup.py $(wildcard requirements/*.txt)

export MPLBACKEND ?= Agg
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo build test test-quick test-oldest held-down lint format compile-gate compile-records sanitize native-variants verify bench convergence \
  tables gpu-check gpu-bench gpu-grid gpu-llama gpu-qlora packages packages-oldest set-up set-up-oldest build-oldest clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## set up .venv where it is missing, then run the worked example
	$(BIN)/lora-kernels demo

build: $(STAMP) ## compile the native library for this machine into the user's cache, where the sources have changed
	$(BIN)/lora-kernels build

# Idle threads sleep rather than spin: several processes test at once, each with as many threads as there are cores.
test: export OMP_WAIT_POLICY ?= PASSIVE
test: $(STAMP) ## set up .venv where it is missing, then run all tests (doctests and benchmarks' own checks too)
	$(BIN)/lora-kernels build cpu
	$(BIN)/python -m pytest $(TESTS) --benchmark-disable -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# What depends on PyTorch's products: how they sum, and in which order. No setting of ATen: Inductor's C++ needs its vectors.
HELD_DOWN := tests/benchmark tests/checkpoint tests/core tests/experts tests/layers tests/models tests/peft tests/verify \
  tests/weights tests/backends/native
held-down: $(STAMP) ## the tests under three settings of oneDNN and MKL that stand in for other CPUs; an hour
	for setting in "ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2" \
	    "ONEDNN_MAX_CPU_ISA=AVX MKL_ENABLE_INSTRUCTIONS=AVX" "ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE"; do \
	  echo "== $$setting"; env $$setting $(MAKE) test TESTS="$(HELD_DOWN)" || exit; done

test-quick: $(STAMP) ## in under a minute, the tests that FOLDER=lora_kernels/peft needs; without FOLDER, what git sees as changed
	$(BIN)/python scripts/test_quick.py $(FOLDER)

# Where the usual environment is there too, its PyTorch loads the very library that the oldest one compiled.
test-oldest: ## in .venv-oldest: what an older PyTorch may change, on the oldest PyTorch and Triton that are allowed
	$(if $(wildcard $(STAMP)),LORA_KERNELS_OTHER_PYTHON="$(abspath $(BIN)/python)") \
	  $(MAKE) test $(OLDEST) TESTS="$(OLDEST_TESTS)" PYTEST_ARGS="$(SAME_ON_OLDEST) $(PYTEST_ARGS)"

lint: $(STAMP) ## ruff (rules and format), mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(STAMP) ## rewrite the code as ruff and clang-format want it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# Kernels whose records are there, of the same sources by the same Triton, are not compiled again, but for a sample.
RECORDS := bench/results/compile
COMPILE = env -u TRITON_INTERPRET $(BIN)/python -m lora_kernels.backends.triton.offline.compile_report --known $(RECORDS)
compile-gate: $(STAMP) ## compile the kernels for GPUs that are not here; fail on spills or missing instructions
	$(COMPILE) --check
	$(BIN)/python -m lora_kernels.backends.native.cuda_report --check || [ $$? -eq 3 ]  # 3: no nvcc here, and it says so

compile-records: $(STAMP) ## after a change of a Triton kernel: compile it, and write what the gate knows, by the Triton of VENV
	$(COMPILE) --json $(RECORDS)

sanitize: $(STAMP) ## the native libraries' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python scripts/native_variants.py sanitize -q $(NATIVE_TESTS) tests/backends/triton/test_launcher.py

VARIANTS := $(addprefix native-variant-,amx wide portable library)
native-variants: $(VARIANTS) ## the native library's tests in the ways that this machine does not take by itself; -j2: two at once

.PHONY: $(VARIANTS)
$(VARIANTS): export OMP_WAIT_POLICY ?= PASSIVE
$(VARIANTS): native-variant-%: $(STAMP)
	$(BIN)/python scripts/native_variants.py $* -q $(NATIVE_TESTS)

verify: $(STAMP) ## forward and every gradient of every backend against float64
	$(BIN)/lora-kernels verify

bench: $(STAMP) ## side by side with PEFT, addmm_, torch.compile and the frozen nn.Linear
	$(BIN)/lora-kernels bench $(BENCH_ARGS)

convergence: $(STAMP) ## fine-tune a small Llama by PEFT and by this package: curves, memory, and their tables in docs/training.md
	$(BIN)/python bench/convergence.py
	$(BIN)/python bench/model_memory.py
	$(BIN)/python bench/long_context.py
	$(BIN)/python bench/tables.py --write

tables: $(STAMP) ## write the tables in README.md and docs/, and README's picture, from the committed results
	$(BIN)/python bench/tables.py --write
	$(BIN)/python bench/speed_plot.py

GPU = $(PYTHON) scripts/gpu_check.py --out "$(OUT)" $(if $(RESUME),--resume $(filter-out 1,$(RESUME)))

gpu-check: ## on a machine with a GPU, with its own python3 and no network: tests, verify, tune, in seven minutes, into $OUT
	$(GPU)

gpu-bench: ## likewise: tune, the project's goals and their verdict, then README's cells, in six minutes
	$(GPU) --plan bench

gpu-grid: ## likewise: tune, then the grids of both passes, nine minutes a call; RESUME=1 goes on
	$(GPU) --plan grid

gpu-llama: ## likewise: a training step of all of Llama-3-8B beside PEFT's and the frozen model's, in four minutes, on 80 GB
	$(GPU) --plan llama

gpu-qlora: ## likewise: quantised weights by the packages' kernels and by those in Triton, verified and timed, in six minutes
	$(GPU) --plan qlora

set-up: $(STAMP) ## only set up .venv

packages: $(PACKAGES) ## of that only what others make, into .venv

packages-oldest: ## likewise into .venv-oldest, while .venv is set up
	$(MAKE) packages $(OLDEST)

set-up-oldest: packages-oldest | $(STAMP) ## only set up .venv-oldest; after .venv, for either writes the package's metadata here
	$(MAKE) set-up $(OLDEST)

build-oldest: set-up-oldest ## compile the native library for the CPU by the oldest PyTorch: every later one loads it
	$(VENV)-oldest/bin/lora-kernels build cpu

clean: ## remove .venv, .venv-oldest and everything that was built
	rm -rf "$(VENV)" "$(VENV)-oldest" build dist out ./*.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Two environments get their packages at once; this one into either comes after.
$(STAMP): $(PACKAGES)
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[dev]"
	@touch $@

$(PACKAGES): $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  "the development set-up needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + \
	  ": run make with PYTHON=python3.11")'
	$(PYTHON) -m venv "$(VENV)"
	$(BIN)/python -m pip install --quiet --no-compile $(TORCH) -r requirements/dev.txt \
	  $$($(if $(filter file default,$(origin TORCH)),$(BIN)/python scripts/torch_build.py $(TORCH)))
	@touch $@
