"""Offline compression of checkpoints: a model directory in, a smaller model directory and a report out.

A model goes through one layer at a time, so that one layer's memory is enough. Knows nothing of serving.
"""
