"""What a fragment is: its header and checksum, compression, authenticity, and how bytes are copied."""
