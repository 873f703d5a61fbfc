"""The tier below the arena, in the node process: segments on a disk."""
