"""What makes the demo model and its draft."""
