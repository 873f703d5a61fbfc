"""The fake engine: a runner without weights, whose tokens are hashes of the history in the KV cache."""
