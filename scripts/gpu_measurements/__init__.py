"""gpu_measurements: what scripts/gpu_report.py measures, one module per part, and the page made from it."""
