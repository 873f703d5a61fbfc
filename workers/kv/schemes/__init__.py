"""How the paged cache keeps keys and values: one file per scheme. See kvstore.kv_cache_dtype."""
