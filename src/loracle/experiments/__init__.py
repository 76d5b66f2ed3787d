"""Several trainings side by side: compare, validate, tune; two runs on the same rows: diff; planning a test: power."""
