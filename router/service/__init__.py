"""What becomes of a request: checks, text, admission, placement of its parts, its journal."""
