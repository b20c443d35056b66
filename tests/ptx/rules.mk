# rules.mk: the CUDA backend as nvcc compiles it, on the CPU: its kernels' PTX runs on the interpreter in this folder.
# Included by the Makefile.
#
# make test-ptx       the tests of operations, and the interpreter's own
# make ptx-mutations  are mistakes found that are planted in a copy of the kernels? NAMES="forward ptx": some of them
# make ptx            only compiles the kernels

PTXSIM     := $(BUILD)/ptx
# Of the PTX, and of the GPU that the interpreter pretends to be: 90a holds every variant of a kernel. With KEEP_PTX=90a, too,
# the objects of ./train_gpt2 hold it, and nothing is compiled twice.
PTX_ARCH   ?= 90a
# -O1 is for the host's code, of which nobody measures anything here; the PTX is the same.
PTX_FLAGS  := $(filter-out -gencode=% --no-compress,$(NVCCFLAGS)) -gencode=arch=compute_$(PTX_ARCH),code=compute_$(PTX_ARCH) --no-compress -Xcompiler -O1
PTX_RAN    := $(strip $(NVCC) $(PTX_FLAGS))

# ---- what nvcc makes of the kernels: host code and PTX in one object, not compressed, so that tests/test_ptx.py can read it

PTX_KERNELS := $(patsubst %.cu,$(PTXSIM)/%.o,$(filter-out kernels/cuda/cublaslt_library.cu,$(wildcard kernels/cuda/*.cu)))
$(eval $(call STAMP,ptx/.nvcc,PTX_RAN))
$(PTXSIM)/%.o: %.cu $(PTXSIM)/.nvcc | $(BUILD)/.packages
	@mkdir -p $(@D)
	@echo "  NVCC  $< (PTX)"
	$(Q)$(PTX_RAN) -MMD -MP -c -o $@ $<
ifeq ($(KEEP_PTX),$(PTX_ARCH))
$(PTX_KERNELS): $(PTXSIM)/%.o: $(BUILD)/%.o
	@mkdir -p $(@D) && ln -f $< $@
endif
ptx: $(PTX_KERNELS)

# ---- the interpreter, in place of the CUDA runtime and of cuBLASLt

# -fwrapv, -fno-strict-aliasing: registers are bits that instructions see as numbers of any type, whose sums wrap.
PTXSIM_OBJECTS := $(patsubst %.cpp,$(PTXSIM)/%.o,$(filter-out tests/ptx/report_findings.cpp tests/ptx/test_%,$(wildcard tests/ptx/*.cpp tests/cublaslt/*.cpp)))
$(PTXSIM)/%.o: OPTIMIZE := -fwrapv -fno-strict-aliasing -I$(CUDA_ROOT)/include
$(PTXSIM)/%.o: %.cpp $(BUILD)/.compiled | $(BUILD)/.packages
	$(COMPILE)

PTXSIM_LIBRARY := $(filter-out $(CUDA_OBJECTS),$(LIB_OBJECTS)) $(PTX_KERNELS) $(PTXSIM_OBJECTS)
$(PTXSIM)/libtrain_gpt2.a: $(PTXSIM_LIBRARY)
	@rm -f $@
	@echo "  AR    $@"
	$(Q)ar rcs $@ $^

# ---- the tests of operations, and the interpreter's own

# Without those between processes, which need NCCL.
PTXSIM_TESTS  := $(patsubst %.cpp,$(PTXSIM)/%,$(filter-out $(OF_MODELS) tests/test_communicator.cpp,$(EMULATED)))
PTXSIM_OWN    := $(patsubst tests/ptx/%,$(PTXSIM)/tests/%,$(basename $(wildcard tests/ptx/test_*)))
PTXSIM_LDLIBS := $(GTEST) $(filter-out -lcudart_static,$(LDLIBS))
$(PTXSIM_TESTS) $(PTXSIM_OWN): $(PTXSIM)/tests/ptx/report_findings.o
$(PTXSIM_TESTS): $(PTXSIM)/tests/%: $(BUILD)/tests/%.o
$(PTXSIM_OWN): $(PTXSIM)/tests/%: $(PTXSIM)/tests/ptx/%.o
$(PTXSIM)/train_gpt2: $(BUILD)/train_gpt2.o
$(PTXSIM_TESTS) $(PTXSIM_OWN) $(PTXSIM)/train_gpt2: $(PTXSIM)/libtrain_gpt2.a $(BUILD)/.linked
	$(LINK) $(PTXSIM_LDLIBS)

ptx-tests: $(PTXSIM_TESTS) $(PTXSIM_OWN) $(PTXSIM)/train_gpt2

ptx-mutations: ptx-tests
	python3 tests/ptx/mutations.py '$(PTXSIM)' '$(PTX_RAN)' '$(CXX) -fopenmp $(LDFLAGS)' '$(PTXSIM_LDLIBS)' '$(NAMES)'

test-ptx:
ifeq ($(NVCC),)
	@echo "make test-ptx: needs nvcc, NVIDIA's compiler (of the CUDA Toolkit; NVCC=path names it)" >&2; exit 1
else
	+$(MAKE) $(PARALLEL) CUDA=1 ptx-tests
	$(PYTHON_HERE) tests/run.py --suite ptx
	@$(PYTHON_HERE) tests/ptx/coverage.py $(PTXSIM)/coverage
endif

.PHONY: ptx ptx-tests ptx-mutations test-ptx
-include $(wildcard $(PTXSIM)/kernels/cuda/*.d $(PTXSIM)/tests/*/*.d)
