"""LoRA adapters as a router sees them: which are served, by which names, and whether files may be served at all."""
