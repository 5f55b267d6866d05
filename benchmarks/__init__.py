"""Benchmarks, started by hand; their figures are in RESULTS.md."""
