"""KV blocks outside the model: their names, the pool of device blocks, the tiers, and the directory of locations.

Knows nothing of models, requests or routing. Import the modules; this package's root has no names of its own.
"""
