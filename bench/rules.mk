# rules.mk: the benchmarks. Included by the Makefile.

KERNEL_BENCH := $(patsubst %,$(BUILD)/bench/%.o,kernels kernel_cases model_cases optimizer_cases)

bench:
	scripts/setup.sh --check bench
	+$(MAKE) $(PARALLEL) train_gpt2 $(BUILD)/bench/operations
	$(BUILD)/bench/operations
	python3 scripts/bench_steps.py $(if $(LLMC),--llmc $(LLMC))
	python3 scripts/bench_ranks.py

# Needs no Google Benchmark, unlike the one of operations.
$(BUILD)/bench/kernels: $(KERNEL_BENCH) $(LIB) $(BUILD)/.linked
	$(LINK) $(LDLIBS)

$(BUILD)/bench/%: $(BUILD)/bench/%.o $(LIB) $(BUILD)/.linked
	$(LINK) -lbenchmark $(LDLIBS)

-include $(wildcard $(BUILD)/bench/*.d)
