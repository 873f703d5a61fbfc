"""Writes a compressed model as one GGUF file, which llama.cpp and the engine read."""
