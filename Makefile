# make                  builds ./train_gpt2
# make demo             installs what is missing, builds, trains a small GPT-2 with Flora for three minutes, samples from it;
#                       TRAIN_SECONDS=150, or STEPS=number, and MODEL=preset change it
# make test             installs what is missing, builds, runs every test, ends with "N passed, N failed"
# make check            the quick part of it, for work in progress: the CPU backend's tests that take seconds
# make test-cuda-on-cpu the CUDA backend's part of it: its kernels and its host code, run on this CPU
# make test-ptx         the tests of operations on what nvcc makes of its kernels, interpreted: needs nvcc and no GPU
# make test-gpu         the same tests on the GPU of this machine; SANITIZE=1: under compute-sanitizer
# make gpu-report       builds, tests and measures everything on the GPU of this machine, into docs/results/, in parts of at
#                       most 9 minutes: PARTS="tests kernels", TIME_LIMIT=seconds, DATA=shards, LLMC=checkout, OUT=folder;
#                       DRY_RUN=1: at toy size without a GPU, into build/gpu-report. scripts/gpu_report.py says more
# make bundle           collects what a build needs into .bundle/, for a machine without a network
# make fuzz             libFuzzer on everything that reads files and flags (tests/fuzz), FUZZ_SECONDS=60 for each reader, or those
#                       of READERS="config tokenizer"; what it finds is in build/fuzz
# make bench            speed of a training step and of each operation, as ratios of what this machine can do, and beside
#                       PyTorch; LLMC=checkout: beside llm.c, too
# make format           clang-format over all sources;  make lint checks it
# make clean
#
# Where nvcc is, ./train_gpt2 holds the CUDA backend, too, for CUDA_ARCHS: "80 86 89 90a 100 120", by default what the GPU
# here is, without a GPU 80 (which newer ones run, compiled anew at the first start). CUDA=0 leaves it out.
#
# BUNDLE=folder builds with what `make bundle` collected, without oneDNN, on a machine that has g++, make, python3 and the
# CUDA Toolkit.
#
# Variables: CXX, BLAS (dnnl: oneDNN; none: products of our own), CPU_ARCH (-march), BUILD (folder), SANITIZE
# (address,undefined, ...), PYTHON (of tests and plots), V=1 (shows the commands), WERROR=1 (a warning ends the build, as in
# CI), KEEP_PTX (tests/ptx/rules.mk), TEST_OBJECTS (folder of a build with another SANITIZE, after `make test-objects` there:
# the C++ tests are taken from it, not compiled again). What was built with other flags is built anew; another BUILD keeps
# both. ./train_gpt2 is a link to the one that was built last.

CXX      ?= g++
CPU_ARCH ?= native
BUNDLE   ?=
BLAS     ?= $(if $(BUNDLE),none,dnnl)
PYTHON   ?= .venv/bin/python
BUILD    ?= build
Q        := $(if $(V),,@)
.DEFAULT_GOAL := all
SANITIZE ?=
WERROR   ?=
comma    := ,

# -Wno-restrict: GCC 12 warns about its own std::string (GCC bug 105651).
# -Wno-pass-failed: Clang leaves some loops of `omp simd` alone.
WARNINGS := -Wall -Wextra $(if $(WERROR),-Werror) $(if $(findstring clang,$(CXX)),-Wno-pass-failed,-Wno-restrict)
# -ffp-contract=off: fused multiply-adds only where the source says fma, so that random numbers are the same everywhere.
# -fno-trapping-math: nobody looks at floating-point exceptions; while they count, GCC leaves choices between computed
# numbers out of vector code.
CXXFLAGS := -std=c++20 -O3 -march=$(CPU_ARCH) -ffp-contract=off -fno-math-errno -fno-trapping-math -fopenmp -g1 $(WARNINGS) -I.
# Files of sums and exponentials, without random numbers: here the compiler fuses what it can.
$(addprefix $(BUILD)/,$(addprefix kernels/cpu/,attention.o classifier.o gelu.o tile_product.o) \
  tests/test_cpu_backend.o): CXXFLAGS += -ffp-contract=fast
LDLIBS   := -lz -lpthread
ifneq ($(BLAS),none)
  LDLIBS := -l$(BLAS) $(LDLIBS)
endif
GTEST    := -lgtest -lgtest_main
ifneq ($(BUNDLE),)
  CXXFLAGS += -I$(BUNDLE)/include
  LDFLAGS  += -L$(BUNDLE)/lib
  GTEST    := $(BUILD)/googletest/gtest-all.o $(BUILD)/googletest/gtest_main.o
endif
ifneq ($(SANITIZE),)
  # A null pointer's use ends by itself, and nothing is cast down a class.
  CXXFLAGS += -fsanitize=$(SANITIZE) -fno-omit-frame-pointer -fno-sanitize=null,vptr -fPIC
  LDFLAGS  += -fsanitize=$(SANITIZE)
endif

include kernels/cuda/rules.mk

# ---- sources

LIB_SOURCES  := $(wildcard kernels/*.cpp kernels/cpu/*.cpp flora/*.cpp model/*.cpp parallel/*.cpp train/*.cpp data/*.cpp)
ifeq ($(CUDA),1)
  LIB_SOURCES := $(filter-out kernels/without_cuda.cpp,$(LIB_SOURCES))
endif
LIB_SOURCES  := $(filter-out kernels/cpu/$(if $(filter none,$(BLAS)),onednn_gemm,without_onednn).cpp,$(LIB_SOURCES))
LIB_OBJECTS  := $(LIB_SOURCES:%.cpp=$(BUILD)/%.o) $(CUDA_OBJECTS)
TEST_SOURCES := $(wildcard tests/test_*.cpp)
TESTS        := $(TEST_SOURCES:tests/%.cpp=$(BUILD)/tests/%)
LIB          := $(BUILD)/libtrain_gpt2.a

# Flags that what is there was built with. Where others hold now, the file is out of date, and with it what depends on it.
COMPILED := $(strip $(CXX) $(CXXFLAGS))
LINKED   := $(strip $(CXX) $(CXXFLAGS) $(LDFLAGS) $(LDLIBS) $(if $(CUDA_SOURCES),,$(WITHOUT_CUDA)))
NVCC_RAN := $(strip $(NVCC) $(NVCCFLAGS))
define STAMP
$(BUILD)/$(1): $(if $(subst x$($(2)),,x$(strip $(file <$(BUILD)/$(1)))),FORCE)
	@mkdir -p $$(@D) && printf '%s\n' '$($(2))' >$$@
endef
$(eval $(call STAMP,.compiled,COMPILED))
$(eval $(call STAMP,.linked,LINKED))
$(eval $(call STAMP,.nvcc,NVCC_RAN))

# Options, files and tests gain nothing from -O3 and compile twice as fast without it; with sanitizers everything does.
$(BUILD)/%.o: OPTIMIZE := $(if $(SANITIZE),-Og)
$(BUILD)/train/%.o $(BUILD)/train_gpt2.o $(BUILD)/tests/%.o: OPTIMIZE := $(if $(SANITIZE),-Og,-O1)

all: train_gpt2

train_gpt2: $(BUILD)/train_gpt2 $(if $(filter $(BUILD)/train_gpt2,$(shell readlink train_gpt2)),,FORCE)
	@ln -sfn $< $@

# Whatever is linked goes through here: objects and libraries, then the flags that are libraries.
define LINK
@mkdir -p $(@D)
@echo "  LINK  $@"
$(Q)$(CXX) -fopenmp $(LDFLAGS) -o $@ $(filter %.o,$^) $(filter %.a,$^)
endef

$(BUILD)/train_gpt2: $(BUILD)/train_gpt2.o $(LIB) $(BUILD)/.linked
	$(LINK) $(LDLIBS)

$(LIB): $(LIB_OBJECTS) $(BUILD)/.linked
	@rm -f $@
	@echo "  AR    $@"
	$(Q)ar rcs $@ $(LIB_OBJECTS)

$(BUILD)/kernels/without_cuda.o: CXXFLAGS += -DWITHOUT_CUDA='"$(WITHOUT_CUDA)"'
$(BUILD)/kernels/without_cuda.o: $(BUILD)/.linked

define COMPILE
@mkdir -p $(@D)
@echo "  CXX   $<"
$(Q)$(CXX) $(CXXFLAGS) $(OPTIMIZE) -MMD -MP -c -x c++ -o $@ $<
endef
$(BUILD)/train_gpt2.o: train_gpt2.cu $(BUILD)/.compiled | $(BUILD)/.packages
	$(COMPILE)
$(BUILD)/%.o: %.cpp $(BUILD)/.compiled | $(BUILD)/.packages
	$(COMPILE)
# A bundle's GoogleTest has warnings of its own.
$(BUILD)/googletest/%.o: CXXFLAGS := -std=c++20 -O1 -I$(BUNDLE)/include -I$(BUNDLE)/googletest
$(BUILD)/googletest/%.o: $(BUNDLE)/googletest/src/%.cc
	$(COMPILE)

ifeq ($(TEST_OBJECTS),)
$(TESTS): $(BUILD)/tests/%: $(BUILD)/tests/%.o $(filter %.o,$(GTEST)) $(LIB) $(BUILD)/.linked
	$(LINK) $(filter -l%,$(GTEST)) $(LDLIBS)
else
# -Bsymbolic-functions: of functions in headers the library keeps its own copy, with the sanitizers' checks.
$(BUILD)/libtrain_gpt2.so: $(LIB_OBJECTS) $(BUILD)/.linked
	$(LINK) -shared -Wl,-soname,$(@F) -Wl,-Bsymbolic-functions $(LDLIBS)
$(TESTS): $(BUILD)/tests/%: $(TEST_OBJECTS)/tests/%.o $(BUILD)/libtrain_gpt2.so $(BUILD)/.linked
	$(LINK) $(BUILD)/libtrain_gpt2.so -Wl,-rpath,'$$ORIGIN/..' $(GTEST) $(LDLIBS)
endif

tests: $(TESTS)
test-objects: $(TESTS:%=%.o)

# Names what a build needs and this machine lacks; costs one run of the preprocessor, once.
$(BUILD)/.packages: $(BUILD)/.linked
	@$(if $(BUNDLE),test -d $(BUNDLE)/include || { echo "BUNDLE=$(BUNDLE): no such folder; make bundle makes one" >&2; exit 1; },scripts/setup.sh --check build)
	@mkdir -p $(@D) && touch $@

# The two commands of the README use all cores unless -j says otherwise.
PARALLEL = $(if $(filter -j% --jobserver%,$(MAKEFLAGS)),,-j$(shell nproc))

demo:
	scripts/setup.sh demo
	+$(MAKE) $(PARALLEL) train_gpt2
	PYTHON=$(PYTHON) scripts/demo.sh

# What a long target is doing, and when.
BEGAN := $(shell date +%s)
say    = @echo "make $@: $(1) ($$(( $$(date +%s) - $(BEGAN) )) s so far)"

test:
	$(call say,1 of 3: packages that are missing are installed)
	scripts/setup.sh --packages test
	$(call say,2 of 3: $$($(MAKE) -n train_gpt2 tests shim-tests 2>/dev/null | grep -cE '"  (CXX|NVCC|LINK|AR) ') files to compile and link$(comma) and Python packages)
	+@$(MAKE) --no-print-directory $(PARALLEL) python-packages train_gpt2 tests shim-tests
	$(call say,3 of 3: the tests)
	@$(PYTHON) tests/run.py --began $(BEGAN)

# Beside the compiler: most of it is waiting and unpacking.
python-packages:
	@scripts/setup.sh test

check:
	scripts/setup.sh test
	+@$(MAKE) --no-print-directory $(PARALLEL) train_gpt2 tests
	@$(PYTHON) tests/run.py --suite cpu --fast

test-cuda-on-cpu:
	scripts/setup.sh test
	+$(MAKE) $(PARALLEL) shim-tests
	$(PYTHON) tests/run.py --suite cuda-on-cpu

# What runs on machines where nothing can be installed takes the Python that is there.
PYTHON_HERE := $(if $(wildcard $(PYTHON)),$(PYTHON),python3)
test-gpu:
	+$(MAKE) $(PARALLEL) SANITIZE= train_gpt2 tests
	$(PYTHON_HERE) tests/run.py --suite gpu $(if $(SANITIZE),--compute-sanitizer)

bundle:
	scripts/setup.sh --check test
	scripts/bundle.sh $(if $(BUNDLE),$(BUNDLE),.bundle)

FORMATTED := $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' 2>/dev/null)
format:
	clang-format -i $(FORMATTED)
lint:
	clang-format --dry-run --Werror $(FORMATTED)

clean:
	rm -rf $(BUILD) train_gpt2

FORCE:
.PHONY: FORCE all python-packages tests test-objects shim-tests demo test check fuzz test-cuda-on-cpu test-gpu bundle gpu-report bench format lint clean
.PRECIOUS: $(BUILD)/%.o

include bench/rules.mk tests/cuda_on_cpu/rules.mk tests/ptx/rules.mk tests/fuzz/rules.mk scripts/gpu_report.mk
-include $(LIB_OBJECTS:.o=.d) $(TEST_SOURCES:%.cpp=$(BUILD)/%.d) $(BUILD)/train_gpt2.d
