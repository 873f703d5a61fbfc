"""The whole cluster beside other engines, on the same prompts and in one run: `make bench ARGS=peers`."""
