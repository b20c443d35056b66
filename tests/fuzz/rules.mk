# rules.mk: fuzzing by Clang's libFuzzer: the readers of readers.cpp and what they need of the sources. Included by the
# Makefile.

FUZZ         := $(BUILD)/fuzz
FUZZ_SECONDS ?= 60
READERS      ?= $(notdir $(wildcard tests/fuzz/corpus/*))
FUZZ_SOURCES := tests/fuzz/readers.cpp $(wildcard data/*.cpp) model/config.cpp $(patsubst %,train/%.cpp,command_line config_file \
                file_io llmc_model memory_size metrics option_values options safetensors trainer_state)
FUZZ_FLAGS   := -std=c++20 -O1 -g1 -I. -Wall -Wextra $(if $(WERROR),-Werror) -fsanitize=fuzzer,address,undefined -fno-sanitize=vptr \
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

-include $(FUZZ_SOURCES:%.cpp=$(FUZZ)/%.d)
