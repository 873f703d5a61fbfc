"""Scaling policies: one pool and what was learned of it -> how many workers it needs."""
