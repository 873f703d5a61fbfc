"""The pool of a device's KV blocks, and the log of its changes. Pure."""
