"""Attention over a paged cache, one operation per file."""
