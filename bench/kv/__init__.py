"""Keys and values: how they are kept, what travels between workers and how fast, and what tiers are worth."""
