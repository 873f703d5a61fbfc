"""Models: what a layer keeps in the KV cache, and the rows that a forward pass sees."""
