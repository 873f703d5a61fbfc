"""KV blocks outside the model: their names, the books of device blocks, the tiers that keep them and who has which.

Knows nothing of models, requests or routing. Import the modules; this package's root has no names of its own.
"""
