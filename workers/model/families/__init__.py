"""Model families. Each file is one: what its config.json says, and the layers that it is composed of."""
