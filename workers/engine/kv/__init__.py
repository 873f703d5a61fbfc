"""A request's KV blocks on their way to and from the tiers, as the scheduler decides them. Pure."""
