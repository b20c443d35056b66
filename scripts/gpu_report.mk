# gpu_report.mk: make gpu-report. Included by the Makefile.

# What cannot be built or run is said in the report.
REPORT_FLAGS  := $(if $(PARTS),--parts '$(PARTS)') $(if $(TIME_LIMIT),--time-limit $(TIME_LIMIT)) $(if $(DATA),--data '$(DATA)') \
                 $(if $(LLMC),--llmc '$(LLMC)') $(if $(DRY_RUN),--dry-run) $(if $(OUT)$(DRY_RUN),--out '$(or $(OUT),$(BUILD)/gpu-report)')
gpu-report:
	@mkdir -p $(BUILD) && touch $(BUILD)/.report-began
	-+$(MAKE) -k $(PARALLEL) $(if $(DRY_RUN),$(SHIM)/train_gpt2 $(SHIM)/bench_kernels $(SANITIZED)/tests/test_philox,train_gpt2 $(BUILD)/bench/kernels \
	  $(if $(filter tests sanitizer all,$(or $(PARTS),tests)),tests))
	$(PYTHON_HERE) scripts/gpu_report.py --spent $$(( $$(date +%s) - $$(stat -c %Y $(BUILD)/.report-began) )) $(REPORT_FLAGS)
