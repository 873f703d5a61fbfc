"""What runs in Ray: one replica per worker, one actor per rank, one supervisor of a KV node per host."""
