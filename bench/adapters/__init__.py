"""LoRA adapters: what many cost on one worker, and what placement by residency is worth."""
