"""Benchmarks: `uv run python -m benchmarks NAME`. Each compares in one run and reports ratios."""
