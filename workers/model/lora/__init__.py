"""LoRA adapters beside a model's products, on one rank. Knows nothing of requests or of where adapters come from."""
