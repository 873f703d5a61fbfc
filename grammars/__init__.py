"""Structured output: what a completion may look like, and what that leaves of the vocabulary at each position.

Shared by the router, which refuses what cannot be compiled, and the workers, which choose by it.
"""
