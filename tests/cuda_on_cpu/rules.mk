# rules.mk: the CUDA backend on the CPU: its sources, compiled by $(CXX) against the shim in this folder. Included by the
# Makefile.
#
# Every test that runs on a backend runs here, too. Those of operations run under the sanitizers, and plain with another
# seed; those of optimizers and models would take too long with sanitizers, and the shim's own are built plain.

SHIM         := $(BUILD)/cuda_on_cpu
SANITIZED    := $(BUILD)/cuda_on_cpu_sanitized
SHIM_KERNELS := $(filter-out kernels/cuda/cublaslt_library.cu,$(wildcard kernels/cuda/*.cu))
SHIM_OBJECTS := $(SHIM_KERNELS:%.cu=%.o) $(patsubst %.cpp,%.o,$(filter-out tests/cuda_on_cpu/test_%,$(wildcard tests/cuda_on_cpu/*.cpp tests/cublaslt/*.cpp)))

matching      = $(if $(2),$(shell grep -lE '$(1)' $(2)))
ON_BACKENDS  := $(call matching,"tests/(backends|fake_model|gpt2_bench|training_run)\.h",$(TEST_SOURCES))
EMULATED     := $(filter-out $(call matching,make_cpu_backend,$(ON_BACKENDS)),$(ON_BACKENDS))
OF_MODELS    := $(call matching,(fake_model|gpt2_bench|training_run|flora|gradients)\.h",$(EMULATED))
OWN          := $(wildcard tests/cuda_on_cpu/test_*.cpp)

PLAIN_BINARIES     := $(EMULATED:%.cpp=$(SHIM)/%)
OWN_BINARIES       := $(OWN:tests/cuda_on_cpu/%.cpp=$(SHIM)/tests/%)
SANITIZED_BINARIES := $(patsubst %.cpp,$(SANITIZED)/%,$(filter-out $(OF_MODELS),$(EMULATED)))

# Loads that a kernel leaves out at the edge of a tensor look uninitialised to GCC.
SHIM_FLAGS  := $(filter-out -O3 -I.,$(CXXFLAGS)) -Wno-unknown-pragmas $(if $(findstring clang,$(CXX)),,-Wno-maybe-uninitialized) \
               -Itests/cuda_on_cpu/include -I.
SHIM_LDLIBS := -lboost_context $(GTEST) $(LDLIBS)
$(SHIM)/%.o: OPTIMIZE := -O2
SANITIZE_SHIM := -fsanitize=address,undefined -fno-omit-frame-pointer
$(SANITIZED)/%.o: OPTIMIZE := -Og $(SANITIZE_SHIM)
$(SANITIZED)/tests/%.o: OPTIMIZE := -O2 $(SANITIZE_SHIM)

# Both trees of objects, from .cu and .cpp alike.
define COMPILE_FOR_SHIM
$(1)/%.o: %.$(2) $(BUILD)/.compiled | $(BUILD)/.packages
	@mkdir -p $$(@D)
	@echo "  CXX   $$< ($(notdir $(1)))"
	$(Q)$(CXX) $(SHIM_FLAGS) $$(OPTIMIZE) -MMD -MP -c -x c++ -o $$@ $$<
endef
$(foreach tree,$(SHIM) $(SANITIZED),$(foreach suffix,cu cpp,$(eval $(call COMPILE_FOR_SHIM,$(tree),$(suffix)))))

# The shim's own tests are compiled against it, all others see nothing but a Backend.
$(OWN_BINARIES): $(SHIM)/tests/%: $(SHIM)/tests/cuda_on_cpu/%.o
$(PLAIN_BINARIES): $(SHIM)/tests/%: $(BUILD)/tests/%.o
$(SHIM)/train_gpt2: $(BUILD)/train_gpt2.o
$(SHIM)/bench_kernels: $(KERNEL_BENCH)
$(OWN_BINARIES) $(PLAIN_BINARIES) $(SHIM)/train_gpt2 $(SHIM)/bench_kernels: $(SHIM_OBJECTS:%=$(SHIM)/%) $(LIB) $(BUILD)/.linked
	$(LINK) $(SHIM_LDLIBS)
$(SANITIZED_BINARIES): $(SANITIZED)/tests/%: $(BUILD)/tests/%.o $(SHIM_OBJECTS:%=$(SANITIZED)/%) $(LIB) $(BUILD)/.linked
	$(LINK) -fsanitize=address,undefined $(SHIM_LDLIBS)

shim-tests: $(PLAIN_BINARIES) $(OWN_BINARIES) $(SANITIZED_BINARIES) $(SHIM)/train_gpt2 $(SHIM)/bench_kernels

-include $(foreach tree,$(SHIM) $(SANITIZED),$(SHIM_OBJECTS:%.o=$(tree)/%.d)) $(OWN:%.cpp=$(SHIM)/%.d)
