# make                  builds ./train_gpt2
# make demo             installs what is missing, builds, trains a small GPT-2 with Flora on text found here, samples from it
# make test             installs what is missing, builds, runs every test, ends with "N passed, N failed"
# make bench            speed of a training step and of each operation, as ratios of what this machine can do
# make format           clang-format over all sources;  make lint checks it
# make cuda-check      compiles main() and the shared headers with nvcc
# make clean
#
# Variables: CXX, BLAS (name of a CBLAS library), CPU_ARCH (-march), BUILD (folder), SANITIZE (address,undefined, ...),
# PYTHON (of tests and plots), V=1. Objects do not depend on the
# flags: give another BUILD with another SANITIZE or CXX.

CXX      ?= g++
CPU_ARCH ?= native
BLAS     ?= openblas
PYTHON   ?= .venv/bin/python
BUILD    ?= build
# make V=1 shows the commands.
Q        := $(if $(V),,@)
SANITIZE ?=

# -Wno-restrict: GCC 12 warns about its own std::string (GCC bug 105651).
WARNINGS := -Wall -Wextra -Werror -Wno-restrict
# -ffp-contract=off: fused multiply-adds only where the source says fma, so that random numbers are the same everywhere.
CXXFLAGS := -std=c++20 -O3 -march=$(CPU_ARCH) -ffp-contract=off -fno-math-errno -fopenmp -g1 $(WARNINGS) -I.
LDLIBS   := -l$(BLAS) -lz -lgomp -lpthread
ifneq ($(SANITIZE),)
  CXXFLAGS += -fsanitize=$(SANITIZE) -fno-omit-frame-pointer
  LDFLAGS  += -fsanitize=$(SANITIZE)
endif

LIB_SOURCES  := $(wildcard kernels/*.cpp kernels/cpu/*.cpp flora/*.cpp model/*.cpp train/*.cpp data/*.cpp)
LIB_OBJECTS  := $(LIB_SOURCES:%.cpp=$(BUILD)/%.o)
TEST_SOURCES := $(wildcard tests/test_*.cpp)
TESTS        := $(TEST_SOURCES:tests/%.cpp=$(BUILD)/tests/%)
LIB          := $(BUILD)/libtrain_gpt2.a
# Options, files and tests gain nothing from -O3 and compile twice as fast without it.
$(BUILD)/train/%.o $(BUILD)/train_gpt2.o $(BUILD)/tests/%.o: OPTIMIZE := -O1

all: train_gpt2

train_gpt2: $(BUILD)/train_gpt2.o $(LIB)
	@echo "  LINK  $@"
	$(Q)$(CXX) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(LIB): $(LIB_OBJECTS)
	@rm -f $@
	@echo "  AR    $@"
	$(Q)ar rcs $@ $^

$(BUILD)/train_gpt2.o: train_gpt2.cu | $(BUILD)/.packages
	@mkdir -p $(@D)
	@echo "  CXX   $<"
	$(Q)$(CXX) $(CXXFLAGS) $(OPTIMIZE) -MMD -MP -c -x c++ -o $@ $<

$(BUILD)/%.o: %.cpp | $(BUILD)/.packages
	@mkdir -p $(@D)
	@echo "  CXX   $<"
	$(Q)$(CXX) $(CXXFLAGS) $(OPTIMIZE) -MMD -MP -c -o $@ $<

$(BUILD)/tests/%: $(BUILD)/tests/%.o $(LIB)
	@echo "  LINK  $@"
	$(Q)$(CXX) $(LDFLAGS) -o $@ $^ -lgtest -lgtest_main $(LDLIBS)

tests: $(TESTS)

# Names what a build needs and this machine lacks; costs one run of the preprocessor, once.
$(BUILD)/.packages:
	@scripts/setup.sh --check build
	@mkdir -p $(@D) && touch $@

# The two commands of the README use all cores unless -j says otherwise.
PARALLEL = $(if $(filter -j% --jobserver%,$(MAKEFLAGS)),,-j$(shell nproc))

demo:
	scripts/setup.sh demo
	+$(MAKE) $(PARALLEL) train_gpt2
	PYTHON=$(PYTHON) scripts/demo.sh

test:
	scripts/setup.sh test
	+$(MAKE) $(PARALLEL) train_gpt2 tests
	$(PYTHON) tests/run.py

bench:
	scripts/setup.sh --check bench
	+$(MAKE) $(PARALLEL) train_gpt2 $(BUILD)/bench/operations
	$(BUILD)/bench/operations
	python3 scripts/bench_steps.py --python $(PYTHON)

$(BUILD)/bench/%: $(BUILD)/bench/%.o $(LIB)
	@echo "  LINK  $@"
	$(Q)$(CXX) $(LDFLAGS) -o $@ $^ -lbenchmark $(LDLIBS)

# Compiles what nvcc will compile when there is a CUDA backend: main() and the headers that kernels share with the CPU.
NVCC ?= nvcc
cuda-check: $(BUILD)/.packages
	@mkdir -p $(BUILD)/cuda
	$(NVCC) -std=c++20 -O1 -Xcompiler -fopenmp,-Wall,-Wextra,-Werror,-Wno-restrict -I. -c -o $(BUILD)/cuda/train_gpt2.o train_gpt2.cu

FORMATTED := $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' 2>/dev/null)
format:
	clang-format -i $(FORMATTED)
lint:
	clang-format --dry-run --Werror $(FORMATTED)

clean:
	rm -rf $(BUILD) train_gpt2

.PHONY: all tests demo test bench cuda-check format lint clean
.SECONDARY:

-include $(LIB_OBJECTS:.o=.d) $(TEST_SOURCES:%.cpp=$(BUILD)/%.d) $(BUILD)/train_gpt2.d $(wildcard $(BUILD)/bench/*.d)
