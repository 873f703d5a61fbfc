"""Speculative decoding: tokens that may follow are proposed by a drafter, and judged by the model in one step."""
