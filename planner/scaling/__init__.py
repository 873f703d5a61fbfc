"""Autoscaling: what is observed -> how many workers each pool should have, and why. Pure: no clock, no I/O, no Ray."""
