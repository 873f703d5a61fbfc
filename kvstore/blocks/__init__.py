"""The books of a device's KV blocks, and the log of which come and go. Pure."""
