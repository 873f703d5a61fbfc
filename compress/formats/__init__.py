"""How compressed matrices are written into files, and read back. One file a format."""
