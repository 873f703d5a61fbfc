"""The values of GGUF's blocks, for all types of llama.cpp: bytes to numbers, in torch."""
