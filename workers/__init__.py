"""The engine: requests in, tokens out, on one process or on a group of tensor- and pipeline-parallel ranks."""
