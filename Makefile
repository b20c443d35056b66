# make                  builds ./train_gpt2
# make demo             installs what is missing, builds, trains a small GPT-2 with Flora on text found here, samples from it
# make test             installs what is missing, builds, runs every test, ends with "N passed, N failed"
# make check            the quick part of it, for work in progress: the CPU backend's tests that take seconds
# make test-cuda-on-cpu the CUDA backend's part of it: its kernels and its host code, run on this CPU
# make test-gpu         the same tests on the GPU of this machine; SANITIZE=1: under compute-sanitizer
# make gpu-report       builds, tests and measures everything on the GPU of this machine, into docs/results/, in parts of at
#                       most 9 minutes: PARTS="tests kernels", TIME_LIMIT=seconds, DATA=shards, LLMC=checkout, OUT=folder;
#                       DRY_RUN=1: at toy size without a GPU, into build/gpu-report. scripts/gpu_report.py says more
# make bundle           collects what a build needs into .bundle/, for a machine without a network
# make fuzz             libFuzzer on everything that reads files and flags (tests/fuzz), FUZZ_SECONDS=60 for each reader, or those
#                       of READERS="config tokenizer"; what it finds is in build/fuzz
# make bench            speed of a training step and of each operation, as ratios of what this machine can do
# make format           clang-format over all sources;  make lint checks it
# make clean
#
# Where nvcc is, ./train_gpt2 holds the CUDA backend, too, for CUDA_ARCHS: "80 86 89 90a 100 120", by default what the GPU
# here is, without a GPU 80 (which newer ones run, compiled anew at the first start). CUDA=0 leaves it out.
#
# BUNDLE=folder builds with what `make bundle` collected, without a BLAS, on a machine that has g++, make, python3 and the
# CUDA Toolkit.
#
# Variables: CXX, BLAS (name of a CBLAS library; none: a plain one of our own), CPU_ARCH (-march), BUILD (folder),
# SANITIZE (address,undefined, ...), PYTHON (of tests and plots), V=1 (shows the commands). What was built with other flags
# is built anew; another BUILD keeps both. ./train_gpt2 is a link to the one that was built last.

CXX      ?= g++
CPU_ARCH ?= native
BUNDLE   ?=
BLAS     ?= $(if $(BUNDLE),none,openblas)
PYTHON   ?= .venv/bin/python
BUILD    ?= build
Q        := $(if $(V),,@)
.DEFAULT_GOAL := all
SANITIZE ?=

# -Wno-restrict: GCC 12 warns about its own std::string (GCC bug 105651).
# -Wno-pass-failed: Clang leaves some loops of `omp simd` alone.
WARNINGS := -Wall -Wextra -Werror $(if $(findstring clang,$(CXX)),-Wno-pass-failed,-Wno-restrict)
# -ffp-contract=off: fused multiply-adds only where the source says fma, so that random numbers are the same everywhere.
CXXFLAGS := -std=c++20 -O3 -march=$(CPU_ARCH) -ffp-contract=off -fno-math-errno -fopenmp -g1 $(WARNINGS) -I.
LDLIBS   := -lz -lpthread
ifeq ($(BLAS),none)
  CXXFLAGS += -Ikernels/cpu/no_blas
else
  LDLIBS   := -l$(BLAS) $(LDLIBS)
endif
GTEST    := -lgtest -lgtest_main
ifneq ($(BUNDLE),)
  CXXFLAGS += -I$(BUNDLE)/include
  LDFLAGS  += -L$(BUNDLE)/lib
  GTEST    := $(BUILD)/googletest/gtest-all.o $(BUILD)/googletest/gtest_main.o
endif
ifneq ($(SANITIZE),)
  CXXFLAGS += -fsanitize=$(SANITIZE) -fno-omit-frame-pointer
  LDFLAGS  += -fsanitize=$(SANITIZE)
endif

# ---- CUDA

CUDA_HOME    ?= $(firstword $(wildcard /usr/local/cuda /opt/cuda) /usr/local/cuda)
NVCC         ?= $(firstword $(shell command -v nvcc) $(wildcard $(CUDA_HOME)/bin/nvcc))
CUDA         ?= $(if $(NVCC),1,0)
ifeq ($(CUDA),1)
  # The toolkit that this nvcc belongs to.
  CUDA_ROOT  := $(patsubst %/bin/,%,$(dir $(realpath $(NVCC))))
  # nvidia-smi reports its failures on stdout, too: only a number counts. What this nvcc does not know, or what is older
  # than sm_80, is left to the default.
  GPU_ARCH   := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
                  sed -n '1s/^\([0-9][0-9]*\)\.\([0-9]\)$$/\1\2/p')
  GPU_ARCH   := $(filter-out 50 52 53 60 61 62 70 72 75,\
                  $(filter $(GPU_ARCH),$(patsubst compute_%,%,$(shell $(NVCC) --list-gpu-arch))))
  # Hopper's own instructions need the target sm_90a.
  CUDA_ARCHS ?= $(if $(GPU_ARCH),$(GPU_ARCH:90=90a),80)
  # Machine code for each, and for the last one that newer GPUs can take, PTX.
  PORTABLE   := $(lastword $(filter-out %a,$(CUDA_ARCHS)))
  GENCODE    := $(foreach a,$(CUDA_ARCHS),-gencode=arch=compute_$(a),code=sm_$(a)) \
                $(foreach a,$(PORTABLE),-gencode=arch=compute_$(a),code=compute_$(a))
  # -fmad=false: see -ffp-contract above. 1675: pragmas of GCC in the headers that are shared with the CPU.
  NVCCFLAGS  := -std=c++20 -O3 -fmad=false -Xcompiler -Wall,-Wextra,-Wno-unknown-pragmas,-Wno-restrict,-Werror \
                -diag-suppress 1675 -Werror all-warnings -lineinfo -I. $(GENCODE)
  CUDA_SOURCES := $(wildcard kernels/cuda/*.cu)
  CUDART     := $(firstword $(wildcard $(foreach d,lib64 lib targets/x86_64-linux/lib,$(CUDA_ROOT)/$(d)/libcudart_static.a)))
  LDLIBS     += -L$(or $(dir $(CUDART)),$(CUDA_ROOT)/lib64) -lcudart_static -ldl -lrt
else
  CUDA_SOURCES :=
endif
CUDA_OBJECTS := $(CUDA_SOURCES:%.cu=$(BUILD)/%.o)
# What the program says where it has no CUDA backend.
WITHOUT_CUDA := $(if $(filter-out undefined default file,$(origin CUDA)),CUDA=$(CUDA) was given,no nvcc was found)

# ---- sources

LIB_SOURCES  := $(wildcard kernels/*.cpp kernels/cpu/*.cpp kernels/cpu/no_blas/*.cpp flora/*.cpp model/*.cpp train/*.cpp data/*.cpp)
ifeq ($(CUDA),1)
  LIB_SOURCES := $(filter-out kernels/without_cuda.cpp,$(LIB_SOURCES))
endif
LIB_OBJECTS  := $(LIB_SOURCES:%.cpp=$(BUILD)/%.o) $(CUDA_OBJECTS)
TEST_SOURCES := $(wildcard tests/test_*.cpp)
TESTS        := $(TEST_SOURCES:tests/%.cpp=$(BUILD)/tests/%)
LIB          := $(BUILD)/libtrain_gpt2.a
KERNEL_BENCH := $(patsubst %,$(BUILD)/bench/%.o,kernels kernel_cases model_cases optimizer_cases)

# Flags that what is there was built with. Where others hold now, the file is out of date, and with it what depends on it.
COMPILED := $(strip $(CXX) $(CXXFLAGS))
LINKED   := $(strip $(CXX) $(CXXFLAGS) $(LDFLAGS) $(LDLIBS) $(if $(CUDA_SOURCES),,$(WITHOUT_CUDA)))
NVCC_RAN := $(strip $(NVCC) $(NVCCFLAGS))
stale     = $(if $(subst x$(2),,x$(strip $(file <$(1)))),FORCE)
define REMEMBER
@mkdir -p $(@D) && printf '%s\n' '$(1)' >$@
endef
$(BUILD)/.compiled: $(call stale,$(BUILD)/.compiled,$(COMPILED))
	$(call REMEMBER,$(COMPILED))
$(BUILD)/.linked: $(call stale,$(BUILD)/.linked,$(LINKED))
	$(call REMEMBER,$(LINKED))
$(BUILD)/.nvcc: $(call stale,$(BUILD)/.nvcc,$(NVCC_RAN))
	$(call REMEMBER,$(NVCC_RAN))

# Options, files and tests gain nothing from -O3 and compile twice as fast without it.
$(BUILD)/train/%.o $(BUILD)/train_gpt2.o $(BUILD)/tests/%.o: OPTIMIZE := -O1

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

$(BUILD)/train_gpt2.o: train_gpt2.cu $(BUILD)/.compiled | $(BUILD)/.packages
	@mkdir -p $(@D)
	@echo "  CXX   $<"
	$(Q)$(CXX) $(CXXFLAGS) $(OPTIMIZE) -MMD -MP -c -x c++ -o $@ $<

$(BUILD)/%.o: %.cpp $(BUILD)/.compiled | $(BUILD)/.packages
	@mkdir -p $(@D)
	@echo "  CXX   $<"
	$(Q)$(CXX) $(CXXFLAGS) $(OPTIMIZE) -MMD -MP -c -o $@ $<

$(BUILD)/googletest/%.o: $(BUNDLE)/googletest/src/%.cc
	@mkdir -p $(@D)
	@echo "  CXX   $<"
	$(Q)$(CXX) -std=c++20 -O1 -I$(BUNDLE)/include -I$(BUNDLE)/googletest -c -o $@ $<

$(BUILD)/kernels/cuda/%.o: kernels/cuda/%.cu $(BUILD)/.nvcc | $(BUILD)/.packages
	@mkdir -p $(@D)
	@echo "  NVCC  $<"
	$(Q)scripts/nvcc.sh $@ $(NVCC) $(NVCCFLAGS) -MMD -MP -c $<

$(TESTS): $(BUILD)/tests/%: $(BUILD)/tests/%.o $(filter %.o,$(GTEST)) $(LIB) $(BUILD)/.linked
	$(LINK) $(filter -l%,$(GTEST)) $(LDLIBS)

# ---- the CUDA backend on the CPU: the same sources, compiled by g++ against the shim of tests/cuda_on_cpu/

SHIM_KERNELS := $(filter-out kernels/cuda/cublaslt_library.cu,$(wildcard kernels/cuda/*.cu))
SHIM_SOURCES := $(filter-out tests/cuda_on_cpu/test_%,$(wildcard tests/cuda_on_cpu/*.cpp))
SHIM_OBJECTS := $(SHIM_KERNELS:%.cu=%.o) $(SHIM_SOURCES:%.cpp=%.o)
SHIM         := $(BUILD)/cuda_on_cpu
SANITIZED    := $(BUILD)/cuda_on_cpu_sanitized
# Tests of operations run under the sanitizers, and plain with another seed; those of whole models would take too long with
# sanitizers, and the shim's own are built plain, too.
OPERATION_TESTS := attention classifier device_memory elementwise embedding factored_moment layer_stream layernorm matmul \
                   optimizer_ops quantize philox projection same_bits weight_codes
MODEL_TESTS     := flora flora_reference adamw gradients gpt2 gpt2_reference training offload
SHIM_OWN_TESTS  := $(patsubst tests/cuda_on_cpu/test_%.cpp,%,$(wildcard tests/cuda_on_cpu/test_*.cpp))
PLAIN_BINARIES  := $(patsubst %,$(SHIM)/tests/test_%,$(MODEL_TESTS) $(OPERATION_TESTS))
OWN_BINARIES    := $(SHIM_OWN_TESTS:%=$(SHIM)/tests/test_%)
SANITIZED_BINARIES := $(OPERATION_TESTS:%=$(SANITIZED)/tests/test_%)
# Loads that a kernel leaves out at the edge of a tensor look uninitialised to GCC.
SHIM_FLAGS      := $(filter-out -O3 -I.,$(CXXFLAGS)) -Wno-unknown-pragmas $(if $(findstring clang,$(CXX)),,-Wno-maybe-uninitialized) -Itests/cuda_on_cpu/include -I.
SHIM_LDLIBS     := -lboost_context $(GTEST) $(LDLIBS)

$(SANITIZED)/%.o: SHIM_FLAGS += -O1 -fsanitize=address,undefined -fno-omit-frame-pointer
$(SANITIZED)/%.o: SHIM_KIND := shim, sanitizers
$(SHIM)/%.o: SHIM_FLAGS += -O2
$(SHIM)/%.o: SHIM_KIND := shim

define COMPILE_FOR_SHIM
@mkdir -p $(@D)
@echo "  CXX   $< ($(SHIM_KIND))"
$(Q)$(CXX) $(SHIM_FLAGS) -MMD -MP -c -x c++ -o $@ $<
endef

$(SHIM)/%.o: %.cu $(BUILD)/.compiled | $(BUILD)/.packages
	$(COMPILE_FOR_SHIM)
$(SHIM)/%.o: %.cpp $(BUILD)/.compiled | $(BUILD)/.packages
	$(COMPILE_FOR_SHIM)
$(SANITIZED)/%.o: %.cu $(BUILD)/.compiled | $(BUILD)/.packages
	$(COMPILE_FOR_SHIM)
$(SANITIZED)/%.o: %.cpp $(BUILD)/.compiled | $(BUILD)/.packages
	$(COMPILE_FOR_SHIM)

# The shim's own tests are compiled against it, all others see nothing but a Backend.
$(OWN_BINARIES): $(SHIM)/tests/%: $(SHIM)/tests/cuda_on_cpu/%.o
$(PLAIN_BINARIES): $(SHIM)/tests/%: $(BUILD)/tests/%.o
$(OWN_BINARIES) $(PLAIN_BINARIES): $(SHIM_OBJECTS:%=$(SHIM)/%) $(LIB) $(BUILD)/.linked
	$(LINK) $(SHIM_LDLIBS)

$(SANITIZED_BINARIES): $(SANITIZED)/tests/%: $(BUILD)/tests/%.o $(SHIM_OBJECTS:%=$(SANITIZED)/%) $(LIB) $(BUILD)/.linked
	$(LINK) -fsanitize=address,undefined $(SHIM_LDLIBS)

$(SHIM)/train_gpt2: $(BUILD)/train_gpt2.o $(SHIM_OBJECTS:%=$(SHIM)/%) $(LIB) $(BUILD)/.linked
	$(LINK) $(SHIM_LDLIBS)

$(SHIM)/bench_kernels: $(KERNEL_BENCH) $(SHIM_OBJECTS:%=$(SHIM)/%) $(LIB) $(BUILD)/.linked
	$(LINK) $(SHIM_LDLIBS)

tests: $(TESTS)
shim-tests: $(PLAIN_BINARIES) $(OWN_BINARIES) $(SANITIZED_BINARIES) $(SHIM)/train_gpt2 $(SHIM)/bench_kernels

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
comma := ,
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

# What cannot be built or run is said in the report.
REPORT_FLAGS  := $(if $(PARTS),--parts '$(PARTS)') $(if $(TIME_LIMIT),--time-limit $(TIME_LIMIT)) $(if $(DATA),--data '$(DATA)') \
                 $(if $(LLMC),--llmc '$(LLMC)') $(if $(DRY_RUN),--dry-run) $(if $(OUT)$(DRY_RUN),--out '$(or $(OUT),$(BUILD)/gpu-report)')
gpu-report:
	@mkdir -p $(BUILD) && touch $(BUILD)/.report-began
	-+$(MAKE) -k $(PARALLEL) $(if $(DRY_RUN),$(SHIM)/train_gpt2 $(SHIM)/bench_kernels $(SANITIZED)/tests/test_philox,train_gpt2 $(BUILD)/bench/kernels \
	  $(if $(filter tests sanitizer all,$(or $(PARTS),tests)),tests))
	$(PYTHON_HERE) scripts/gpu_report.py --spent $$(( $$(date +%s) - $$(stat -c %Y $(BUILD)/.report-began) )) $(REPORT_FLAGS)

# ---- fuzzing: readers and what they need of the sources, by Clang

FUZZ         := $(BUILD)/fuzz
FUZZ_SECONDS ?= 60
READERS      ?= $(notdir $(wildcard tests/fuzz/corpus/*))
FUZZ_SOURCES := tests/fuzz/readers.cpp $(wildcard data/*.cpp) model/config.cpp $(patsubst %,train/%.cpp,command_line config_file \
                file_io llmc_model memory_size metrics options safetensors trainer_state)
FUZZ_FLAGS   := -std=c++20 -O1 -g1 -I. -Wall -Wextra -Werror -fsanitize=fuzzer,address,undefined -fno-sanitize=vptr \
                -fno-sanitize-recover=undefined

$(FUZZ)/%.o: %.cpp
	@mkdir -p $(@D)
	@echo "  CXX   $< (fuzzing)"
	$(Q)clang++ $(FUZZ_FLAGS) -MMD -MP -c -o $@ $<

$(FUZZ)/readers: $(FUZZ_SOURCES:%.cpp=$(FUZZ)/%.o)
	@echo "  LINK  $@"
	$(Q)clang++ $(FUZZ_FLAGS) -o $@ $^ -lz -lpthread

# The first folder is where libFuzzer keeps what reaches new code.
fuzz-%: $(FUZZ)/readers
	@mkdir -p $(FUZZ)/corpus/$*
	@echo "  FUZZ  $* ($(FUZZ_SECONDS) s)"
	$(Q)READER=$* $< -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -rss_limit_mb=1500 -timeout=20 -close_fd_mask=1 \
	  -artifact_prefix=$(FUZZ)/$*- $(FUZZ)/corpus/$* tests/fuzz/corpus/$* >$(FUZZ)/$*.log 2>&1 || \
	  { tail -n 40 $(FUZZ)/$*.log >&2; echo "make fuzz: READER=$*: the input is in $(FUZZ)/$*-*" >&2; exit 1; }

fuzz:
	scripts/setup.sh fuzz
	+$(MAKE) $(PARALLEL) $(READERS:%=fuzz-%)
	@echo "make fuzz: nothing was found in $(words $(READERS)) readers, $(FUZZ_SECONDS) s each"

bench:
	scripts/setup.sh --check bench
	+$(MAKE) $(PARALLEL) train_gpt2 $(BUILD)/bench/operations
	$(BUILD)/bench/operations
	python3 scripts/bench_steps.py --python $(PYTHON)

# Needs no Google Benchmark, unlike the one of operations.
$(BUILD)/bench/kernels: $(KERNEL_BENCH) $(LIB) $(BUILD)/.linked
	$(LINK) $(LDLIBS)

$(BUILD)/bench/%: $(BUILD)/bench/%.o $(LIB) $(BUILD)/.linked
	$(LINK) -lbenchmark $(LDLIBS)

FORMATTED := $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' 2>/dev/null)
format:
	clang-format -i $(FORMATTED)
lint:
	clang-format --dry-run --Werror $(FORMATTED)

clean:
	rm -rf $(BUILD) train_gpt2

FORCE:
.PHONY: FORCE all python-packages tests shim-tests demo test check fuzz test-cuda-on-cpu test-gpu bundle gpu-report bench format lint clean
.PRECIOUS: $(BUILD)/%.o

-include $(LIB_OBJECTS:.o=.d) $(TEST_SOURCES:%.cpp=$(BUILD)/%.d) $(BUILD)/train_gpt2.d $(wildcard $(BUILD)/bench/*.d)
-include $(FUZZ_SOURCES:%.cpp=$(FUZZ)/%.d)
-include $(SHIM_OBJECTS:%.o=$(SHIM)/%.d) $(SHIM_OBJECTS:%.o=$(SANITIZED)/%.d)
-include $(OWN_BINARIES:$(SHIM)/tests/%=$(SHIM)/tests/cuda_on_cpu/%.d)
