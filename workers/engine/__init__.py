"""Requests of one worker, and the decisions of each step: pure code, but for the thread that owns an engine."""
