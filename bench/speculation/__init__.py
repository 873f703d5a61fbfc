"""Speculative decoding: its drafters, its budget under load, and trees beside chains."""
