"""What a model directory in the Hugging Face layout says of itself, read without torch and held against what is known.

Every key of its JSON files and every tensor is understood, harmless for a stated reason, or refused by name: a model
that is served wrongly looks just like one that is served well.
"""
