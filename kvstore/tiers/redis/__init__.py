"""One Redis, or a Redis cluster, as a tier."""
