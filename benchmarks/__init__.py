"""What the kernels bring: pytest-benchmark suites, one per op, against baselines timed in the same rounds."""
