"""Leases, directory and stream journal, and what keeps them."""
