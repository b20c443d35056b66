# rules.mk: the CUDA Toolkit that is there, for which GPUs its nvcc compiles, and how. Included by the Makefile.

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
  # Machine code for each, and for the last one that newer GPUs can take, PTX; PTX of KEEP_PTX, too, as text (tests/ptx).
  PORTABLE   := $(lastword $(filter-out %a,$(CUDA_ARCHS)))
  GENCODE    := $(foreach a,$(CUDA_ARCHS),-gencode=arch=compute_$(a),code=sm_$(a)) \
                $(foreach a,$(sort $(PORTABLE) $(KEEP_PTX)),-gencode=arch=compute_$(a),code=compute_$(a)) \
                $(if $(KEEP_PTX),--no-compress)
  # -fmad=false: see -ffp-contract above. 1675: pragmas of GCC in the headers that are shared with the CPU.
  NVCCFLAGS  := -std=c++20 -O3 -fmad=false -Xcompiler -Wall,-Wextra,-Wno-unknown-pragmas,-Wno-restrict$(if $(WERROR),$(comma)-Werror) \
                -diag-suppress 1675 $(if $(WERROR),-Werror all-warnings) -lineinfo -I. $(GENCODE)
  CUDA_SOURCES := $(wildcard kernels/cuda/*.cu)
  CUDART     := $(firstword $(wildcard $(foreach d,lib64 lib targets/x86_64-linux/lib,$(CUDA_ROOT)/$(d)/libcudart_static.a)))
  LDLIBS     += -L$(or $(dir $(CUDART)),$(CUDA_ROOT)/lib64) -lcudart_static -ldl -lrt
else
  CUDA_SOURCES :=
endif
CUDA_OBJECTS := $(CUDA_SOURCES:%.cu=$(BUILD)/%.o)
# What the program says where it has no CUDA backend.
WITHOUT_CUDA := $(if $(filter-out undefined default file,$(origin CUDA)),CUDA=$(CUDA) was given,no nvcc was found)

$(BUILD)/kernels/cuda/%.o: kernels/cuda/%.cu $(BUILD)/.nvcc | $(BUILD)/.packages
	@mkdir -p $(@D)
	@echo "  NVCC  $<"
	$(Q)scripts/nvcc.sh $@ $(NVCC) $(NVCCFLAGS) -MMD -MP -c $<
