"""Programs that measure; their results stand in docs/benchmarks.md."""
