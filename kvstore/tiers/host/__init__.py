"""The tier of one host: a shared-memory arena, and the calls that say who may write where."""
