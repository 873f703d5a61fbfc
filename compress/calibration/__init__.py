"""Token blocks, and what a layer's products get as inputs while the blocks run through the engine's own layers."""
