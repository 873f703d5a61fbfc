"""Fine-tunes LoRA adapters on a base whose matrices are held in 4 bits (QLoRA, arXiv:2305.14314)."""
