"""KV blocks between a rank's paged cache and the tiers."""
