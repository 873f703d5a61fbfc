"""Numbers to the blocks of a GGUF, in torch. The way back is workers.model.quant.gguf_blocks."""
