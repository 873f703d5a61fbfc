"""Heads that draft from a model's hidden states, as their checkpoints have them."""
