"""Adapters as the scheduler sees them: which are loaded, which are in a slot of the device, who uses them."""
