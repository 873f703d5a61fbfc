"""Matrix products with weights, activations or both in fewer bits, one operation per file."""
