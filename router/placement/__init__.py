"""Where a request runs: policies, what workers hold, and the life of a stream. Pure."""
