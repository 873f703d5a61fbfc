"""All benchmarks, and their results beside them."""
