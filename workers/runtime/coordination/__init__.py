"""How the ranks of a worker step together: plans, tokens between stages, and the watch over one another."""
