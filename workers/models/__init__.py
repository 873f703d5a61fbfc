"""Model families. Each file is one family: its layers over a paged KV cache, split over ranks."""
