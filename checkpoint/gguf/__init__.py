"""GGUF, the one-file format of llama.cpp: its container, and how one becomes a model directory. Without torch.

The format is described in ggml's docs/gguf.md. Values of blocks are computed in workers.model.quant.gguf_blocks.
"""
