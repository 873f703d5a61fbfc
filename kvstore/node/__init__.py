"""The KV node process of one host."""
