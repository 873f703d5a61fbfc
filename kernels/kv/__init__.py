"""What writes, packs and copies blocks of the paged KV cache."""
