"""Benchmarks. The results are in docs/benchmarks.md and docs/scaling.md."""
