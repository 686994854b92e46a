"""Comparisons, sweeps, reports and benchmarks; needs the extra `[train]` or `[study]`."""
