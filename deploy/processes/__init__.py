"""Processes that are ours and not Ray's: routers, KV nodes, the front, and how they end."""
