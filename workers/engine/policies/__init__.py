"""Who is served next: scheduling policies, and the prefill that goes beside running streams. Pure."""
