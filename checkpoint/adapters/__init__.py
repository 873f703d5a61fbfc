"""LoRA adapters in PEFT's layout, read without torch: what they say, what they hold, and what is refused by name."""
