"""Traces, load generation and benchmarks."""
