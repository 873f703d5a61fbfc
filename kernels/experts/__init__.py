"""Mixtures of experts: rows grouped by expert, and the gated products of the chosen ones."""
